"""The delivery role: each job of a route is delivered, waits, or becomes a dead letter; none stalls the others.

    ROUTES, LATER ─► job ─► route ─► turn ─► attempt ─► delivered ───────────────────────────► ack
                      │       │       │         ├─► again, at a time ─► a schedule in LATER ─► ack
                      │       │       └─► not now: parked, no attempt is spent ─► LATER ─────► ack
                      │       ├─► its route is ordered ─► the line of its device (ordered_delivery.py) ─► ack
                      └───────┴─────────────────┴─► dead ─► a letter in DEAD_LETTERS ────────► ack

Who acks: `Acks`, once JetStream, or PostgreSQL for a line, has what becomes of the job, or the destination has it. A
crash before that delivers again, under the same webhook-id. Nothing waits here for longer than moments: the places that
JetStream gives are for attempts that run. PostgreSQL is asked for routes, given lines and told of attempts; while it is
away, the routes that are known are served, and dead letters stand in DEAD_LETTERS until `rescue` can write them down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from pulse.domain.delivery import Delivered
from pulse.domain.errors import Outage, Reason, Refusal, StreamFull
from pulse.domain.line import InLine
from pulse.domain.receipt import Receipt
from pulse.domain.route import Job, read_job
from pulse.domain.settlement import Message
from pulse.domain.waiting_job import Later, Past, later, origin_subject
from pulse.services.delivery_acks import Acks
from pulse.services.delivery_record import Records
from pulse.services.held_job import Held, Inlet, letter_of
from pulse.services.job_fate import Again, Dying, Fate, Fates, InOrder
from pulse.services.refusal_log import RefusalLog
from pulse.services.route_book import RouteBook
from pulse.services.waiting import KEEP_ALIVE_S, KeptAlive, Source, WaitMetrics, Waits

HELD_MAX = 500
"""Jobs in hand; JetStream hands out 100 of each stream, to all workers together."""
CUT_S = 2.0
"""How long a stopping worker lets attempts run; what is cut comes again, and the attempt is not counted."""


class Schedules(Protocol):
    """The stream LATER."""

    async def publish(self, job: Later) -> None:
        """Returns once it is on disk; raises Outage, and StreamFull where it has no room for jobs that wait."""


class Lines(Protocol):
    """The lines of ordered routes."""

    async def add(self, jobs: Sequence[InLine]) -> Sequence[Receipt | StreamFull]:
        """Put jobs in; returns of each that it stands there, or that there is no room. Raises Outage."""


class Routes(Protocol):
    """The database."""

    async def check(self) -> None:
        """Returns where it could be asked for routes; raises Outage."""


class Publisher(Protocol):
    """JetStream."""

    async def publish(self, subject: str, body: bytes, *, message_id: str) -> Receipt:
        """Returns once it is on disk; raises Outage, or Refusal for what it cannot carry."""


class DeliveryMetrics(WaitMetrics, Protocol):
    """What is counted."""

    def concluded(self, outcome: str) -> None:
        """A job is `delivered`, to `retry`, `parked`, `lined_up`, `dead`, or `left` to be delivered once more."""

    def died(self, reason: Reason) -> None:
        """A job is dead."""

    def redelivered(self) -> None:
        """A job came for the second time or more."""


class Delivery:
    """The service; `sources` are the consumers of ROUTES and LATER, by the stream."""

    name = "delivery"

    def __init__(
        self,
        *,
        sources: Mapping[str, Source],
        routes: Routes,
        book: RouteBook,
        fates: Fates,
        schedules: Schedules,
        lines: Lines,
        publisher: Publisher,
        records: Records,
        metrics: DeliveryMetrics,
        retry_delay_s_min: float,
        retry_delay_s_max: float,
        probe: Callable[[str], None],
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._routes = routes
        self._book = book
        self._fates = fates
        self._schedules = schedules
        self._lines = lines
        self._publisher = publisher
        self._records = records
        self._metrics = metrics
        self._waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        self._probe = probe
        self._inlets = [self._inlet(stream, source, keep_alive_s) for stream, source in sources.items()]
        self._room = asyncio.Semaphore(HELD_MAX)
        self._jobs: set[asyncio.Task[None]] = set()
        self._refusals = RefusalLog()

    def _inlet(self, stream: str, source: Source, keep_alive_s: float) -> Inlet:
        def done(created_ns: int, message: Message) -> None:
            self._let_go(inlet, created_ns, message)

        acks = Acks(source, waits=self._waits, done=done, probe=self._probe)
        inlet = Inlet(stream, source, acks, KeptAlive(source, keep_alive_s=keep_alive_s))
        return inlet

    @property
    def in_hand(self) -> int:
        """Jobs that are neither acked nor left to others."""
        return sum(len(inlet.held) for inlet in self._inlets)

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop`, then finish what runs, or have it come again; returns when nothing is in hand."""
        last = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for_ever = [group.create_task(self._book.run(), name="delivery-routes")]
            for_ever += [
                group.create_task(inlet.hand.keep_alive(), name=f"delivery-keep-alive-{inlet.stream}")
                for inlet in self._inlets
            ]
            acks = [
                group.create_task(inlet.acks.run(stop, last), name=f"delivery-acks-{inlet.stream}")
                for inlet in self._inlets
            ]
            records = group.create_task(self._records.run(last), name="delivery-records")
            await self._until_seen(stop)
            await asyncio.gather(*[self._fetch(inlet, group, stop) for inlet in self._inlets])
            await self._finish()
            last.set()
            await asyncio.wait([*acks, records])
            for task in for_ever:
                task.cancel()

    async def _until_seen(self, stop: asyncio.Event) -> None:
        """A delivery counts, whatever becomes of it: nothing is fetched before routes can be asked for."""
        attempt = 0
        while not stop.is_set():
            try:
                await self._routes.check()
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
                continue
            self._waits.over("postgresql")
            return

    async def _fetch(self, inlet: Inlet, group: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        attempt = 0
        while not stop.is_set():
            try:
                batch = await inlet.source.fetch()
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
                continue
            attempt = 0
            self._waits.over("nats")
            for message in batch.messages if batch else ():
                assert batch is not None
                if message.attempts > 1:
                    self._metrics.redelivered()
                key = (batch.created_ns, message.sequence)
                if key in inlet.held:
                    continue  # in hand still: its ack will do for both
                await self._room.acquire()
                inlet.held.add(key)
                inlet.hand.take(key, [message])
                held = Held(inlet, batch.created_ns, message)
                task = group.create_task(self._serve(held, stop), name="delivery-job")
                self._jobs.add(task)
                task.add_done_callback(self._jobs.discard)
            if batch:
                self._probe("delivery.fetched")

    async def _finish(self) -> None:
        """Let what runs end, for a while; then have it come again."""
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=CUT_S)
        self._fates.cut(self._jobs)
        if self._jobs:
            await asyncio.wait(self._jobs)

    async def _serve(self, held: Held, stop: asyncio.Event) -> None:
        """One job, from its fetch until it may be acked."""
        try:
            held.job = read_job(origin_subject(held.message), held.message.body)
        except Refusal as refusal:
            fate: Fate = Dying(refusal.reason, str(refusal), held.past.attempts)
        else:
            fate = await self._fates.of(held.job, held.past)
        attempt = 0
        while not isinstance(fate, Delivered):
            try:
                await self._conclude(held, fate)
                break
            except StreamFull as full:
                if isinstance(fate, Dying):
                    attempt += 1
                    await self._waits.out(full, attempt, stop)
                else:
                    attempts = fate.attempts if isinstance(fate, Again) else held.past.attempts
                    fate = Dying(Reason.ROUTES_FULL, str(full), attempts)
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
            if attempt and stop.is_set():
                self._metrics.concluded("left")
                self._let_go(held.inlet, held.created_ns, held.message)
                return
        self._count(held, fate)
        self._probe("delivery.concluded")
        held.inlet.acks.add(held.created_ns, held.message)

    async def _conclude(self, held: Held, fate: Again | Dying | InOrder) -> None:
        message = held.message
        if isinstance(fate, Dying):
            letter = letter_of(held, fate)
            body = msgspec.json.encode(letter)
            await self._publisher.publish(letter.carrier, body, message_id=f"dead/{held.name}")
            return
        assert held.job is not None
        if isinstance(fate, InOrder):
            [answer] = await self._lines.add([_in_line(held, held.job)])
            if isinstance(answer, StreamFull):
                raise answer
            return
        past = Past(fate.attempts, held.past.since_ms)
        await self._schedules.publish(later(held.job, message.body, past, at_s=fate.at_s, after=held.name))

    def _count(self, held: Held, fate: Fate) -> None:
        match fate:
            case Delivered():
                self._metrics.concluded("delivered")
            case Again():
                self._metrics.concluded("parked" if fate.parked else "retry")
            case InOrder():
                self._metrics.concluded("lined_up")
            case Dying():
                self._metrics.concluded("dead")
                self._metrics.died(fate.reason)
                self._refusals.note(fate.reason, fate.error, held.message.subject.encode("utf-8", "surrogateescape"))

    def _let_go(self, inlet: Inlet, created_ns: int, message: Message) -> None:
        key = (created_ns, message.sequence)
        inlet.hand.drop(key)
        inlet.held.discard(key)
        self._room.release()


def _in_line(held: Held, job: Job) -> InLine:
    return InLine(
        tenant_id=job.tenant_id,
        route_id=job.route_id,
        device_id=job.device_id,
        position=job.position,
        body=held.message.body,
        since_ms=held.past.since_ms,
        attempts=held.past.attempts,
    )
