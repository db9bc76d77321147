"""The rescue role: what stands in DEAD_LETTERS becomes a row after all, or a row of `dead_letters`.

Who acks, and when: `_until_done` acks an item of DEAD_LETTERS after the transaction that settles its message has
committed, and after a work queue has let go of that message. Every step may be cut off and is repeated from the start:
the ledger knows what is settled, deleting what is gone is no error, and the item comes again until it is acked.

    fetch one ──► letter of a role ─────────────────────────────────────────────► settle as dead ──────────► ack
             └──► advisory ──► read the message by sequence ──► last chance ────► as its worker settles ─┬─► ack
                                        │                  └──► tries used up ──► settle as dead ────────┤
                                        └─ gone: count, ack                        work queue: delete ───┘

One item is in hand at a time: a message that kills this process too costs no other one a try. See docs/adr/0007.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec
import structlog

from pulse.domain.dead_letter import Condemned, Exhausted, condemned, unpack, unread
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.ledger import position
from pulse.domain.settlement import DeadLetter, Message
from pulse.services.batches import Settler
from pulse.services.device_state import Answered
from pulse.services.waiting import KEEP_ALIVE_S, Batch, KeptAlive, Source, Waits

log = structlog.get_logger()

DEAD_LETTERS = "DEAD_LETTERS"
TRIES_MAX = 3
"""So many deaths of this process with the same message in hand, and it is buried unread."""


class Origin(Protocol):
    """The streams that messages come from; every call raises Outage where NATS is away."""

    async def read(self, stream: str, sequence: int) -> tuple[int, Message | None] | None:
        """When the stream was made, and its message, None where it is gone; None where there is no such stream."""

    async def delete(self, stream: str, sequence: int) -> None:
        """Let the stream forget a message; nothing where it has."""


class Store(Protocol):
    """The database; every call raises Outage where it is away."""

    async def check(self) -> None:
        """Returns where it could settle something now."""

    async def epoch(self, stream: str, created_ns: int) -> int:
        """The number of the making of `stream` at `created_ns`; a new one is recorded."""

    async def is_settled(self, at: int) -> bool:
        """Whether the position is settled."""

    async def is_dead(self, at: int) -> bool:
        """Whether the position is settled as a dead letter."""

    async def bury(self, stream: str, letter: DeadLetter) -> bool:
        """Settle the message as this dead letter; False where it was settled before.

        Raises Refusal where the database cannot take it; then nothing is written.
        """


class Outcome(StrEnum):
    """What became of an item of DEAD_LETTERS."""

    STORED = "stored"
    DEAD = "dead"
    ALREADY_SETTLED = "already_settled"
    GONE = "gone"
    """The message left its stream unprocessed; the audit counts it as expired."""
    FOREIGN = "foreign"
    """The advisory is about a consumer that settles nothing of ours."""


class RescueMetrics(Protocol):
    """What is counted."""

    def rescued(self, outcome: str) -> None:
        """An item was dealt with; `outcome` is one of Outcome."""

    def waiting(self, system: str, waiting: bool) -> None:
        """The role began or ceased to wait for a system."""


class Stream(NamedTuple):
    """A stream whose messages are rescued.

    `consumer` is the one that settles them; `chance` is what its worker settles them with, None where nobody but that
    worker can process them.
    """

    consumer: str
    work_queue: bool
    chance: Settler | None


class Rescue:
    """Settles what DEAD_LETTERS, the `source`, tells of; of what `source` delivers, nothing may wait for its turn."""

    name = "rescue"

    def __init__(
        self,
        *,
        source: Source,
        origin: Origin,
        store: Store,
        streams: Mapping[str, Stream],
        metrics: RescueMetrics,
        retry_delay_s_min: float,
        retry_delay_s_max: float,
        probe: Callable[[str], None],
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._source = source
        self._origin = origin
        self._store = store
        self._streams = streams
        self._metrics = metrics
        self._probe = probe
        self._epochs: dict[tuple[str, int], int] = {}
        self._waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        self._kept_alive = KeptAlive(source, keep_alive_s=keep_alive_s)

    async def run(self, stop: asyncio.Event) -> None:
        """Deal with one item after the other until `stop`; returns when none is in hand."""
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(self._kept_alive.keep_alive(), name="rescue-keep-alive")
            await self._work(stop)
            keeper.cancel()

    async def _work(self, stop: asyncio.Event) -> None:
        """A delivery counts as a try whatever becomes of it, so nothing is fetched before the database was seen."""
        attempt = 0
        seen = False
        while not stop.is_set():
            try:
                if not seen:
                    await self._store.check()
                    seen = True
                batch = await self._source.fetch()
            except Outage as outage:
                seen = False
                attempt += 1
                await self._waits.out(outage, attempt, stop)
                continue
            attempt = 0
            self._waits.over()
            if batch:
                self._kept_alive.take(batch, batch.messages)
                self._probe("rescue.fetched")
                await self._until_done(batch, stop)
                self._kept_alive.drop(batch)

    async def _until_done(self, batch: Batch, stop: asyncio.Event) -> None:
        """Deal with the one item of `batch` and ack it, outages waited out; give it back where `stop` comes first."""
        (item,) = batch.messages
        attempt = 0
        while True:
            try:
                outcome = await self._deal_with(batch.created_ns, item)
                self._probe("rescue.settled")
                await self._source.ack(batch)
            except Outage as outage:
                attempt += 1
                if stop.is_set():
                    await self._kept_alive.give_back(batch)
                    return
                await self._waits.out(outage, attempt, stop)
                continue
            self._waits.over()
            self._metrics.rescued(outcome)
            return

    async def _deal_with(self, created_ns: int, item: Message) -> Outcome:
        try:
            found = unpack(item.subject, item.body)
        except Refusal as refusal:
            return await self._bury_item(created_ns, item, refusal)
        if isinstance(found, Exhausted):
            return await self._rescue(found, tries=item.attempts)
        try:
            if item.attempts > TRIES_MAX:
                raise Refusal(Reason.MAX_DELIVERIES, f"{TRIES_MAX} tries to write this letter down ended the process")
            return await self._write_down(found, created_ns, item.sequence)
        except Refusal as refusal:
            return await self._bury_item(created_ns, item, refusal)

    async def _bury_item(self, created_ns: int, item: Message, refusal: Refusal) -> Outcome:
        """Settle the item itself as a dead letter."""
        at = await self._position(DEAD_LETTERS, created_ns, item.sequence)
        return await self._bury(DEAD_LETTERS, unread(at, item, refusal.reason, refusal.message))

    async def _write_down(self, letter: Condemned, created_ns: int, sequence: int) -> Outcome:
        """Settle the message that a role gave up; the letter's own position stands for one that never had any."""
        if letter.stream_seq is not None and letter.created_ns is not None:
            at = await self._position(letter.stream, letter.created_ns, letter.stream_seq)
        else:
            at = await self._position(DEAD_LETTERS, created_ns, sequence)
        return await self._bury(letter.stream, condemned(at, letter))

    async def _rescue(self, told: Exhausted, *, tries: int) -> Outcome:
        stream = self._streams.get(told.stream)
        if stream is None or stream.consumer != told.consumer:
            return Outcome.FOREIGN
        found = await self._origin.read(told.stream, told.stream_seq)
        if found is None or found[0] > told.timestamp.timestamp() * 1e9:
            return self._gone(told)  # with the making of the stream that the advisory is about
        created_ns, message = found
        at = await self._position(told.stream, created_ns, told.stream_seq)
        if message is None:
            return Outcome.ALREADY_SETTLED if await self._store.is_settled(at) else self._gone(told)
        message = msgspec.structs.replace(message, attempts=told.deliveries)
        if stream.chance is None or tries > TRIES_MAX:
            error = f"{told.deliveries} deliveries to {told.consumer} ended without an answer"
            if stream.chance is not None:
                error += f", and so did {TRIES_MAX} rescues"
            outcome = await self._bury(told.stream, unread(at, message, Reason.MAX_DELIVERIES, error))
        else:
            outcome = await self._try(stream.chance, Answered(created_ns, [message]), at)
        if stream.work_queue:
            self._probe("rescue.committed")
            await self._origin.delete(told.stream, told.stream_seq)
        return outcome

    async def _try(self, chance: Settler, batch: Answered, at: int) -> Outcome:
        """Settle the one message of `batch`, which is at `at`, as its worker does."""
        (message,) = batch.messages
        before = await self._store.is_settled(at)
        try:
            await chance.settle(batch, [(at, message)])
        except Refusal as refusal:
            await chance.condemn(batch, at, message, refusal)
        if before:
            return Outcome.ALREADY_SETTLED
        return Outcome.DEAD if await self._store.is_dead(at) else Outcome.STORED

    async def _bury(self, stream: str, letter: DeadLetter) -> Outcome:
        if not await self._store.bury(stream, letter):
            return Outcome.ALREADY_SETTLED
        log.warning("dead letter", reason=letter.reason, error=letter.error, subject=letter.message.subject)
        return Outcome.DEAD

    async def _position(self, stream: str, created_ns: int, sequence: int) -> int:
        epoch = self._epochs.get((stream, created_ns))
        if epoch is None:
            epoch = self._epochs[stream, created_ns] = await self._store.epoch(stream, created_ns)
        return position(epoch, sequence)

    def _gone(self, told: Exhausted) -> Outcome:
        log.error("a message expired before it could be rescued", stream=told.stream, sequence=told.stream_seq)
        return Outcome.GONE
