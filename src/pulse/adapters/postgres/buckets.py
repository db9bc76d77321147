"""Buckets of one device, from rollups where that gives what the rows would (domain/rollup.py)."""

from __future__ import annotations

from datetime import datetime, timedelta

import asyncpg
import msgspec

from pulse.adapters.postgres.pool import Connection
from pulse.domain.ledger import PositionSet
from pulse.domain.query import Aggregate, BucketQuery
from pulse.domain.rollup import HOUR_US, Kept, Series, microseconds, plan_spans
from pulse.domain.telemetry import EPOCH

# What a value of any series adds to its bucket: the same columns for a row, a minute and an hour. $5 to $10 are the
# spans of hours, minutes and rows; $11 and $12 say once more, for the planner, where all spans of rows lie.
ROLLED_UP = """
    SELECT bucket AS at, metric AS name, count, sum, min, max, to_jsonb(last) AS last, last_ts, last_position
    FROM unnest({low}::timestamptz[], {high}::timestamptz[]) AS span (low, high)
    CROSS JOIN LATERAL (
        SELECT * FROM {series}
        WHERE tenant_id = $1 AND device_id = $2 AND bucket >= low AND bucket < high
          AND ($4::text[] IS NULL OR metric = ANY($4))
    ) AS rolled_up
"""
PARTS = f"""
    {ROLLED_UP.format(series="telemetry_hours", low="$5", high="$6")}
    UNION ALL
    {ROLLED_UP.format(series="telemetry_minutes", low="$7", high="$8")}
    UNION ALL
    SELECT ts, name, 1, number, number, number, value, ts, position
    FROM unnest($9::timestamptz[], $10::timestamptz[]) AS span (low, high)
    CROSS JOIN LATERAL (
        SELECT ts, position, metrics FROM telemetry
        WHERE tenant_id = $1 AND device_id = $2 AND ts >= low AND ts < high AND ts >= $11 AND ts < $12
          AND ($4::text[] IS NULL OR metrics ?| $4)
    ) AS readings
    CROSS JOIN LATERAL jsonb_each(metrics) AS metric (name, value)
    CROSS JOIN LATERAL (SELECT CASE WHEN jsonb_typeof(value) = 'number' THEN value::numeric END AS number) AS as_number
    WHERE $4::text[] IS NULL OR name = ANY($4)
"""  # noqa: S608 - constants
SELECT_BUCKETS = {
    aggregate: f"""
        SELECT date_bin($3::interval, at, '1970-01-01T00:00:00Z') AS bucket, name, to_jsonb({expression}) AS value
        FROM ({PARTS}) AS parts {condition} GROUP BY 1, 2 ORDER BY 1, 2 LIMIT $13
    """  # noqa: S608 - constants
    for aggregate, expression, condition in (
        (Aggregate.COUNT, "sum(count)::bigint", ""),
        (Aggregate.LAST, "(array_agg(last ORDER BY last_ts DESC, last_position DESC))[1]", ""),
        (Aggregate.AVG, "(sum(sum) / sum(count))::float8", "WHERE sum IS NOT NULL"),
        (Aggregate.SUM, "sum(sum)::float8", "WHERE sum IS NOT NULL"),
        (Aggregate.MIN, "min(min)::float8", "WHERE min IS NOT NULL"),
        (Aggregate.MAX, "max(max)::float8", "WHERE max IS NOT NULL"),
    )
}
SELECT_KEPT = """
    SELECT jsonb_object_agg(series, (extract(epoch FROM since) * 1000000)::bigint)::text,
           (SELECT coalesce(range_agg(hours * int4multirange(int4range($1, $2))), '{}')::text
            FROM rollup_pending WHERE hours && int4range($1, $2))
    FROM storage_horizon
"""


async def select_buckets(
    connection: Connection, tenant_id: str, device_id: str, query: BucketQuery, *, values_max: int
) -> list[asyncpg.Record]:
    """(bucket, metric, value as JSON) in the order of both, at most `values_max`."""
    spans = plan_spans(query, await _kept(connection, query))
    first, last = (spans.rows.ranges[0][0], spans.rows.ranges[-1][1]) if spans.rows else (0, 0)
    return await connection.fetch(
        SELECT_BUCKETS[query.aggregate],
        tenant_id,
        device_id,
        timedelta(seconds=query.bucket_s),
        query.metrics,
        *_bounds(spans.hours),
        *_bounds(spans.minutes),
        *_bounds(spans.rows),
        _instant(first),
        _instant(last),
        values_max,
    )


async def _kept(connection: Connection, query: BucketQuery) -> Kept:
    """What there is to read of the range; what is rolled up after this is read from the rows, as was planned."""
    hours = microseconds(query.since) // HOUR_US, -(-microseconds(query.until) // HOUR_US)
    since, pending = await connection.fetchrow(SELECT_KEPT, *hours) or ("{}", "{}")
    return Kept(since_us=msgspec.json.decode(since, type=dict[Series, int]), pending_hours=PositionSet.parse(pending))


def _bounds(spans: PositionSet) -> tuple[list[datetime], list[datetime]]:
    """The ends of `spans` (µs since the epoch) as two columns."""
    return [_instant(low) for low, _ in spans.ranges], [_instant(high) for _, high in spans.ranges]


def _instant(at_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=at_us)
