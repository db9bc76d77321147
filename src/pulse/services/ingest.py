"""The ingest worker: TELEMETRY → PostgreSQL, every position settled exactly once.

Who acks, and when: `_until_settled` acks the messages of a batch after the transaction that settles them has committed,
and only then; those whose word on their device is not written yet are left to the StateKeeper (device_state.py).
A crash before the commit costs a redelivery; a crash between commit and ack costs one that the ledger recognises.

    fetch ──► handover (bounded) ──► writer × n:  decide fates ─► settle in one transaction ─► ack
                                                     ▲                  │
                                                     │         outage: keep the batch alive, wait, again
                                                     └──────── poison: halve, until the one message stands alone
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import structlog

from pulse.domain.errors import Outage, Refusal
from pulse.domain.ledger import PositionSet, positions
from pulse.domain.settlement import Message, Settlement, condemn, settle
from pulse.domain.telemetry import PayloadDecoder
from pulse.services.device_state import Answered, StateKeeper, StateStore
from pulse.services.waiting import KEEP_ALIVE_S, Batch, KeptAlive, Source, Waits

log = structlog.get_logger()

SAMPLED = 10
"""Devices of a batch whose time from edge to row is told."""


class Store(StateStore, Protocol):
    """The database; every call raises Outage where it is away."""

    async def check(self) -> None:
        """Returns where it could settle something now."""

    async def epoch(self, created_ns: int) -> int:
        """The number of the making that was made at `created_ns`; a new one is recorded."""

    async def settle(self, settlement: Settlement) -> PositionSet:
        """Write it in one transaction; returns what others had settled before, which is left out.

        Raises Refusal where the database cannot take some row of it; then nothing is written.
        """

    async def dead_among(self, settled: PositionSet) -> PositionSet:
        """Those of these settled positions that are dead letters."""


class IngestMetrics(Protocol):
    """What is counted."""

    def settled(
        self, *, stored: int, dead: int, already_settled: int, commit_s: float, end_to_end_s: Sequence[float]
    ) -> None:
        """One batch has committed; `end_to_end_s` samples the time from edge to row."""

    def waiting(self, system: str, waiting: bool) -> None:
        """The worker began or ceased to wait for a system."""

    def redelivered(self, count: int) -> None:
        """So many messages came for the second time or more."""


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
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._source = source
        self._store = store
        self._decoder = decoder
        self._metrics = metrics
        self._writers = writers
        self._probe = probe
        self._epochs: dict[int, int] = {}
        self._waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        self._kept_alive = KeptAlive(source, keep_alive_s=keep_alive_s)
        self._states = StateKeeper(
            source=source, store=store, kept_alive=self._kept_alive, waits=self._waits, probe=probe
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Fetch until `stop`, then finish what is in hand; returns when nothing is."""
        handover: asyncio.Queue[Batch | None] = asyncio.Queue(maxsize=1)
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(self._kept_alive.keep_alive(), name="ingest-keep-alive")
            states = group.create_task(self._states.run(stop), name="ingest-states")
            writers = [
                group.create_task(self._write(handover, stop), name=f"ingest-writer-{number}")
                for number in range(self._writers)
            ]
            await self._fetch(handover, stop)
            for _ in writers:
                await handover.put(None)
            await asyncio.wait(writers)
            self._states.finish()
            await asyncio.wait([states])
            keeper.cancel()

    async def _fetch(self, handover: asyncio.Queue[Batch | None], stop: asyncio.Event) -> None:
        """Hand over what comes, once the database has been seen.

        A delivery counts as an attempt whatever becomes of it: a worker that is started again and again during an
        outage must not spend those of messages that it could never have stored.
        """
        attempt = 0
        seen = False
        while not stop.is_set():
            try:
                if not seen:
                    await self._store.check()
                    seen = True
                    self._waits.over("postgresql")
                batch = await self._source.fetch()
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
                continue
            attempt = 0
            self._waits.over("nats")
            if batch:
                self._kept_alive.take(batch, batch.messages)
                self._probe("ingest.fetched")
                await handover.put(batch)

    async def _write(self, handover: asyncio.Queue[Batch | None], stop: asyncio.Event) -> None:
        while batch := await handover.get():
            redelivered = sum(1 for message in batch.messages if message.attempts > 1)
            if redelivered:
                self._metrics.redelivered(redelivered)
            if not await self._until_settled(batch, stop):
                await self._kept_alive.give_back(batch)
            self._kept_alive.drop(batch)
            await self._states.room()

    async def _until_settled(self, batch: Batch, stop: asyncio.Event) -> bool:
        """Settle and ack `batch`, outages waited out; False where `stop` came during an outage."""
        attempt = 0
        while True:
            try:
                positioned = await self._positioned(batch)
                await self._store_batch(batch, positioned)
                self._probe("ingest.committed")
                await self._source.ack(self._done_with(batch, positioned))
            except Outage as outage:
                attempt += 1
                if stop.is_set():
                    return False
                await self._waits.out(outage, attempt, stop)
                continue
            self._probe("ingest.acked")
            self._waits.over()
            return True

    async def _positioned(self, batch: Batch) -> list[tuple[int, Message]]:
        epoch = self._epochs.get(batch.created_ns)
        if epoch is None:
            epoch = self._epochs[batch.created_ns] = await self._store.epoch(batch.created_ns)
        # A redelivery may have gathered beside its original: the ledger knows positions, and would count them as one.
        by_sequence = {message.sequence: message for message in batch.messages}
        return list(zip(positions(epoch, list(by_sequence)), by_sequence.values(), strict=True))

    def _done_with(self, batch: Batch, positioned: Sequence[tuple[int, Message]]) -> Answered:
        """The messages of `batch` whose words are not held, and those that are no longer."""
        held = self._states.held
        done = [message for position, message in positioned if position not in held]
        return Answered(batch.created_ns, [*done, *self._states.take_freed(batch.created_ns)])

    async def _store_batch(self, batch: Batch, positioned: Sequence[tuple[int, Message]]) -> None:
        settlement = settle(positioned, self._decoder)
        self._probe("ingest.decoded")
        started = time.monotonic()
        try:
            already = await self._store.settle(settlement)
        except Refusal as refusal:
            if len(positioned) > 1:
                middle = len(positioned) // 2
                await self._store_batch(batch, positioned[:middle])
                await self._store_batch(batch, positioned[middle:])
                return
            settlement = condemn(*positioned[0], refusal)
            already = await self._store.settle(settlement)
        self._count(settlement, already, time.monotonic() - started)
        words = settlement.words
        if already:
            words = words.without(await self._store.dead_among(already))
        self._states.hear(batch.created_ns, words, dict(positioned))

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
