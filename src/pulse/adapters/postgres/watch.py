"""Whether PostgreSQL answers, asked now and then, so that `/readyz` never has to ask itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pulse.adapters.postgres.pool import Pool, transaction
from pulse.domain.errors import Outage

INTERVAL_S = 2.0


class DatabaseWatch:
    """Calls `up`, or `down` with what is wrong, at each look."""

    name = "postgresql watch"

    def __init__(self, pool: Pool, *, up: Callable[[], None], down: Callable[[str], None]) -> None:
        self._pool = pool
        self._up = up
        self._down = down

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop`."""
        while not stop.is_set():
            try:
                async with transaction(self._pool, acquire_timeout_s=INTERVAL_S) as connection:
                    await connection.execute("SELECT 1", timeout=INTERVAL_S)
            except Outage as outage:
                self._down(outage.message)
            else:
                self._up()
            try:
                await asyncio.wait_for(stop.wait(), INTERVAL_S)
            except TimeoutError:
                continue
