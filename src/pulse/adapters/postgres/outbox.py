"""The outbox: what is to be said to devices, entered by the transaction that it tells of.

Who drains it publishes first and deletes then, so that a crash says a thing twice and never not at all.

It is filled and emptied all day, and what was deleted is stepped over, row by row, until vacuum has removed it, which
a long transaction anywhere in the database (a backup) prevents: behind 100,000 deleted rows a look takes 50 ms. So a
look begins a little behind what was deleted last, and only now and then at the first row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pulse.adapters.postgres.pool import Pool, transaction
from pulse.domain.downward import Downward

if TYPE_CHECKING:
    from pulse.adapters.postgres.pool import Connection

INSERT = """
    INSERT INTO outbox (kind, tenant_id, device_id, topic, body)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[])
"""
# In the order of ids, which is the order in which the transactions of one device have locked what they tell of.
SELECT_OLDEST = """
    SELECT id, extract(epoch FROM clock_timestamp() - created_at)::float8, tenant_id, device_id, topic, body
    FROM outbox WHERE kind = $1 AND id > $2 ORDER BY id LIMIT $3
"""
DELETE = "DELETE FROM outbox WHERE kind = $1 AND id = ANY($2::bigint[])"

BEHIND = 10_000
"""Ids: they are given out before the transactions commit, so rows appear behind others."""
FROM_FIRST_S = 5.0
"""How often a look begins at the first row: for a transaction that took longer than BEHIND ids."""


async def put_into_outbox(connection: Connection, said: Sequence[Downward]) -> None:
    """Enter `said`, in this order."""
    if said:
        rows = ((each.kind, each.tenant_id, each.device_id, each.topic, each.body) for each in said)
        await connection.execute(INSERT, *zip(*rows, strict=True))


class Outbox:
    """Reads and empties one kind of the outbox; satisfies `services.postman.Outbox`. Every call raises Outage."""

    def __init__(self, pool: Pool, kind: str) -> None:
        self._pool = pool
        self._kind = kind
        self._after = 0
        self._from_first_at = time.monotonic()

    async def oldest(self, limit: int) -> list[tuple[int, float, Downward]]:
        """What has waited longest: the id of each, for how many seconds it has waited, and what it says."""
        after, now = self._after, time.monotonic()
        if now >= self._from_first_at:
            after, self._from_first_at = 0, now + FROM_FIRST_S
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(SELECT_OLDEST, self._kind, after, limit)
        return [(number, waited_s, Downward(*parts)) for number, waited_s, *parts in rows]

    async def delete(self, ids: Sequence[int]) -> None:
        """These have been said."""
        async with transaction(self._pool) as connection:
            await connection.execute(DELETE, self._kind, ids)
        self._after = max(ids, default=0) - BEHIND
