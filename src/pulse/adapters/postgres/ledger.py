"""The ledger apart from settling: reading it for the audit, merging its old rows, partitions ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from pulse.adapters.postgres.pool import Pool, transaction
from pulse.domain.audit import EpochRecord, Settled
from pulse.domain.ledger import SEQUENCE_BITS, PositionSet

SELECT_EPOCHS = """
    SELECT epoch, created_ns, first_seq, last_seq FROM stream_epochs WHERE stream = $1 ORDER BY epoch
"""
RECORD_EPOCH = """
    WITH known AS (SELECT epoch FROM stream_epochs WHERE stream = $1 AND created_ns = $2),
    made AS (
        INSERT INTO stream_epochs (epoch, stream, created_ns)
        SELECT coalesce((SELECT max(epoch) FROM stream_epochs), 0) + 1, $1, $2
        WHERE NOT EXISTS (SELECT FROM known)
        RETURNING epoch
    )
    SELECT epoch FROM known UNION ALL SELECT epoch FROM made
"""
LOCK_EPOCHS = "LOCK TABLE stream_epochs IN SHARE ROW EXCLUSIVE MODE"
OBSERVE_EPOCH = """
    UPDATE stream_epochs SET last_seq = $3, seen_at = now() WHERE stream = $1 AND created_ns = $2 AND last_seq < $3
"""
SELECT_SETTLED = """
    SELECT coalesce(range_agg(positions), '{}')::text, coalesce(range_agg(dead), '{}')::text,
           coalesce(sum(telemetry_rows), 0)::bigint
    FROM ledger WHERE positions && int8range($1, $2)
"""
# The exclusion constraint sees this transaction's own deletes, so the merged row does not conflict with its parts;
# a worker that settles one of these positions meanwhile waits for the end and is refused by the merged row.
MERGE_ROWS = """
    WITH old AS (
        DELETE FROM ledger WHERE id IN (
            SELECT id FROM ledger WHERE settled_at < now() - make_interval(secs => $1) ORDER BY id LIMIT $2
        )
        RETURNING positions, dead, telemetry_rows, settled_at
    )
    INSERT INTO ledger (positions, dead, telemetry_rows, settled_at)
    SELECT range_agg(positions), range_agg(dead), sum(telemetry_rows), max(settled_at)
    FROM old GROUP BY lower(positions) >> $3
"""
COUNT_MERGEABLE = "SELECT count(*) FROM ledger WHERE settled_at < now() - make_interval(secs => $1)"
# What retention has dropped was counted then; what it has taken out and not yet dropped is in telemetry_retired.
COUNT_ROWS = """
    SELECT count(position) + dropped.rows, count(DISTINCT position) + dropped.rows
    FROM (
        SELECT coalesce(sum(rows), 0)::bigint AS rows FROM telemetry_dropped WHERE epoch = $1::bigint >> $3
    ) AS dropped
    LEFT JOIN (SELECT position FROM telemetry UNION ALL SELECT position FROM telemetry_retired) AS kept
        ON position >= $1 AND position < $2
    GROUP BY dropped.rows
"""

MERGE_ROWS_MAX = 10_000
MERGE_AGE_S = 60.0
"""Younger rows stay apart, so that a merge hardly ever waits for a worker, or a worker for a merge."""


async def record_epoch(pool: Pool, stream: str, created_ns: int) -> int:
    """The number of the making of `stream` at `created_ns`, recorded where it is new. Raises Outage."""
    async with transaction(pool) as connection:
        await connection.execute(LOCK_EPOCHS)
        return int(await connection.fetchval(RECORD_EPOCH, stream, created_ns))


class LedgerReader:
    """Reads and tends the ledger; every call raises Outage where PostgreSQL is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def epochs(self, stream: str) -> Sequence[EpochRecord]:
        """Every making of `stream` that a worker has met, oldest first."""
        async with transaction(self._pool) as connection:
            return [EpochRecord(*row) for row in await connection.fetch(SELECT_EPOCHS, stream)]

    async def observe(self, stream: str, created_ns: int, last_seq: int) -> None:
        """Note how far a making of `stream` has come, for the day when it is gone."""
        await record_epoch(self._pool, stream, created_ns)
        async with transaction(self._pool) as connection:
            await connection.execute(OBSERVE_EPOCH, stream, created_ns, last_seq)

    async def settled(self, epoch: int) -> Settled:
        """What is settled of `epoch`, from one snapshot."""
        async with transaction(self._pool) as connection:
            positions, dead, rows = await connection.fetchrow(SELECT_SETTLED, *_epoch_range(epoch)) or ("{}", "{}", 0)
        return Settled(PositionSet.parse(positions), PositionSet.parse(dead), rows)

    async def count_rows(self, epoch: int) -> tuple[int, int]:
        """Rows of telemetry of `epoch`, and how many positions they have: a full scan."""
        async with transaction(self._pool) as connection:
            rows, positions = await connection.fetchrow(
                COUNT_ROWS, *_epoch_range(epoch), SEQUENCE_BITS, timeout=3600
            ) or (0, 0)
        return rows, positions

    async def merge(self) -> int:
        """Merge old ledger rows into one an epoch; returns how many rows there were."""
        async with transaction(self._pool) as connection:
            rows = int(await connection.fetchval(COUNT_MERGEABLE, MERGE_AGE_S))
            if rows > 1:
                await connection.execute(MERGE_ROWS, MERGE_AGE_S, MERGE_ROWS_MAX, SEQUENCE_BITS)
        return rows

    async def ensure_day(self, day: date) -> None:
        """Make the partition of `day` where it is missing."""
        async with transaction(self._pool) as connection:
            await connection.execute("SELECT ensure_telemetry_day($1)", day)


def _epoch_range(epoch: int) -> tuple[int, int]:
    return epoch << SEQUENCE_BITS, (epoch + 1) << SEQUENCE_BITS
