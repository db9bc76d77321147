"""The shadow worker: SHADOW → shadows, every message answered and settled exactly once.

Who acks, and when: services/batches.py, after the transaction that writes the shadows, what their devices hear (into
the outbox), and the ledger. Messages of one device may come out of order, from a redelivery or through two workers:
the store locks the device, and a late message is put in its place (domain/shadow.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import structlog

from pulse.domain.errors import Refusal
from pulse.domain.ledger import PositionSet
from pulse.domain.settlement import DeadLetter, Message, condemn
from pulse.domain.shadow_requests import Answers, Request, read_request
from pulse.services import batches
from pulse.services.batches import BatchLoop, Positioned, Settler, unrouted
from pulse.services.waiting import KEEP_ALIVE_S, Batch, KeptAlive, Source, WaitMetrics, Waits

log = structlog.get_logger()

SAMPLED = 10
"""Messages of a batch whose time from the edge is told."""


class Store(batches.Store, Protocol):
    """The database; every call raises Outage where it is away."""

    async def settle(self, requests: Sequence[Request], dead: Sequence[DeadLetter]) -> tuple[Answers, PositionSet]:
        """Answer `requests`, which are in the order of the stream, and bury `dead`, in one transaction.

        Returns the answers, and what others had settled before, which is left out. Raises Refusal where the database
        cannot take some row of it; then nothing is written.
        """


class SettledMetrics(Protocol):
    """What is counted of messages that are settled."""

    def settled(
        self,
        *,
        accepted: int,
        answered: int,
        rejected: int,
        dead: int,
        already_settled: int,
        commit_s: float,
        end_to_end_s: Sequence[float],
    ) -> None:
        """One transaction has committed: updates accepted, gets answered, either rejected, letters buried.

        `end_to_end_s` samples the time from the edge to the commit.
        """


class ShadowMetrics(SettledMetrics, batches.BatchMetrics, WaitMetrics, Protocol):
    """What is counted."""


class ShadowSettler:
    """Answers messages in `store`; satisfies `batches.Settler`. `posted` is told that there is something to say."""

    def __init__(
        self, *, store: Store, metrics: SettledMetrics, posted: Callable[[], None], probe: Callable[[str], None]
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._posted = posted
        self._probe = probe

    async def settle(self, batch: Batch, positioned: Positioned) -> None:
        """Answer these, or bury what cannot be read, in the order of the stream."""
        read = [read_request(position, message) for position, message in sorted(positioned, key=_position)]
        self._probe("shadow.decoded")
        await self._settle(
            [each for each in read if isinstance(each, Request)],
            [each for each in read if isinstance(each, DeadLetter)],
        )

    async def condemn(self, batch: Batch, position: int, message: Message, refusal: Refusal) -> None:
        """Bury this one."""
        await self._settle([], condemn(position, message, refusal).dead_letters)

    async def _settle(self, requests: Sequence[Request], dead: Sequence[DeadLetter]) -> None:
        started = time.monotonic()
        answers, already = await self._store.settle(requests, dead)
        commit_s = time.monotonic() - started
        if answers.said:
            self._posted()
        buried = [letter for letter in dead if letter.position not in already]
        answered = [request for request in requests if request.position not in already]
        accepted, now_ms = len(answers.changes), time.time_ns() // 1_000_000
        self._metrics.settled(
            accepted=accepted,
            answered=len(answered) - accepted - answers.rejected,
            rejected=answers.rejected,
            dead=len(buried),
            already_settled=len(already),
            commit_s=commit_s,
            end_to_end_s=[(now_ms - request.at_ms) / 1000 for request in islice(answered, SAMPLED)],
        )
        for letter in buried:
            log.warning("dead letter", reason=letter.reason, error=letter.error, subject=letter.message.subject)


class ShadowWorker:
    """Answers what `source` delivers, in `store`; `posted` is told that there is something to say."""

    name = "shadow"

    def __init__(
        self,
        *,
        source: Source,
        store: Store,
        metrics: ShadowMetrics,
        posted: Callable[[], None],
        writers: int,
        retry_delay_s_min: float,
        retry_delay_s_max: float,
        probe: Callable[[str], None],
        routed: Callable[[Settler], Settler] = unrouted,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._loop = BatchLoop(
            name=self.name,
            source=source,
            store=store,
            settler=routed(ShadowSettler(store=store, metrics=metrics, posted=posted, probe=probe)),
            kept_alive=KeptAlive(source, keep_alive_s=keep_alive_s),
            waits=Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max),
            metrics=metrics,
            writers=writers,
            probe=probe,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Answer until `stop`, then finish what is in hand; returns when nothing is."""
        await self._loop.run(stop)


def _position(positioned: tuple[int, Message]) -> int:
    return positioned[0]
