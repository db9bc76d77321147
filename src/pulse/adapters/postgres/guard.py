"""A pool that does not wait for a PostgreSQL which is known to be away.

A server that was stopped in the middle (SIGSTOP, a machine that is gone) keeps its connections open and says nothing,
so each statement would wait for its whole limit, and its rollback once more. Somebody who looks at a page should not.
Told that PostgreSQL is away, the guard cuts the connections: whoever waits on one gets an Outage at once. It makes no
other one until it is told that PostgreSQL is back.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import asyncpg

from pulse.adapters.postgres.pool import connect


class Guard:
    """For the `connect` of one pool; a `watch.DatabaseWatch` on another one tells it what it sees."""

    def __init__(self) -> None:
        self._connections: WeakSet[asyncpg.Connection[asyncpg.Record]] = WeakSet()
        self._away = ""

    def up(self) -> None:
        """PostgreSQL answers."""
        self._away = ""

    def down(self, detail: str) -> None:
        """It does not, and `detail` says why."""
        self._away = detail
        for connection in list(self._connections):
            connection.terminate()

    async def connect(self, *args: Any, **options: Any) -> asyncpg.Connection[asyncpg.Record]:
        """As asyncpg.connect; ConnectionRefusedError while PostgreSQL is known to be away."""
        if self._away:
            raise ConnectionRefusedError(self._away)
        connection = await connect(*args, **options)
        self._connections.add(connection)
        return connection
