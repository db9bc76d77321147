"""Reading telemetry: pages of rows, buckets of time, and the newest row of a device.

Each page is a transaction of its own, so that a slow reader of a long answer holds none. A statement that takes longer
than `statement_s_max` is told as a question that is too large, not as an outage.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import msgspec

from pulse.adapters.postgres.buckets import select_buckets
from pulse.adapters.postgres.pool import Connection, Database, transaction
from pulse.domain.errors import Reason, Refusal
from pulse.domain.presence import PresenceAfter
from pulse.domain.query import Bucket, BucketQuery, Latest, LatestValue, Query, StoredReading
from pulse.domain.telemetry import EPOCH

VALUES_MAX = 100_000
"""Of one answer in buckets: buckets times metrics."""

LIMIT_STATEMENT = "SELECT set_config('statement_timeout', $1, true)"
# The index has the order already. Left alone, the planner takes `?|` to keep one row of a hundred, and sorts all that
# is left of the range for each page: an export would read its range as often as it has pages.
PREFER_INDEX = "SELECT set_config('enable_sort', 'off', true)"
DEVICE_EXISTS = "SELECT EXISTS (SELECT FROM devices WHERE tenant_id = $1 AND device_id = $2)"

# $6 and $7 are the cursor; its ts stands alone as well, for the index. The null cursor is where the range begins.
SELECT_ROWS = """
    SELECT ts, seq, site_id, position, {metrics} AS metrics
    FROM telemetry
    WHERE tenant_id = $1 AND device_id = $2 AND ts >= $3 AND ts < $4
    AND ts {side}= $6 AND (ts, position) {side} ($6, $7) AND ($8::text[] IS NULL OR metrics ?| $8)
    ORDER BY ts {direction}, position {direction} LIMIT $5
"""
CHOSEN = """CASE WHEN $8::text[] IS NULL THEN metrics ELSE
        (SELECT jsonb_object_agg(key, value) FROM jsonb_each(metrics) WHERE key = ANY($8)) END"""
SELECT_ASCENDING = SELECT_ROWS.format(metrics=CHOSEN, side=">", direction="ASC")
SELECT_DESCENDING = SELECT_ROWS.format(metrics=CHOSEN, side="<", direction="DESC")

SELECT_LATEST = """
    SELECT device_state.last_seen, extract(epoch FROM now() - last_seen)::float8 AS silent_s, latest, newest.*
    FROM devices
    LEFT JOIN device_state USING (tenant_id, device_id)
    LEFT JOIN LATERAL (
        SELECT ts, seq, site_id, position, metrics FROM telemetry
        WHERE tenant_id = devices.tenant_id AND device_id = devices.device_id
        ORDER BY ts DESC, position DESC LIMIT 1
    ) AS newest ON true
    WHERE tenant_id = $1 AND device_id = $2
"""

_latest_decoder = msgspec.json.Decoder(dict[str, tuple[msgspec.Raw, int, int]])


class TelemetryReader:
    """Reads one device's telemetry. Raises Outage, and Refusal NOT_FOUND for a device that is not there."""

    def __init__(self, database: Database, *, statement_s_max: float, presence_after: PresenceAfter) -> None:
        self._database = database
        self._presence_after = presence_after
        self._statement_s_max = statement_s_max

    async def rows(self, tenant_id: str, device_id: str, query: Query) -> list[StoredReading]:
        """At most `query.limit` rows, in the order of (ts, position)."""
        if query.descending:
            statement, start = SELECT_DESCENDING, (query.until, 2**63 - 1)
        else:
            statement, start = SELECT_ASCENDING, (query.since, -1)
        if query.cursor is not None:
            start = (EPOCH + timedelta(microseconds=query.cursor.ts_us), query.cursor.position)
        async with self._reading() as connection:
            await connection.execute(PREFER_INDEX)
            rows = await connection.fetch(
                statement, tenant_id, device_id, query.since, query.until, query.limit, *start, query.metrics
            )
            if not rows:
                await _check_device(connection, tenant_id, device_id)
        return [_reading(row) for row in rows]

    async def buckets(self, tenant_id: str, device_id: str, query: BucketQuery) -> list[Bucket]:
        """The buckets that have a value, in the order of time. Refusal where they have more than VALUES_MAX in all."""
        async with self._reading() as connection:
            rows = await select_buckets(connection, tenant_id, device_id, query, values_max=VALUES_MAX + 1)
            if not rows:
                await _check_device(connection, tenant_id, device_id)
        if len(rows) > VALUES_MAX:
            message = f"more than {VALUES_MAX} values: fewer metrics, a longer bucket, or a shorter range"
            raise Refusal(Reason.INVALID_REQUEST, message, field="bucket")
        found: dict[object, Bucket] = {}
        for bucket, name, value in rows:
            found.setdefault(bucket, Bucket(ts=bucket, metrics={})).metrics[name] = msgspec.Raw(value.encode())
        return list(found.values())

    async def latest(self, tenant_id: str, device_id: str) -> Latest:
        """When the device was last heard of, its latest values, and its newest row."""
        async with self._reading() as connection:
            row = await connection.fetchrow(SELECT_LATEST, tenant_id, device_id)
        if row is None:
            raise _no_device(tenant_id, device_id)
        return Latest(
            last_seen=row["last_seen"],
            presence=self._presence_after.of(row["silent_s"]),
            metrics={} if row["latest"] is None else _latest(row["latest"]),
            reading=None if row["ts"] is None else _reading(row),
        )

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[Connection]:
        async with transaction(self._database) as connection:
            await connection.execute(LIMIT_STATEMENT, f"{self._statement_s_max * 1000:.0f}ms")
            try:
                yield connection
            except asyncpg.QueryCanceledError as error:
                message = f"took longer than {self._statement_s_max:g} s: ask for a shorter range"
                raise Refusal(Reason.INVALID_REQUEST, message, field="from") from error
            except asyncpg.NumericValueOutOfRangeError as error:
                message = "the result is outside the range of a double"
                raise Refusal(Reason.INVALID_REQUEST, message, field="aggregate") from error


async def _check_device(connection: Connection, tenant_id: str, device_id: str) -> None:
    if not await connection.fetchval(DEVICE_EXISTS, tenant_id, device_id):
        raise _no_device(tenant_id, device_id)


def _no_device(tenant_id: str, device_id: str) -> Refusal:
    return Refusal(Reason.NOT_FOUND, f"tenant {tenant_id!r} has no device {device_id!r}", field="device_id")


def _latest(text: str) -> dict[str, LatestValue]:
    values = _latest_decoder.decode(text)
    return {
        name: LatestValue(ts=EPOCH + timedelta(microseconds=ts_us), value=value)
        for name, (value, ts_us, _) in values.items()
    }


def _reading(row: asyncpg.Record) -> StoredReading:
    return StoredReading(
        ts=row["ts"],
        seq=row["seq"],
        site_id=row["site_id"],
        metrics=msgspec.Raw(row["metrics"].encode()),
        position=row["position"],
    )
