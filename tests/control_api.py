"""The control API in this process, over a real PostgreSQL and a real nats-server.

    async with control_api(database, nats) as api:
        await api.get("/tenants")                        with the operator's key
        await api.get("/tenants/acme", key=api.acme)     with another

There are the tenants acme and other, each with a device `boiler` and keys of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.stream_status import StreamStatusReader
from pulse.adapters.postgres.access import KeyStore
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool, transaction
from pulse.api.control.application import control_app
from pulse.api.control.entrance import App, ControlBounds
from pulse.domain.command_requests import CommandBounds
from pulse.domain.identity import NewDevice
from pulse.domain.ledger import PositionSet
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.query import QueryBounds
from pulse.domain.shadow import ShadowBounds
from pulse.runtime.http import UvicornService
from pulse.runtime.settings import Settings
from pulse.services.control import Control
from pulse.topology.declared import load
from pulse.wiring.cli import auditor_on
from pulse.wiring.routes import AskedTrials, dry_runs_of
from pulse.wiring.ui import RegistryEdge, open_reach_on

BOUNDS = ControlBounds(
    query=QueryBounds(range_s_max=366 * 86_400, rows_max=10_000, buckets_max=1000),
    shadow=ShadowBounds(shadow_bytes_max=8 * 1024, shadow_depth_max=8),
    command=CommandBounds(
        command_payload_bytes_max=8 * 1024,
        command_ttl_s=86_400,
        command_ttl_s_max=30 * 86_400,
        command_timeout_s=300,
        command_timeout_s_max=86_400,
    ),
    body_bytes_max=64 * 1024,
    import_bytes_max=256 * 1024,
    import_rows_max=2000,
    key_requests_max=3,
)
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


async def not_here(scope: Any, receive: Any, send: Any) -> None:
    """Stands for what is not below /api/."""
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b"elsewhere"})


@dataclass(kw_only=True)
class Api:
    """The API, its keys by what they reach, and the database behind it."""

    client: httpx.AsyncClient
    pool: Pool
    nats: PulseClient
    app: App
    operator: str = ""
    acme: str = ""
    acme_reader: str = ""
    other: str = ""
    statuses: list[int] = field(default_factory=list)

    async def call(self, method: str, path: str, *, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.operator if key is None else key}", **options.pop("headers", {})}
        answer = await self.client.request(method, f"/api/v1{path}", headers=headers, **options)
        self.statuses.append(answer.status_code)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json", answer.text
            assert answer.json()["status"] == answer.status_code
        return answer

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: object = None, **options: Any) -> httpx.Response:
        given: dict[str, Any] = {} if body is None else {"json": body}
        return await self.call("POST", path, **given, **options)

    async def patch(self, path: str, body: object, **options: Any) -> httpx.Response:
        return await self.call("PATCH", path, json=body, **options)

    async def store(
        self, rows: Sequence[tuple[datetime, Mapping[str, object]]], *, tenant: str = "acme", device: str = "boiler"
    ) -> None:
        """Write rows of telemetry as a worker would; the positions go on from those that are there."""
        async with transaction(self.pool) as database:
            for day in sorted({ts.date() for ts, _ in rows}):
                await database.execute("SELECT ensure_telemetry_day($1)", day)
            first = await database.fetchval("SELECT coalesce(max(position), 0) + 1 FROM telemetry")
            await database.executemany(
                "INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position) VALUES ($1, $2, $3, $4, $5)",
                [(ts, tenant, device, json.dumps(metrics), first + index) for index, (ts, metrics) in enumerate(rows)],
            )
            await database.execute(
                "INSERT INTO rollup_pending (positions, hours)"
                " VALUES (int8multirange(int8range($1, $2)), $3::text::int4multirange)",
                first, first + len(rows), str(PositionSet.of(int(ts.timestamp()) // 3600 for ts, _ in rows)),
            )  # fmt: skip


@asynccontextmanager
async def control_api(
    database: str, nats: NatsServer, *, pool_url: str | None = None, query_s_max: float = 10.0
) -> AsyncIterator[Api]:
    """The API over fresh servers; `pool_url` is another way to the same database (PgBouncer)."""
    async with open_connection(database, timeout_s=10, application_name="test") as migrating:
        await migrate(migrating, available())
    settings = Settings(query_s_max=query_s_max, secret_keys="k" * 32, webhook_hosts_allowed="hooks.test")
    async with (
        AsyncExitStack() as stack,
        connection(nats.url, name="test", wait_s=10) as client,
        open_pool(pool_url or database, size_max=4, timeout_s=10, application_name="test") as pool,
    ):
        declared = load(stream_replicas=1)
        provisioner = Provisioner(client)
        await provisioner.apply(declared, await provisioner.plan(declared))
        control = Control(
            open_reach=open_reach_on(pool, settings, client),
            edge=RegistryEdge(client, pool),
            auditor=auditor_on(client, pool),
            streams=StreamStatusReader(client, declared),
            dry_runs=stack.enter_context(dry_runs_of(settings)),
            trials=AskedTrials(client),
        )
        app = control_app(control=control, bounds=BOUNDS, other=not_here)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://pulse") as http:
            api = Api(client=http, pool=pool, nats=client, app=app)
            keys, identities = KeyStore(pool), IdentityStore(pool, presence_after=PRESENCE_AFTER)
            for tenant in ("acme", "other"):
                await identities.add_tenant(tenant, name=tenant.title())
                await identities.add_devices(tenant, [NewDevice(device_id="boiler")])
            _, api.operator = await keys.add(name="operator", tenant_id=None)
            _, api.acme = await keys.add(name="acme's", tenant_id="acme")
            _, api.acme_reader = await keys.add(name="acme's reader", tenant_id="acme", read_only=True)
            _, api.other = await keys.add(name="other's", tenant_id="other")
            yield api


@asynccontextmanager
async def served(api: Api) -> AsyncIterator[str]:
    """The API on a port of its own, over real HTTP; yields its base URL."""
    service = UvicornService(name="test", app=api.app, host="127.0.0.1", port=0, setting="ui")
    service.bind()
    stop = asyncio.Event()
    serving = asyncio.create_task(service.run(stop))
    try:
        yield f"http://127.0.0.1:{service.port}/api/v1"
    finally:
        stop.set()
        await serving


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    """The documents of an application/x-ndjson answer."""
    return [msgspec.json.decode(line) for line in answer.content.splitlines()]
