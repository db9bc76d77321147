"""Deliveries of ordered routes: lines are taken, and each is gone through from its head, one job after the other.

    lines that are due ─► take ─► head ─► attempt ─┬─ delivered ────────────────────────► next head
                                   ▲               ├─ dead ─► a letter in DEAD_LETTERS ─► next head
                                   │               └─ again, at a time ─► the line waits
                                   └── settled in PostgreSQL ◄── the line is let go of

Who settles, and when: here, after the destination has a job, or JetStream its letter. A crash before that delivers
again what was delivered, under the same webhook-id, and nothing in another order. One worker has a line at a time; what
makes the order is not that but `domain/line.py`.

Lines wait in PostgreSQL alone: while it is away, nothing of them is sent, and nothing was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from pulse.domain.dead_letter import Condemned
from pulse.domain.delivery import Delivered
from pulse.domain.errors import Outage, Refusal
from pulse.domain.line import InLine, Line, LineKey, Turn, Turned
from pulse.domain.route import read_job
from pulse.domain.waiting_job import Past
from pulse.services.delivery import DeliveryMetrics, Publisher
from pulse.services.held_job import ROUTES
from pulse.services.job_fate import Again, Dying, Fates, InOrder
from pulse.services.refusal_log import RefusalLog
from pulse.services.waiting import Waits

LINES_MAX = 100
"""Lines in hand."""
POLL_S = 0.1
"""How long a job may stand in a line before anybody looks."""
CUT_S = 2.0


class LineStore(Protocol):
    """The database; every call raises Outage."""

    async def take(self, upto: Mapping[int, int], *, limit: int) -> Sequence[Line]:
        """Take lines of these epochs that are due, with jobs up to these positions."""

    async def keep(self, claims: Mapping[LineKey, int]) -> None:
        """Have these for longer."""

    async def settle(self, turns: Sequence[Turned]) -> None:
        """Write down what became of lines, and let go of them."""


class Routed(Protocol):
    """Who knows how far streams are routed; raises Outage."""

    async def upto(self) -> Mapping[int, int]:
        """Of each epoch with lines that are due, the last position that may be sent."""


class OrderedDelivery:
    """The service; a line that is held is kept every `keep_s`."""

    name = "ordered delivery"

    def __init__(
        self,
        *,
        store: LineStore,
        routed: Routed,
        fates: Fates,
        publisher: Publisher,
        metrics: DeliveryMetrics,
        retry_delay_s_min: float,
        retry_delay_s_max: float,
        keep_s: float,
        probe: Callable[[str], None],
    ) -> None:
        self._store = store
        self._routed = routed
        self._fates = fates
        self._publisher = publisher
        self._metrics = metrics
        self._waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        self._keep_s = keep_s
        self._probe = probe
        self._held: dict[LineKey, int] = {}
        self._turns: set[asyncio.Task[None]] = set()
        self._turned: list[Turned] = []
        self._some = asyncio.Event()
        self._look = asyncio.Event()
        self._refusals = RefusalLog()

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop`, then finish what runs, or leave it; returns when no line is in hand."""
        last = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(self._keep(), name="ordered-keep")
            settling = group.create_task(self._settle(stop, last), name="ordered-settle")
            await self._take(group, stop)
            if self._turns:
                await asyncio.wait(self._turns, timeout=CUT_S)
            self._fates.cut(self._turns)
            if self._turns:
                await asyncio.wait(self._turns)
            last.set()
            self._some.set()
            await asyncio.wait([settling])
            keeper.cancel()

    async def _take(self, group: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        attempt = 0
        while not stop.is_set():
            self._look.clear()
            room = LINES_MAX - len(self._held)
            lines: Sequence[Line] = ()
            try:
                if room and (upto := await self._routed.upto()):
                    lines = await self._store.take(upto, limit=room)
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
                continue
            attempt = 0
            self._waits.over()
            for line in lines:
                self._held[line.key] = line.claim
                task = group.create_task(self._go(line, stop), name="ordered-line")
                self._turns.add(task)
                task.add_done_callback(self._turns.discard)
            if lines:
                self._probe("ordered.taken")
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._look.wait()

    async def _go(self, line: Line, stop: asyncio.Event) -> None:
        """One turn at a line."""
        turn = Turn(line)
        while (head := turn.head) is not None and not stop.is_set():
            fate = await self._fate_of(head)
            match fate:
                case Again():
                    turn.waits(fate.at_s, attempts=fate.attempts)
                    self._metrics.concluded("parked" if fate.parked else "retry")
                case Dying():
                    if not await self._bury(head, fate, stop):
                        break
                    turn.passed()
                case _:
                    turn.passed()
                    self._metrics.concluded("delivered")
            self._probe("ordered.concluded")
        self._turned.append(turn.turned())
        self._some.set()

    async def _fate_of(self, head: InLine) -> Delivered | Again | Dying:
        try:
            job = read_job(f"routes.{head.tenant_id}", head.body)
        except Refusal as refusal:
            return Dying(refusal.reason, str(refusal), head.attempts)
        fate = await self._fates.of(job, Past(head.attempts, head.since_ms), is_head=True)
        assert not isinstance(fate, InOrder)
        return fate

    async def _bury(self, head: InLine, dying: Dying, stop: asyncio.Event) -> bool:
        """Whether its letter is on disk; False where that could not be by `stop`."""
        letter = Condemned(
            stream=ROUTES,
            subject=f"routes.{head.tenant_id}",
            reason=dying.reason,
            error=dying.error,
            body=head.body,
            tenant_id=head.tenant_id,
            device_id=head.device_id,
            attempts=dying.attempts,
            published_ns=head.since_ms * 1_000_000,
        )
        name = f"dead/ordered/{head.position}:{head.route_id}/{head.since_ms}"
        attempt = 0
        while True:
            try:
                await self._publisher.publish(letter.carrier, msgspec.json.encode(letter), message_id=name)
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
                if stop.is_set():
                    self._metrics.concluded("left")
                    return False
                continue
            self._metrics.concluded("dead")
            self._metrics.died(dying.reason)
            self._refusals.note(dying.reason, dying.error, letter.subject.encode())
            return True

    async def _settle(self, stop: asyncio.Event, last: asyncio.Event) -> None:
        """Write down what is done, all that is at a moment together, until `last` is set and nothing is left."""
        while not (last.is_set() and not self._turned):
            if not self._turned:
                self._some.clear()
                await self._some.wait()
                continue
            turns, self._turned = self._turned, []
            await self._until_settled(turns, stop)
            for turned in turns:
                self._held.pop(turned.key, None)
            self._probe("ordered.settled")
            self._look.set()

    async def _until_settled(self, turns: Sequence[Turned], stop: asyncio.Event) -> None:
        attempt = 0
        while True:
            try:
                await self._store.settle(turns)
                return
            except Outage as outage:
                attempt += 1
                if stop.is_set():
                    return  # the lines are due again once nobody keeps them, and what was sent is sent again
                await self._waits.out(outage, attempt, stop)

    async def _keep(self) -> None:
        """Keep what is held, for ever."""
        while True:
            await asyncio.sleep(self._keep_s)
            if self._held:
                with suppress(Outage):  # then others may take them, which repeats what is being sent
                    await self._store.keep(dict(self._held))
