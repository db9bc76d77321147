"""Counting devices, routes and dead letters, and finding devices; for the console. Every call raises Outage."""

from __future__ import annotations

import asyncpg
import msgspec

from pulse.adapters.postgres.identity import DEVICE_COLUMNS
from pulse.adapters.postgres.pool import Database, transaction
from pulse.domain.device_search import DeviceSearch
from pulse.domain.identity import DeviceDetails
from pulse.domain.pipeline import Fleet
from pulse.domain.presence import PresenceAfter

COUNT_FLEET = """
    SELECT count(*) FILTER (WHERE last_seen > now() - make_interval(secs => $1)) AS online,
        count(*) FILTER (WHERE last_seen <= now() - make_interval(secs => $1)
            AND last_seen > now() - make_interval(secs => $2)) AS stale,
        count(*) AS devices,
        (SELECT count(*) FROM (SELECT FROM dead_letters WHERE replays = 0 LIMIT 100000) AS waiting) AS dead_letters,
        (SELECT count(*) FROM routes WHERE enabled) AS routes,
        (SELECT count(*) FROM routes JOIN route_health USING (tenant_id, route_id)
            WHERE enabled AND failing_since IS NOT NULL) AS routes_failing
    FROM devices LEFT JOIN device_state USING (tenant_id, device_id)
"""
# position() and not LIKE: what people type has no wildcards.
SEARCH_DEVICES = f"""
    SELECT {DEVICE_COLUMNS}
    WHERE (tenant_id, device_id) > ($1, $2)
      AND ($3::text IS NULL OR tenant_id = $3)
      AND ($4 = '' OR position(lower($4) IN lower(device_id)) > 0 OR position(lower($4) IN lower(name)) > 0)
      AND ($5::boolean IS NULL OR enabled = $5)
      AND ($6::text IS NULL OR $6 = CASE
          WHEN last_seen > now() - make_interval(secs => $7) THEN 'online'
          WHEN last_seen > now() - make_interval(secs => $8) THEN 'stale' ELSE 'offline' END)
    ORDER BY tenant_id, device_id LIMIT $9
"""


class FleetReader:
    """Reads devices as a whole; satisfies `services.pipeline.FleetCounts` and `services.console.Search`."""

    def __init__(self, database: Database, *, presence_after: PresenceAfter) -> None:
        self._database = database
        self._presence_after = presence_after

    async def fleet(self) -> Fleet:
        """How many devices, enabled routes, and dead letters that wait (a hundred thousand at most)."""
        async with transaction(self._database) as connection:
            row = await connection.fetchrow(COUNT_FLEET, self._presence_after.stale_s, self._presence_after.offline_s)
        assert row is not None
        return Fleet(
            online=row["online"],
            stale=row["stale"],
            offline=row["devices"] - row["online"] - row["stale"],
            dead_letters=row["dead_letters"],
            routes=row["routes"],
            routes_failing=row["routes_failing"],
        )

    async def search(self, wanted: DeviceSearch, *, after: tuple[str, str], limit: int) -> list[DeviceDetails]:
        """A page of those that match, by tenant and id, behind `after`."""
        stale_s, offline_s = self._presence_after.stale_s, self._presence_after.offline_s
        async with transaction(self._database) as connection:
            rows = await connection.fetch(
                SEARCH_DEVICES, *after, wanted.tenant_id, wanted.text, wanted.enabled, wanted.presence, stale_s,
                offline_s, limit,
            )  # fmt: skip
        return [self._device(row) for row in rows]

    def _device(self, row: asyncpg.Record) -> DeviceDetails:
        values = {**row, "attributes": msgspec.json.decode(row["attributes"])}
        return DeviceDetails(presence=self._presence_after.of(values.pop("silent_s")), **values)
