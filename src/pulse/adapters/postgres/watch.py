"""Whether PostgreSQL answers, asked now and then, so that `/readyz` never has to ask itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from pulse.adapters.postgres.errors import mapped
from pulse.adapters.postgres.pool import Pool
from pulse.domain.errors import Outage

INTERVAL_S = 2.0


class Told(Protocol):
    """Who wants to know."""

    def up(self) -> None:
        """PostgreSQL answers."""

    def down(self, detail: str) -> None:
        """It does not, and `detail` says why."""


class DatabaseWatch:
    """Tells all of `told`, which may grow, at each look; what is away is known within two intervals."""

    name = "postgresql watch"

    def __init__(self, pool: Pool, *, told: Sequence[Told]) -> None:
        self._pool = pool
        self._told = told

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop`."""
        while not stop.is_set():
            try:
                await self._look()
            except Outage as outage:
                for each in self._told:
                    each.down(outage.message)
            else:
                for each in self._told:
                    each.up()
            try:
                await asyncio.wait_for(stop.wait(), INTERVAL_S)
            except TimeoutError:
                continue

    async def _look(self) -> None:
        with mapped():
            async with self._pool.acquire(timeout=INTERVAL_S) as connection:
                try:
                    await connection.execute("SELECT 1", timeout=INTERVAL_S)
                except TimeoutError:
                    # Given back, it would be waited for until the server has acknowledged that nobody asks any more.
                    connection.terminate()
                    raise
