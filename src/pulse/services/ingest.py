"""The ingest worker: TELEMETRY → PostgreSQL, every position settled exactly once.

Who acks, and when: services/batches.py, after the transaction that settles the messages has committed, and only then;
those whose word on their device is not written yet are left to the StateKeeper (device_state.py). Neither acks what is
not routed yet: the jobs of a message are on disk before anything is heard of it.

    fetched batch ──► decide fates ──► settle in one transaction ──► route ──► hear what they say of their devices
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice
from typing import Protocol

import structlog

from pulse.domain.device_state import Words, state_of
from pulse.domain.errors import Refusal
from pulse.domain.ledger import PositionSet
from pulse.domain.settlement import Message, Row, Settlement, SignOfLife, condemn, settle
from pulse.domain.subjects import MessageType
from pulse.domain.telemetry import PayloadDecoder
from pulse.services import batches
from pulse.services.batches import BatchLoop, Positioned
from pulse.services.device_state import Answered, StateKeeper, StateStore
from pulse.services.waiting import KEEP_ALIVE_S, Batch, KeptAlive, Source, WaitMetrics, Waits

log = structlog.get_logger()

NONE = PositionSet()

SAMPLED = 10
"""Devices of a batch whose time from edge to row is told."""


class Store(batches.Store, StateStore, Protocol):
    """The database; every call raises Outage where it is away."""

    async def settle(self, settlement: Settlement) -> PositionSet:
        """Write it in one transaction; returns what others had settled before, which is left out.

        Raises Refusal where the database cannot take some row of it; then nothing is written.
        """

    async def dead_among(self, settled: PositionSet) -> PositionSet:
        """Those of these settled positions that are dead letters."""


class SettledMetrics(Protocol):
    """What is counted of messages that are settled."""

    def settled(
        self, *, stored: int, dead: int, already_settled: int, commit_s: float, end_to_end_s: Sequence[float]
    ) -> None:
        """One transaction has committed; `end_to_end_s` samples the time from edge to row."""


class IngestMetrics(SettledMetrics, batches.BatchMetrics, WaitMetrics, Protocol):
    """What is counted."""


Hear = Callable[[int, Words, Mapping[int, Message]], Awaitable[None]]
"""Takes what settled messages, which are by position, of the making of the stream at so many ns say of devices."""
RouteStored = Callable[
    [Mapping[MessageType, Sequence[Row | SignOfLife]], Mapping[int, Message], PositionSet], Awaitable[None]
]
"""Makes the jobs of messages that are settled, less those at positions that are dead; see `routing.Router.route`."""


async def unrouted(
    _stored: Mapping[MessageType, Sequence[Row | SignOfLife]], _messages: Mapping[int, Message], _dead: PositionSet
) -> None:
    """For where there are no routes."""


class TelemetrySettler:
    """Settles messages in `store`; satisfies `batches.Settler`.

    `route` gets each that is settled and not dead, whoever settled it, and then `hear` hears of it.
    """

    def __init__(
        self,
        *,
        store: Store,
        decoder: PayloadDecoder,
        metrics: SettledMetrics,
        hear: Hear,
        probe: Callable[[str], None],
        route: RouteStored = unrouted,
    ) -> None:
        self._store = store
        self._decoder = decoder
        self._metrics = metrics
        self._hear = hear
        self._probe = probe
        self._route = route

    async def settle(self, batch: Batch, positioned: Positioned) -> None:
        """Write what they are to become."""
        settlement = settle(positioned, self._decoder)
        self._probe("ingest.decoded")
        await self._settle(batch, positioned, settlement)

    async def condemn(self, batch: Batch, position: int, message: Message, refusal: Refusal) -> None:
        """Bury this one."""
        await self._settle(batch, [(position, message)], condemn(position, message, refusal))

    async def _settle(self, batch: Batch, positioned: Positioned, settlement: Settlement) -> None:
        started = time.monotonic()
        already = await self._store.settle(settlement)
        self._count(settlement, already, time.monotonic() - started)
        self._probe("ingest.settled")
        words, messages = settlement.words, dict(positioned)
        dead = await self._store.dead_among(already) if already else NONE
        if dead:
            words = words.without(dead)
        await self._route(
            {MessageType.TELEMETRY: settlement.rows, MessageType.HEARTBEAT: settlement.signs_of_life}, messages, dead
        )
        self._probe("ingest.routed")
        await self._hear(batch.created_ns, words, messages)

    def _count(self, settlement: Settlement, already: PositionSet, commit_s: float) -> None:
        written = settlement.without(already) if already else settlement
        now_us = time.time_ns() // 1000
        sample = [(now_us - word.seen_us) / 1e6 for word in islice(settlement.words.last.values(), SAMPLED)]
        self._metrics.settled(
            stored=len(written.rows) + len(written.signs_of_life),
            dead=len(written.dead_letters),
            already_settled=len(already),
            commit_s=commit_s,
            end_to_end_s=sample,
        )
        for letter in written.dead_letters:
            log.warning("dead letter", reason=letter.reason, error=letter.error, subject=letter.message.subject)


def written_at_once(store: StateStore) -> Hear:
    """For messages that come one by one: what each says of its device is written before it is acked."""

    async def hear(_created_ns: int, words: Words, _messages: Mapping[int, Message]) -> None:
        if words.last:
            await store.write_states({device: state_of(said) for device, said in words.of_each().items()})

    return hear


class IngestWorker:
    """Settles what `source` delivers in `store`."""

    name = "ingest"

    def __init__(
        self,
        *,
        source: Source,
        store: Store,
        decoder: PayloadDecoder,
        metrics: IngestMetrics,
        writers: int,
        retry_delay_s_min: float,
        retry_delay_s_max: float,
        probe: Callable[[str], None],
        route: RouteStored = unrouted,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        kept_alive = KeptAlive(source, keep_alive_s=keep_alive_s)
        self._states = StateKeeper(source=source, store=store, kept_alive=kept_alive, waits=waits, probe=probe)
        self._loop = BatchLoop(
            name=self.name,
            source=source,
            store=store,
            settler=TelemetrySettler(
                store=store, decoder=decoder, metrics=metrics, hear=self._hear, probe=probe, route=route
            ),
            kept_alive=kept_alive,
            waits=waits,
            metrics=metrics,
            writers=writers,
            probe=probe,
            done_with=self._done_with,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Fetch until `stop`, then finish what is in hand; returns when nothing is."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._states.run(stop), name="ingest-states")
            await self._loop.run(stop)
            self._states.finish()

    async def _hear(self, created_ns: int, words: Words, messages: Mapping[int, Message]) -> None:
        await self._states.room()
        self._states.hear(created_ns, words, messages)

    def _done_with(self, batch: Batch, positioned: Positioned) -> Answered:
        """The messages of `batch` whose words are not held, and those that are no longer."""
        held = self._states.held
        done = [message for position, message in positioned if position not in held]
        return Answered(batch.created_ns, [*done, *self._states.take_freed(batch.created_ns)])
