"""The ingest worker: TELEMETRY → PostgreSQL, every position settled exactly once.

Who acks, and when: `_until_settled` acks the messages of a batch after the transaction that settles them has committed,
and only then. A crash before the commit costs a redelivery; a crash between commit and ack costs a redelivery
that the ledger recognises.

    fetch ──► handover (bounded) ──► writer × n:  decide fates ─► settle in one transaction ─► ack
                                                     ▲                  │
                                                     │         outage: keep the batch alive, wait, again
                                                     └──────── poison: halve, until the one message stands alone
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from pulse.domain.errors import Outage, Refusal
from pulse.domain.ledger import PositionSet, positions
from pulse.domain.retry import delay_s
from pulse.domain.settlement import Message, Settlement, condemn, settle
from pulse.domain.telemetry import PayloadDecoder

log = structlog.get_logger()

KEEP_ALIVE_S = 10.0
"""How often a batch that waits tells the stream that it is still worked on; a third of the ack wait of 30 s."""


class Batch(Protocol):
    """Messages that arrived together, all from one making of the stream."""

    @property
    def created_ns(self) -> int:
        """When that making was made; the server's own word, in ns since the epoch."""

    @property
    def messages(self) -> Sequence[Message]:
        """At least one message."""


class Source(Protocol):
    """The stream's consumer; every call raises Outage where the stream is away."""

    async def fetch(self) -> Batch | None:
        """The next messages; None where none came within the poll time."""

    async def ack(self, batch: Batch) -> None:
        """Done with these, for good."""

    async def keep_alive(self, messages: Sequence[Message]) -> None:
        """Still working on these: start their ack wait anew, and that of what arrived and was not fetched yet."""

    async def give_back(self, batch: Batch) -> None:
        """Deliver these again, at once, to others: after this, nothing more can be fetched."""


class Store(Protocol):
    """The database; every call raises Outage where it is away."""

    async def check(self) -> None:
        """Returns where it could settle something now."""

    async def epoch(self, created_ns: int) -> int:
        """The number of the making that was made at `created_ns`; a new one is recorded."""

    async def settle(self, settlement: Settlement) -> PositionSet:
        """Write it in one transaction; returns what others had settled before, which is left out.

        Raises Refusal where the database cannot take some row of it; then nothing is written.
        """


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
    ) -> None:
        self._source = source
        self._store = store
        self._decoder = decoder
        self._metrics = metrics
        self._writers = writers
        self._retry_delay_s_min = retry_delay_s_min
        self._retry_delay_s_max = retry_delay_s_max
        self._probe = probe
        self._epochs: dict[int, int] = {}
        self._in_hand: set[Batch] = set()
        self._waiting_since: dict[str, float] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Fetch until `stop`, then finish what is in hand; returns when nothing is."""
        handover: asyncio.Queue[Batch | None] = asyncio.Queue(maxsize=1)
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(self._keep_alive(), name="ingest-keep-alive")
            writers = [
                group.create_task(self._write(handover, stop), name=f"ingest-writer-{number}")
                for number in range(self._writers)
            ]
            await self._fetch(handover, stop)
            for _ in writers:
                await handover.put(None)
            await asyncio.wait(writers)
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
                    self._recovered("postgresql")
                batch = await self._source.fetch()
            except Outage as outage:
                attempt += 1
                await self._wait_out(outage, attempt, stop)
                continue
            attempt = 0
            self._recovered("nats")
            if batch:
                self._in_hand.add(batch)
                self._probe("ingest.fetched")
                await handover.put(batch)

    async def _write(self, handover: asyncio.Queue[Batch | None], stop: asyncio.Event) -> None:
        while batch := await handover.get():
            redelivered = sum(1 for message in batch.messages if message.attempts > 1)
            if redelivered:
                self._metrics.redelivered(redelivered)
            if not await self._until_settled(batch, stop):
                await self._give_back(batch)
            self._in_hand.remove(batch)

    async def _until_settled(self, batch: Batch, stop: asyncio.Event) -> bool:
        """Settle and ack `batch`, outages waited out; False where `stop` came during an outage."""
        attempt = 0
        while True:
            try:
                await self._store_batch(await self._positioned(batch))
                self._probe("ingest.committed")
                await self._source.ack(batch)
            except Outage as outage:
                attempt += 1
                if stop.is_set():
                    return False
                await self._wait_out(outage, attempt, stop)
                continue
            self._probe("ingest.acked")
            for system in tuple(self._waiting_since):
                self._recovered(system)
            return True

    async def _positioned(self, batch: Batch) -> list[tuple[int, Message]]:
        epoch = self._epochs.get(batch.created_ns)
        if epoch is None:
            epoch = self._epochs[batch.created_ns] = await self._store.epoch(batch.created_ns)
        # A redelivery may have gathered beside its original: the ledger knows positions, and would count them as one.
        by_sequence = {message.sequence: message for message in batch.messages}
        return list(zip(positions(epoch, list(by_sequence)), by_sequence.values(), strict=True))

    async def _store_batch(self, positioned: Sequence[tuple[int, Message]]) -> None:
        settlement = settle(positioned, self._decoder)
        self._probe("ingest.decoded")
        await self._settle(settlement, positioned)

    async def _settle(self, settlement: Settlement, positioned: Sequence[tuple[int, Message]]) -> None:
        started = time.monotonic()
        try:
            already = await self._store.settle(settlement)
        except Refusal as refusal:
            if len(positioned) > 1:
                middle = len(positioned) // 2
                await self._store_batch(positioned[:middle])
                await self._store_batch(positioned[middle:])
                return
            settlement = condemn(*positioned[0], refusal)
            already = await self._store.settle(settlement)
        self._count(settlement, already, time.monotonic() - started)

    def _count(self, settlement: Settlement, already: PositionSet, commit_s: float) -> None:
        written = settlement.without(already) if already else settlement
        now_us = time.time_ns() // 1000
        sample = [(now_us - seen_us) / 1e6 for seen_us in list(settlement.last_seen_us.values())[:10]]
        self._metrics.settled(
            stored=len(written.rows) + len(written.signs_of_life),
            dead=len(written.dead_letters),
            already_settled=len(already),
            commit_s=commit_s,
            end_to_end_s=sample,
        )
        for letter in written.dead_letters:
            log.warning("dead letter", reason=letter.reason, error=letter.error, subject=letter.message.subject)

    async def _keep_alive(self) -> None:
        """Whatever is in hand, waiting in the handover included, must not be redelivered while it is worked on."""
        while True:
            before = set(self._in_hand)
            await asyncio.sleep(KEEP_ALIVE_S)
            messages = [message for batch in before & self._in_hand for message in batch.messages]
            if not messages:
                continue
            try:
                await self._source.keep_alive(messages)
            except Outage as outage:
                log.warning("messages may be redelivered", error=str(outage), messages=len(messages))

    async def _give_back(self, batch: Batch) -> None:
        try:
            await self._source.give_back(batch)
        except Outage as outage:
            log.warning("messages wait for redelivery", error=str(outage), messages=len(batch.messages))

    async def _wait_out(self, outage: Outage, attempt: int, stop: asyncio.Event) -> None:
        if outage.system not in self._waiting_since:
            self._waiting_since[outage.system] = time.monotonic()
            self._metrics.waiting(outage.system, True)
            log.warning("waiting", system=outage.system, error=str(outage))
        pause = delay_s(
            attempt,
            minimum_s=self._retry_delay_s_min,
            maximum_s=self._retry_delay_s_max,
            random=random.random(),  # noqa: S311 jitter, not a secret
        )
        try:
            await asyncio.wait_for(stop.wait(), pause)
        except TimeoutError:
            return

    def _recovered(self, system: str) -> None:
        since = self._waiting_since.pop(system, None)
        if since is not None:
            self._metrics.waiting(system, False)
            log.info("recovered", system=system, after_s=round(time.monotonic() - since, 2))
