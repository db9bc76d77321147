"""Adds settled rows to the rollups, each once: the note that a batch is still to be added goes in the same transaction.

Rows are never changed, so what is new is added to what is there, whatever its ts: yesterday's backlog costs as much as
today's messages. A batch is found again by its positions, through an index that knows them by the megabyte. A kill at
any moment leaves the note and the rollups as they were. One process adds at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta

from pulse.adapters.postgres.pool import Connection, Pool, transaction
from pulse.domain.ledger import PositionSet
from pulse.domain.telemetry import EPOCH

STORAGE_LOCK_KEY = 0x50554C5346
"""Of pg_try_advisory_xact_lock: who holds it changes rollups, or drops what they are made of."""
TRY_STORAGE_LOCK = "SELECT pg_try_advisory_xact_lock($1)"

ENTRIES_MAX = 1000
POSITIONS_MAX = 200_000
"""Of one transaction: one to seven seconds of work, the more the fewer rows a minute of a device has."""
ADD_S_MAX = 300.0
GAP_MAX = 50_000
"""Positions between two batches of a transaction that are rather read over than looked up apart."""

# Without a day of telemetry that it could be in, an hour has no rows: that bounds what is not known.
TAKE_PENDING = """
    WITH chosen AS (
        SELECT id, sum(size) OVER (ORDER BY id) - size AS before
        FROM (SELECT id, positions FROM rollup_pending ORDER BY id LIMIT $1) AS oldest
        CROSS JOIN LATERAL (
            SELECT sum(upper(part) - lower(part)) AS size FROM unnest(positions) AS part
        ) AS counted
    ), taken AS (
        DELETE FROM rollup_pending WHERE id IN (SELECT id FROM chosen WHERE before < $2) RETURNING positions, hours
    ), hulls AS (
        SELECT range_agg(int8range(lower(part), upper(part) + $3)) AS wide FROM taken, unnest(positions) AS part
    ), days AS (
        SELECT range_agg(int4range(first, first + 24)) AS hours
        FROM (SELECT (day - date '1970-01-01') * 24 AS first FROM telemetry_days()) AS there
    )
    SELECT count(*), range_agg(taken.positions)::text,
           (SELECT array_agg(lower(hull)) FROM hulls, unnest(wide) AS hull),
           (SELECT array_agg(upper(hull) - $3) FROM hulls, unnest(wide) AS hull),
           coalesce((range_agg(taken.hours) * (SELECT hours FROM days))::text, '{}')
    FROM taken
"""
# The planner has no word yet of what was appended last: it takes half a million rows for a few hundred, and would sort
# them to group them, or read all of their day.
PLAN = """
    SELECT set_config('enable_seqscan', 'off', true), set_config('enable_sort', 'off', true),
           set_config('work_mem', '64MB', true)
"""
ADD_TO_ROLLUPS = """
    WITH added AS MATERIALIZED (
        SELECT tenant_id, device_id, name AS metric, date_bin('1 minute', ts, '1970-01-01T00:00Z') AS bucket,
               count(*), sum(value::numeric), min(value::numeric), max(value::numeric),
               max(ARRAY[extract(epoch FROM ts), position, value::numeric]) AS newest
        FROM unnest($1::bigint[], $2::bigint[]) AS hull (low, high)
        CROSS JOIN LATERAL (
            SELECT tenant_id, device_id, ts, position, metrics FROM telemetry
            WHERE position >= low AND position < high AND $3::text::int8multirange @> position AND ts >= $4 AND ts < $5
        ) AS settled
        CROSS JOIN LATERAL jsonb_each(metrics) AS said (name, value)
        WHERE jsonb_typeof(value) = 'number'
        GROUP BY 1, 2, 3, 4
    ), minutes AS (
        INSERT INTO telemetry_minutes AS known
        SELECT tenant_id, device_id, metric, bucket, count, sum, min, max, newest[3], to_timestamp(newest[1]), newest[2]
        FROM added WHERE bucket >= (SELECT since FROM storage_horizon WHERE series = 'telemetry_minutes')
        ORDER BY tenant_id, device_id, metric, bucket
        {merge}
    )
    INSERT INTO telemetry_hours AS known
    SELECT tenant_id, device_id, metric, hour, count, sum, min, max, newest[3], to_timestamp(newest[1]), newest[2]
    FROM (
        SELECT tenant_id, device_id, metric, date_bin('1 hour', bucket, '1970-01-01T00:00Z') AS hour,
               sum(count) AS count, sum(sum) AS sum, min(min) AS min, max(max) AS max, max(newest) AS newest
        FROM added GROUP BY 1, 2, 3, 4
    ) AS by_hour
    WHERE hour >= (SELECT since FROM storage_horizon WHERE series = 'telemetry_hours')
    ORDER BY tenant_id, device_id, metric, hour
    {merge}
""".format(  # noqa: S608 - a constant
    merge="""
        ON CONFLICT (tenant_id, device_id, metric, bucket) DO UPDATE SET
            count = known.count + excluded.count,
            sum = known.sum + excluded.sum,
            min = least(known.min, excluded.min),
            max = greatest(known.max, excluded.max),
            last = CASE WHEN {later} THEN excluded.last ELSE known.last END,
            last_ts = CASE WHEN {later} THEN excluded.last_ts ELSE known.last_ts END,
            last_position = CASE WHEN {later} THEN excluded.last_position ELSE known.last_position END
    """.format(later="(excluded.last_ts, excluded.last_position) > (known.last_ts, known.last_position)")
)
ENSURE_MINUTES = """
    SELECT ensure_minutes_of(day) FROM unnest($1::date[]) AS day
    WHERE day >= (SELECT since AT TIME ZONE 'UTC' FROM storage_horizon WHERE series = 'telemetry_minutes')
"""
ENSURE_HOURS = """
    SELECT ensure_hours_of(day) FROM unnest($1::date[]) AS day
    WHERE day >= (SELECT since AT TIME ZONE 'UTC' FROM storage_horizon WHERE series = 'telemetry_hours')
"""
SUMMARIZE = "SELECT summarize_positions($1, $2)"
COUNT_PENDING = "SELECT count(*) FROM rollup_pending"


class RollupStore:
    """Keeps the rollups; every call raises Outage where PostgreSQL is away."""

    def __init__(self, pool: Pool, *, probe: Callable[[str], None] = lambda _: None) -> None:
        self._pool = pool
        self._probe = probe

    async def add(self) -> int:
        """Add the oldest of what is pending, in one transaction; returns how many messages that settled.

        0 where nothing is pending, and where another process is at it.
        """
        async with transaction(self._pool) as connection:
            if not await connection.fetchval(TRY_STORAGE_LOCK, STORAGE_LOCK_KEY):
                return 0
            taken, positions, lows, highs, hours_text = await connection.fetchrow(
                TAKE_PENDING, ENTRIES_MAX, POSITIONS_MAX, GAP_MAX
            ) or (0, "{}", [], [], "{}")
            if not taken:
                return 0
            self._probe("rollups.taken")
            hours = PositionSet.parse(hours_text)
            if hours:
                await self._add(connection, positions, lows, highs, hours)
            self._probe("rollups.added")
        self._probe("rollups.committed")
        if hours:
            async with transaction(self._pool) as connection:
                await connection.execute(SUMMARIZE, *_days(hours))
        return len(PositionSet.parse(positions))

    async def pending(self) -> int:
        """Batches that are settled and not yet in the rollups."""
        async with transaction(self._pool) as connection:
            return int(await connection.fetchval(COUNT_PENDING))

    async def _add(
        self, connection: Connection, positions: str, lows: Sequence[int], highs: Sequence[int], hours: PositionSet
    ) -> None:
        days = sorted({_day(hour) for low, high in hours.ranges for hour in (*range(low, high, 24), high - 1)})
        await connection.execute(ENSURE_MINUTES, days)
        await connection.execute(ENSURE_HOURS, days)
        await connection.execute(PLAN)
        since, until = _instant(hours.ranges[0][0]), _instant(hours.ranges[-1][1])
        await connection.execute(ADD_TO_ROLLUPS, lows, highs, positions, since, until, timeout=ADD_S_MAX)


def _instant(hour: int) -> datetime:
    return EPOCH + timedelta(hours=hour)


def _day(hour: int) -> date:
    return _instant(hour).date()


def _days(hours: PositionSet) -> tuple[date, date]:
    """The first day of `hours`, and the one after the last."""
    return _day(hours.ranges[0][0]), _day(hours.ranges[-1][1] - 1) + timedelta(days=1)
