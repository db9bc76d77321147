"""What the registry should hold, read from PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

import asyncpg

from pulse.adapters.postgres.pool import Pool, transaction
from pulse.adapters.postgres.route_rows import ROUTE_COLUMNS, route_of, with_headers
from pulse.adapters.postgres.tenant_limits import LIMIT_COLUMNS, limits_of
from pulse.domain.identity import Device, Tenant, TokenDigest
from pulse.domain.registry import Record, record_key, split_key, split_route_key
from pulse.domain.route import Route

TENANT_COLUMNS = f"tenant_id, enabled, {LIMIT_COLUMNS}"
REGISTRY_TENANTS = f"SELECT {TENANT_COLUMNS} FROM tenants WHERE tenant_id = ANY($1::text[])"  # noqa: S608 - constants
REGISTRY_TENANT_PAGE = f"""
    SELECT {TENANT_COLUMNS} FROM tenants WHERE tenant_id > $1 ORDER BY tenant_id LIMIT $2
"""  # noqa: S608
REGISTRY_DEVICES_OF = """
    SELECT device.tenant_id, device.device_id, device.enabled, token.digests, token.ends_ms
    FROM ({devices}) AS device
    CROSS JOIN LATERAL (
        SELECT array_agg(digest ORDER BY digest) AS digests,
               array_agg(floor(extract(epoch FROM expires_at) * 1000)::bigint ORDER BY digest) AS ends_ms
        FROM device_tokens
        WHERE tenant_id = device.tenant_id AND device_id = device.device_id
          AND (expires_at IS NULL OR expires_at > now())
    ) AS token
    ORDER BY device.tenant_id, device.device_id
"""
REGISTRY_DEVICES = REGISTRY_DEVICES_OF.format(
    devices="""
        SELECT tenant_id, device_id, enabled
        FROM devices JOIN unnest($1::text[], $2::text[]) AS wanted (tenant_id, device_id) USING (tenant_id, device_id)
    """
)
REGISTRY_DEVICE_PAGE = REGISTRY_DEVICES_OF.format(
    devices="""
        SELECT tenant_id, device_id, enabled FROM devices
        WHERE (tenant_id, device_id) > ($1, $2) ORDER BY tenant_id, device_id LIMIT $3
    """
)
REGISTRY_ROUTES = f"""
    SELECT {ROUTE_COLUMNS}
    FROM routes AS route JOIN unnest($1::text[], $2::text[]) AS wanted (tenant_id, route_id) USING (tenant_id, route_id)
"""  # noqa: S608 - constants
REGISTRY_ROUTE_PAGE = f"""
    SELECT {ROUTE_COLUMNS} FROM routes AS route
    WHERE (tenant_id, route_id) > ($1, $2) ORDER BY tenant_id, route_id LIMIT $3
"""  # noqa: S608 - constants


class RegistryTruth:
    """Tenants, devices and routes as the edge should know them; satisfies `services.reconcile.Truth`.

    Tokens that have expired are left out. Raises Outage where PostgreSQL is away.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def load(self, keys: Sequence[str]) -> Mapping[str, Record]:
        """What the registry should hold under `keys`; a key that is absent in the answer should not be there."""
        ids = [ids for ids in map(split_key, keys) if ids is not None]
        tenants = [tenant_id for tenant_id, device_id in ids if device_id is None]
        devices = [(tenant_id, device_id) for tenant_id, device_id in ids if device_id is not None]
        routes = [ids for ids in map(split_route_key, keys) if ids is not None]
        records: list[Record] = []
        async with transaction(self._pool) as connection:
            if tenants:
                records += map(_registry_tenant, await connection.fetch(REGISTRY_TENANTS, tenants))
            if devices:
                columns = [list(column) for column in zip(*devices, strict=True)]
                records += map(_registry_device, await connection.fetch(REGISTRY_DEVICES, *columns))
            if routes:
                columns = [list(column) for column in zip(*routes, strict=True)]
                records += map(_registry_route, await connection.fetch(REGISTRY_ROUTES, *columns))
        return {record_key(record): record for record in records}

    async def pages(self, size: int) -> AsyncGenerator[list[Record], None]:
        """All that the registry should hold, routes and tenants first, in pages of at most `size`.

        Each page is a transaction of its own: what changes meanwhile may be in its old or its new form.
        """
        async with aclosing(self.routes(size)) as pages:
            async for page in pages:
                yield [*page]
        tenant_id = device_id = ""
        while True:
            async with transaction(self._pool) as connection:
                rows = await connection.fetch(REGISTRY_TENANT_PAGE, tenant_id, size)
            if not rows:
                break
            yield [_registry_tenant(row) for row in rows]
            tenant_id = rows[-1]["tenant_id"]
        tenant_id = ""
        while True:
            async with transaction(self._pool) as connection:
                rows = await connection.fetch(REGISTRY_DEVICE_PAGE, tenant_id, device_id, size)
            if not rows:
                return
            yield [_registry_device(row) for row in rows]
            tenant_id, device_id = rows[-1]["tenant_id"], rows[-1]["device_id"]

    async def routes(self, size: int) -> AsyncGenerator[list[Route], None]:
        """All routes, in pages of at most `size`."""
        tenant_id = route_id = ""
        while True:
            async with transaction(self._pool) as connection:
                rows = await connection.fetch(REGISTRY_ROUTE_PAGE, tenant_id, route_id, size)
            if not rows:
                return
            yield [_registry_route(row) for row in rows]
            tenant_id, route_id = rows[-1]["tenant_id"], rows[-1]["route_id"]


def _registry_route(row: asyncpg.Record) -> Route:
    return with_headers(route_of(row), {})


def _registry_tenant(row: asyncpg.Record) -> Tenant:
    return Tenant(row["tenant_id"], row["enabled"], limits_of(row))


def _registry_device(row: asyncpg.Record) -> Device:
    tokens = zip(row["digests"] or (), row["ends_ms"] or (), strict=True)
    return Device(row["tenant_id"], row["device_id"], row["enabled"], tuple(TokenDigest(*token) for token in tokens))
