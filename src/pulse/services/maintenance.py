"""The maintenance role: what has to be done now and then, by one or many, at any time, in any order.

Every chore may run twice at once and may be cut off anywhere: it starts over at its next turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import structlog

from pulse.domain.errors import Outage

log = structlog.get_logger()


class Turn(Enum):
    """What a chore may say of its turn."""

    MORE = "more"
    """It has left something to do: its next turn comes at once, behind whatever else is due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chore:
    """Something to do at the start, and again `interval_s` after it was done."""

    name: str
    run: Callable[[], Awaitable[object]]
    interval_s: float


class Maintenance:
    """Does the chores, one at a time."""

    def __init__(self, *, chores: Sequence[Chore], name: str = "maintenance") -> None:
        self.name = name
        self._due_at = dict.fromkeys(chores, time.monotonic())
        self._waiting: set[str] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Do what is due until `stop`; a chore that meets an outage is tried again at its next turn."""
        while not stop.is_set():
            chore = min(self._due_at, key=lambda chore: self._due_at[chore])
            try:
                await asyncio.wait_for(stop.wait(), max(0.0, self._due_at[chore] - time.monotonic()))
            except TimeoutError:
                more = await self._do(chore)
                self._due_at[chore] = time.monotonic() + (0.0 if more else chore.interval_s)

    async def _do(self, chore: Chore) -> bool:
        """Whether it is to have its next turn at once."""
        try:
            outcome = await chore.run()
        except Outage as outage:
            if chore.name not in self._waiting:
                self._waiting.add(chore.name)
                log.warning("chore waits", chore=chore.name, error=str(outage))
            return False
        self._waiting.discard(chore.name)
        log.debug("chore done", chore=chore.name, outcome=outcome)
        return outcome is Turn.MORE
