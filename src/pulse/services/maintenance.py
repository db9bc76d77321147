"""The maintenance role: what has to be done now and then, by one or many, at any time, in any order.

Every chore may run twice at once and may be cut off anywhere: it starts over at the next round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from pulse.domain.errors import Outage

log = structlog.get_logger()

Chore = Callable[[], Awaitable[object]]


class Maintenance:
    """Runs each chore once a round, and at the start."""

    name = "maintenance"

    def __init__(self, *, chores: Mapping[str, Chore], interval_s: float) -> None:
        self._chores = chores
        self._interval_s = interval_s
        self._waiting: set[str] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Round after round until `stop`; an outage skips a chore until the next round."""
        while not stop.is_set():
            for name, chore in self._chores.items():
                if stop.is_set():
                    return
                await self._do(name, chore)
            try:
                await asyncio.wait_for(stop.wait(), self._interval_s)
            except TimeoutError:
                continue

    async def _do(self, name: str, chore: Chore) -> None:
        try:
            outcome = await chore()
        except Outage as outage:
            if name not in self._waiting:
                self._waiting.add(name)
                log.warning("chore waits", chore=name, error=str(outage))
            return
        self._waiting.discard(name)
        log.debug("chore done", chore=name, outcome=outcome)
