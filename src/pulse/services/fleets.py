"""The fleet expander: makes the commands of fleets lot by lot, and ends those of cancelled ones.

Nothing is acked here. A lot and how far it brings its fleet are one transaction: a crash costs the lot that was not
committed, and whoever comes next makes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from pulse.domain.command import State
from pulse.domain.errors import Outage
from pulse.domain.fleet import Lot
from pulse.services.commands import MoveMetrics
from pulse.services.waiting import WaitMetrics, Waits

LOOK_EVERY_S = 0.5


class Store(Protocol):
    """The database."""

    async def advance(self, at_ms: int) -> Lot | None:
        """Make, or end, a lot of one fleet; None where there is none to do. Raises Outage."""


class FleetMetrics(MoveMetrics, WaitMetrics, Protocol):
    """What is counted."""

    def made(self, count: int) -> None:
        """So many commands of a fleet were made."""


class FleetExpander:
    """Does what fleets have left to do; `posted` is told that there is something to say."""

    name = "fleets"

    def __init__(
        self,
        *,
        store: Store,
        metrics: FleetMetrics,
        posted: Callable[[], None],
        now_ms: Callable[[], int],
        retry_delay_s_min: float,
        retry_delay_s_max: float,
        probe: Callable[[str], None],
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._posted = posted
        self._now_ms = now_ms
        self._waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        self._probe = probe

    async def run(self, stop: asyncio.Event) -> None:
        """Make lots until `stop`, and look now and then where there is none to make."""
        attempt = 0
        while not stop.is_set():
            try:
                lot = await self._store.advance(self._now_ms())
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
                continue
            attempt = 0
            self._waits.over()
            if lot is None:
                await self._pause(stop)
            else:
                self._tell(lot)

    def _tell(self, lot: Lot) -> None:
        self._probe("fleets.committed")
        if lot.made:
            self._posted()
        self._metrics.made(lot.made)
        self._metrics.moved({State.CANCELLED: lot.cancelled})

    async def _pause(self, stop: asyncio.Event) -> None:
        try:
            await asyncio.wait_for(stop.wait(), LOOK_EVERY_S)
        except TimeoutError:
            return
