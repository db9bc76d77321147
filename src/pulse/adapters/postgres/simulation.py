"""What a simulated run left in the database."""

from __future__ import annotations

from datetime import datetime

from pulse.adapters.postgres.pool import Pool, transaction
from pulse.domain.ledger import PositionSet
from pulse.domain.tally import StoredRows

# ts is the sender's own clock, so its bounds leave out the partitions and the rows of other runs.
SELECT_RUN = """
    SELECT device_id, count(*), range_agg(int8range(seq, seq + 1))::text FROM telemetry
    WHERE tenant_id = $1 AND ts >= $2 AND ts <= $3 AND seq >= $4 AND seq < $5
    GROUP BY device_id
"""
COUNT_DEAD = "SELECT count(*) FROM dead_letters WHERE tenant_id = $1 AND published_at >= $2"
IS_STORED = """
    SELECT EXISTS (SELECT FROM telemetry WHERE tenant_id = $1 AND device_id = $2 AND ts = $3 AND seq = $4)
"""
COUNT_S_MAX = 300.0


class RunReader:
    """Reads the rows of one tenant; every call raises Outage where PostgreSQL is away."""

    def __init__(self, pool: Pool, tenant_id: str) -> None:
        self._pool = pool
        self._tenant_id = tenant_id

    async def rows(self, *, since: datetime, until: datetime, seqs: tuple[int, int]) -> dict[str, StoredRows]:
        """By device id, the rows of readings from `since` to `until` with sequence numbers from and below `seqs`."""
        async with transaction(self._pool) as connection:
            found = await connection.fetch(SELECT_RUN, self._tenant_id, since, until, *seqs, timeout=COUNT_S_MAX)
        return {device_id: StoredRows(rows, PositionSet.parse(ranges)) for device_id, rows, ranges in found}

    async def dead_letters(self, *, since: datetime) -> int:
        """Dead letters of the tenant that were published since."""
        async with transaction(self._pool) as connection:
            return int(await connection.fetchval(COUNT_DEAD, self._tenant_id, since))

    async def is_stored(self, device_id: str, *, ts: datetime, seq: int) -> bool:
        """Whether the row of this reading can be seen."""
        async with transaction(self._pool) as connection:
            return bool(await connection.fetchval(IS_STORED, self._tenant_id, device_id, ts, seq))
