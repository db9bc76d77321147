"""The sweep: what time does to commands. Any number may sweep at once, and each may be cut off anywhere.

Time does not run ahead of what devices have said: while the workers are away, a command whose device may have answered
in time is not ended. `heard_ms` is up to when all that the stream holds has been taken in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from pulse.domain.command import State
from pulse.services.commands import MoveMetrics
from pulse.services.maintenance import Turn

BACKLOG_MS_MAX = 600_000
"""A command ends so long after its time at the latest, whatever waits in the stream."""


class Store(Protocol):
    """The database; every call is one transaction of bounded length, and raises Outage."""

    async def end(self, *, due_ms: int, at_ms: int) -> Mapping[State, int]:
        """End a lot of what was due at `due_ms`; how many came into each state."""

    async def say_again(self, *, pause_ms: int, at_ms: int) -> tuple[int, bool]:
        """Have sent again what its device does not answer for; how many, and whether all have been looked at."""


class SweepMetrics(MoveMetrics, Protocol):
    """What is counted."""

    def said_again(self, count: int) -> None:
        """So many commands are sent again."""


class Sweep:
    """Ends commands, and has them sent again `resend_s` after they were sent to a device that is there."""

    def __init__(
        self,
        *,
        store: Store,
        heard_ms: Callable[[], Awaitable[int | None]],
        metrics: SweepMetrics,
        resend_s: float,
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._heard_ms = heard_ms
        self._metrics = metrics
        self._pause_ms = int(resend_s * 1000)
        self._now_ms = now_ms

    async def run_once(self) -> Turn | None:
        """A lot of each; MORE where there may be more. Raises Outage."""
        now_ms = self._now_ms()
        heard_ms = await self._heard_ms()
        due_ms = now_ms if heard_ms is None else min(now_ms, max(heard_ms, now_ms - BACKLOG_MS_MAX))
        ended = await self._store.end(due_ms=due_ms, at_ms=now_ms)
        self._metrics.moved(ended)
        again, _ = await self._store.say_again(pause_ms=self._pause_ms, at_ms=now_ms)
        self._metrics.said_again(again)
        return Turn.MORE if ended else None
