"""The loop of a worker that settles messages batch by batch.

Who acks, and when: `_until_settled` acks the messages of a batch after the transactions that settle them have
committed, and only then. A crash before a commit costs a redelivery; a crash between commit and ack costs one that the
ledger recognises.

    fetch ──► handover (bounded) ──► writer × n:  settle ─► ack
                                        ▲            │
                                        │         outage: keep the batch alive, wait, again; when stopped, give it back
                                        └──────── poison: halve, until the one message stands alone: condemn it
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from pulse.domain.errors import Outage, Refusal
from pulse.domain.ledger import positions
from pulse.domain.settlement import Message
from pulse.services.waiting import Batch, KeptAlive, Source, Waits

Positioned = Sequence[tuple[int, Message]]
"""Messages with their positions, each once."""


class Store(Protocol):
    """The database; every call raises Outage where it is away."""

    async def check(self) -> None:
        """Returns where it could settle something now."""

    async def epoch(self, created_ns: int) -> int:
        """The number of the making that was made at `created_ns`; a new one is recorded."""


class Settler(Protocol):
    """What a worker makes of its messages; every call raises Outage, and then nothing is written."""

    async def settle(self, batch: Batch, positioned: Positioned) -> None:
        """Settle these messages of `batch` in one transaction.

        Raises Refusal where the database cannot take some row of it; then nothing is written.
        """

    async def condemn(self, batch: Batch, position: int, message: Message, refusal: Refusal) -> None:
        """Settle this one as a dead letter."""


def unrouted(settler: Settler) -> Settler:
    """The settler as it is, for where there are no routes; see `routing.RoutedSettler`."""
    return settler


class BatchMetrics(Protocol):
    """What is counted."""

    def redelivered(self, count: int) -> None:
        """So many messages came for the second time or more."""


class BatchLoop:
    """Fetches from `source`, and has `settler` settle.

    `done_with` says what is to be acked of a batch that is settled, where that is not all of it; `probe` is told of
    the steps `fetched`, `committed` and `acked`, each behind the `name`.
    """

    def __init__(
        self,
        *,
        name: str,
        source: Source,
        store: Store,
        settler: Settler,
        kept_alive: KeptAlive,
        waits: Waits,
        metrics: BatchMetrics,
        writers: int,
        probe: Callable[[str], None],
        done_with: Callable[[Batch, Positioned], Batch] | None = None,
    ) -> None:
        self._name = name
        self._source = source
        self._store = store
        self._settler = settler
        self._kept_alive = kept_alive
        self._waits = waits
        self._metrics = metrics
        self._writers = writers
        self._probe = probe
        self._done_with = done_with
        self._epochs: dict[int, int] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Fetch until `stop`, then finish what is in hand; returns when nothing is."""
        handover: asyncio.Queue[Batch | None] = asyncio.Queue(maxsize=1)
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(self._kept_alive.keep_alive(), name=f"{self._name}-keep-alive")
            writers = [
                group.create_task(self._write(handover, stop), name=f"{self._name}-writer-{number}")
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
                self._probe(f"{self._name}.fetched")
                await handover.put(batch)

    async def _write(self, handover: asyncio.Queue[Batch | None], stop: asyncio.Event) -> None:
        while batch := await handover.get():
            redelivered = sum(1 for message in batch.messages if message.attempts > 1)
            if redelivered:
                self._metrics.redelivered(redelivered)
            if not await self._until_settled(batch, stop):
                await self._kept_alive.give_back(batch)
            self._kept_alive.drop(batch)

    async def _until_settled(self, batch: Batch, stop: asyncio.Event) -> bool:
        """Settle and ack `batch`, outages waited out; False where `stop` came during an outage."""
        attempt = 0
        while True:
            try:
                positioned = await self._positioned(batch)
                await self._settle(batch, positioned)
                self._probe(f"{self._name}.committed")
                await self._source.ack(self._done_with(batch, positioned) if self._done_with else batch)
            except Outage as outage:
                attempt += 1
                if stop.is_set():
                    return False
                await self._waits.out(outage, attempt, stop)
                continue
            self._probe(f"{self._name}.acked")
            self._waits.over()
            return True

    async def _settle(self, batch: Batch, positioned: Positioned) -> None:
        try:
            await self._settler.settle(batch, positioned)
        except Refusal as refusal:
            if len(positioned) > 1:
                middle = len(positioned) // 2
                await self._settle(batch, positioned[:middle])
                await self._settle(batch, positioned[middle:])
            else:
                await self._settler.condemn(batch, *positioned[0], refusal)

    async def _positioned(self, batch: Batch) -> Positioned:
        epoch = self._epochs.get(batch.created_ns)
        if epoch is None:
            epoch = self._epochs[batch.created_ns] = await self._store.epoch(batch.created_ns)
        # A redelivery may have gathered beside its original: the ledger knows positions, and would count them as one.
        by_sequence = {message.sequence: message for message in batch.messages}
        return list(zip(positions(epoch, list(by_sequence)), by_sequence.values(), strict=True))
