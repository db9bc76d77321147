"""The last telemetry of a tenant as messages, for dry runs of routes."""

from __future__ import annotations

import asyncpg
import msgspec

from pulse.adapters.postgres.pool import Database, transaction
from pulse.domain.envelope import wrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.route import DeviceFilter
from pulse.domain.routed import RoutedMessage
from pulse.domain.subjects import MessageType

DEVICES_MAX = 100
"""Those that were heard of last: there is no index of a tenant's rows by time, and none is worth its cost."""

LIMIT_STATEMENT = "SELECT set_config('statement_timeout', $1, true)"
SELECT_RECENT = """
    WITH heard AS (
        SELECT tenant_id, device_id, attributes FROM devices JOIN device_state USING (tenant_id, device_id)
        WHERE tenant_id = $1 AND (cardinality($2::text[]) = 0 OR device_id = ANY($2))
        AND starts_with(device_id, $3) AND attributes @> $4::jsonb
        ORDER BY last_seen DESC LIMIT $5
    )
    SELECT heard.device_id, heard.attributes, newest.*
    FROM heard CROSS JOIN LATERAL (
        SELECT ts, seq, site_id, metrics, position FROM telemetry
        WHERE tenant_id = heard.tenant_id AND device_id = heard.device_id
        ORDER BY ts DESC, position DESC LIMIT $6
    ) AS newest
    ORDER BY ts DESC, position DESC LIMIT $6
"""


class RecentMessages:
    """Reads rows back as the messages that they came from, but for their source; satisfies `dry_run.StoredMessages`."""

    def __init__(self, database: Database, *, statement_s_max: float) -> None:
        self._database = database
        self._statement_s_max = statement_s_max

    async def recent(self, tenant_id: str, devices: DeviceFilter, *, limit: int) -> list[RoutedMessage]:
        """The last telemetry, newest first, of the devices that the filter holds for and that were heard of last.

        Raises Outage, and Refusal where it takes too long.
        """
        attributes = msgspec.json.encode(devices.attributes).decode()
        async with transaction(self._database) as connection:
            await connection.execute(LIMIT_STATEMENT, f"{self._statement_s_max * 1000:.0f}ms")
            try:
                rows = await connection.fetch(
                    SELECT_RECENT, tenant_id, list(devices.ids), devices.prefix, attributes, DEVICES_MAX, limit
                )
            except asyncpg.QueryCanceledError as error:
                message = f"took longer than {self._statement_s_max:g} s: ask for fewer messages"
                raise Refusal(Reason.INVALID_REQUEST, message, field="messages") from error
        return [_message(tenant_id, row) for row in rows]


def _message(tenant_id: str, row: asyncpg.Record) -> RoutedMessage:
    given = {name: row[name] for name in ("seq", "site_id") if row[name] is not None}
    payload = {"metrics": msgspec.json.decode(row["metrics"]), "ts": row["ts"].isoformat(), **given}
    ts_ms = int(row["ts"].timestamp() * 1000)
    body = wrap(
        tenant_id=tenant_id,
        device_id=row["device_id"],
        message_type=MessageType.TELEMETRY,
        received_ms=ts_ms,
        source="http",
        payload=msgspec.json.encode(payload),
    )
    return RoutedMessage(
        tenant_id=tenant_id,
        device_id=row["device_id"],
        message_type=MessageType.TELEMETRY,
        source="http",
        ts_ms=ts_ms,
        payload=payload,
        attributes=msgspec.json.decode(row["attributes"]),
        body=body,
        position=row["position"],
    )
