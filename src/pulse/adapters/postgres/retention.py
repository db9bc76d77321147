"""Drops what has had its time: whole partitions, and dead letters one by one.

    telemetry   in two steps. Taking the day out of the table needs a lock that stops readers and writers: it has
                LOCK_S_MAX to get it, and then does nothing that takes time. The rows are counted and dropped
                afterwards, when nobody but us can see them; a kill in between leaves them to the next turn.
    chunks      (TimescaleDB) need no lock on the table: counted and dropped in one step, with the chunk locked.
    rollups     in one step; only rollups themselves write there, and they wait for us.

A day that rollups do not wholly contain is kept until they do. Who holds the lock of `rollups` drops; others do not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime

import asyncpg

from pulse.adapters.postgres.command_sweep import drop_commands
from pulse.adapters.postgres.pool import Connection, Pool, transaction
from pulse.adapters.postgres.rollups import STORAGE_LOCK_KEY, TRY_STORAGE_LOCK
from pulse.domain.ledger import SEQUENCE_BITS
from pulse.domain.retention import Dropped, Partition
from pulse.domain.rollup import Series

LOCK_S_MAX = 0.1
"""How long ingest may have to wait for us; what is not had by then is tried again at the next turn."""
COUNT_S_MAX = 3600.0
LETTERS_AT_ONCE = 1000

LIMIT_LOCK = "SELECT set_config('lock_timeout', $1, true)"
SELECT_DAYS = "SELECT relation::text, day, day + 1 FROM telemetry_days() WHERE day < $1 ORDER BY day"
SELECT_PARTITIONS = """
    SELECT relation::text, low, high FROM (
        SELECT inhrelid::regclass AS relation, to_date(right(relname, $3), left('YYYYMMDD', $3)) AS low
        FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid WHERE inhparent = $1::text::regclass
    ) AS partitions
    CROSS JOIN LATERAL (SELECT (low + $4::text::interval)::date AS high) AS its
    WHERE high <= $2 ORDER BY low
"""
NAMED_BY = {Series.MINUTES: (8, "1 day"), Series.HOURS: (6, "1 month")}
"""Digits at the end of a partition's name, and how long it is."""
IS_PENDING = """
    SELECT EXISTS (
        SELECT FROM rollup_pending
        WHERE hours && int4range(($1::date - date '1970-01-01') * 24, ($2::date - date '1970-01-01') * 24)
    )
"""
RAISE_HORIZON = "UPDATE storage_horizon SET since = greatest(since, $2) WHERE series = $1"
RETIRE = "SELECT retire_telemetry_day($1, $2::text::regclass)::text"
IS_HYPERTABLE = "SELECT telemetry_is_hypertable()"
SELECT_RETIRED = """
    SELECT inhrelid::regclass::text, to_date(split_part(relname, '_', 3), 'YYYYMMDD')
    FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
    WHERE inhparent = 'telemetry_retired'::regclass ORDER BY 2
"""
SIZE = "SELECT pg_total_relation_size($1::text::regclass)"
COUNT_ROWS = "SELECT count(*) FROM {relation}"
RECORD_DROP = """
    WITH recorded AS (
        INSERT INTO telemetry_dropped (day, epoch, rows)
        SELECT $1, position >> $2, count(*) FROM {relation} GROUP BY 2 RETURNING rows
    )
    SELECT coalesce(sum(rows), 0)::bigint FROM recorded
"""
DROP_DAY = "SELECT drop_telemetry_day($1, $2::text::regclass)"
DROP_TABLE = "DROP TABLE {relation}"
DELETE_LETTERS = """
    WITH gone AS (
        DELETE FROM dead_letters
        WHERE id IN (SELECT id FROM dead_letters WHERE died_at < $1 ORDER BY died_at LIMIT $2 FOR UPDATE SKIP LOCKED)
        RETURNING octet_length(body) + octet_length(headers) AS bytes
    )
    SELECT count(*), coalesce(sum(bytes), 0)::bigint FROM gone
"""


class RetentionStore:
    """Drops partitions and dead letters; every call raises Outage where PostgreSQL is away."""

    def __init__(self, pool: Pool, *, probe: Callable[[str], None] = lambda _: None) -> None:
        self._pool = pool
        self._probe = probe

    async def expired(self, series: Series, before: date) -> list[Partition]:
        """The partitions of `series` that end with `before` or earlier, oldest first."""
        async with transaction(self._pool) as connection:
            if series is Series.ROWS:
                rows = await connection.fetch(SELECT_DAYS, before)
            else:
                rows = await connection.fetch(SELECT_PARTITIONS, series.value, before, *NAMED_BY[series])
        return [Partition(series, *row) for row in rows]

    async def drop(self, partition: Partition) -> Dropped | None:
        """Drop `partition`, or take a day out of telemetry, to be dropped by `drop_retired`.

        None where that is all, and where it cannot be now: somebody works with it, or rollups do not contain it yet.
        """
        try:
            async with self._exclusive() as connection:
                since = datetime.combine(partition.high, datetime.min.time(), UTC)
                drop = self._retire if partition.series is Series.ROWS else self._drop_rollups
                dropped = await drop(connection, partition)
                await connection.execute(RAISE_HORIZON, partition.series.value, since)
                self._probe("retention.taken_out")
                return dropped
        except (_NotNow, asyncpg.UndefinedTableError):
            return None

    async def drop_retired(self) -> list[Dropped]:
        """Count and drop the days that were taken out of telemetry, by whomever."""
        async with transaction(self._pool) as connection:
            retired = await connection.fetch(SELECT_RETIRED)
        dropped = []
        for relation, day in retired:
            try:
                async with self._exclusive() as connection:
                    dropped.append(await self._drop_day(connection, relation, day))
            except (_NotNow, asyncpg.UndefinedTableError):
                continue
        return dropped

    async def drop_dead_letters(self, before: date) -> Dropped | None:
        """Delete some of the dead letters that died before that day; None where there are none."""
        since = datetime.combine(before, datetime.min.time(), UTC)
        async with transaction(self._pool) as connection:
            rows, size = await connection.fetchrow(DELETE_LETTERS, since, LETTERS_AT_ONCE) or (0, 0)
        return Dropped(series="dead_letters", relation="dead_letters", rows=rows, bytes=size) if rows else None

    async def drop_commands(self, before: date) -> Dropped | None:
        """Delete some of the commands that ended before that day; None where there are none."""
        return await drop_commands(self._pool, before)

    async def _retire(self, connection: Connection, partition: Partition) -> Dropped | None:
        retired = await connection.fetchval(RETIRE, partition.low, partition.relation)
        # Asked under the lock: what was settled until now is in rollup_pending, and nobody settles more into this day.
        if await connection.fetchval(IS_PENDING, partition.low, partition.high):
            raise _NotNow
        if await connection.fetchval(IS_HYPERTABLE):
            return await self._drop_day(connection, retired, partition.low)
        return None

    async def _drop_day(self, connection: Connection, relation: str, day: date) -> Dropped:
        size = await connection.fetchval(SIZE, relation)
        record = RECORD_DROP.format(relation=relation)
        rows = await connection.fetchval(record, day, SEQUENCE_BITS, timeout=COUNT_S_MAX)
        await connection.execute(DROP_DAY, day, relation)
        self._probe("retention.dropped")
        return Dropped(series=Series.ROWS, relation=f"{Series.ROWS}_{day:%Y%m%d}", rows=rows, bytes=size)

    async def _drop_rollups(self, connection: Connection, partition: Partition) -> Dropped | None:
        relation = partition.relation
        size = await connection.fetchval(SIZE, relation)
        rows = await connection.fetchval(COUNT_ROWS.format(relation=relation), timeout=COUNT_S_MAX)
        await connection.execute(DROP_TABLE.format(relation=relation))
        return Dropped(series=partition.series, relation=relation, rows=rows, bytes=size)

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[Connection]:
        """A transaction with the lock of `rollups` and little patience for others. Raises _NotNow, rolled back."""
        async with transaction(self._pool) as connection:
            await connection.execute(LIMIT_LOCK, f"{LOCK_S_MAX * 1000:.0f}ms")
            if not await connection.fetchval(TRY_STORAGE_LOCK, STORAGE_LOCK_KEY):
                raise _NotNow
            try:
                yield connection
            except asyncpg.LockNotAvailableError as error:
                raise _NotNow from error


class _NotNow(Exception):
    """Somebody else is at it."""
