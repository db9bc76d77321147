"""The command worker: COMMANDS → commands, every message settled exactly once.

Who acks, and when: services/batches.py, after the transaction that moves the commands, tells devices what has its turn
now and which of their answers are rejected (through the outbox), and enters the ledger. Messages may come late, again,
or out of order: the table of domain/command.py says what each moves, and what moves nothing is counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from pulse.domain.command import State
from pulse.domain.command_words import Said, Settled, condemn, read_said
from pulse.domain.errors import Refusal
from pulse.domain.settlement import DeadLetter, Message
from pulse.services import batches
from pulse.services.batches import BatchLoop, Positioned, Settler, unrouted
from pulse.services.waiting import KEEP_ALIVE_S, Batch, KeptAlive, Source, WaitMetrics, Waits

log = structlog.get_logger()


class Store(batches.Store, Protocol):
    """The database; every call raises Outage where it is away."""

    async def settle(self, said: Sequence[Said], dead: Sequence[DeadLetter], *, at_ms: int) -> Settled:
        """Take in what was `said`, in the order of the stream, and bury `dead`, in one transaction.

        Raises Refusal where the database cannot take some of it; then nothing is written.
        """


class MoveMetrics(Protocol):
    """What is counted of commands, whoever moves them."""

    def moved(self, states: Mapping[State, int]) -> None:
        """So many commands came into each of these states."""


class SettledMetrics(MoveMetrics, Protocol):
    """What is counted of messages that are settled."""

    def settled(
        self, *, words: int, late: int, dead: int, not_kept: int, rejected: int, already_settled: int, commit_s: float
    ) -> None:
        """One transaction has committed: words that moved their command, and late ones; letters buried; answers to
        unknown commands that were `not_kept`; how many answers were `rejected` to their devices."""


class CommandMetrics(SettledMetrics, batches.BatchMetrics, WaitMetrics, Protocol):
    """What is counted."""


class CommandSettler:
    """Takes messages into `store`; satisfies `batches.Settler`. `posted` is told that there is something to say."""

    def __init__(
        self,
        *,
        store: Store,
        metrics: SettledMetrics,
        posted: Callable[[], None],
        now_ms: Callable[[], int],
        probe: Callable[[str], None],
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._posted = posted
        self._now_ms = now_ms
        self._probe = probe

    async def settle(self, batch: Batch, positioned: Positioned) -> None:
        """Take these in, or bury what cannot be read."""
        read = [read_said(position, message) for position, message in positioned]
        self._probe("commands.decoded")
        await self._settle(
            [each for each in read if isinstance(each, Said)],
            [each for each in read if isinstance(each, DeadLetter)],
        )

    async def condemn(self, batch: Batch, position: int, message: Message, refusal: Refusal) -> None:
        """Bury this one."""
        await self._settle([], [condemn(position, message, refusal)])

    async def _settle(self, said: Sequence[Said], dead: Sequence[DeadLetter]) -> None:
        started = time.monotonic()
        settled = await self._store.settle(said, dead, at_ms=self._now_ms())
        commit_s = time.monotonic() - started
        if settled.released or settled.rejected:
            self._posted()
        self._metrics.moved(settled.moved)
        count = len(said) + len(dead) - len(settled.already)
        self._metrics.settled(
            words=count - settled.late - len(settled.dead) - settled.not_kept,
            late=settled.late,
            dead=len(settled.dead),
            not_kept=settled.not_kept,
            rejected=settled.rejected,
            already_settled=len(settled.already),
            commit_s=commit_s,
        )
        for letter in settled.dead:
            log.warning("dead letter", reason=letter.reason, error=letter.error, subject=letter.message.subject)


class CommandWorker:
    """Takes what `source` delivers into `store`; `posted` is told that there is something to say."""

    name = "commands"

    def __init__(
        self,
        *,
        source: Source,
        store: Store,
        metrics: CommandMetrics,
        posted: Callable[[], None],
        now_ms: Callable[[], int],
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
            settler=routed(CommandSettler(store=store, metrics=metrics, posted=posted, now_ms=now_ms, probe=probe)),
            kept_alive=KeptAlive(source, keep_alive_s=keep_alive_s),
            waits=Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max),
            metrics=metrics,
            writers=writers,
            probe=probe,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Settle until `stop`, then finish what is in hand; returns when nothing is."""
        await self._loop.run(stop)
