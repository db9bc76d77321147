"""The role `ui`: the control API and the console over PostgreSQL and JetStream.

control API (HTTP) ─► Control ─► Reach: stores on a pool, scoped to the key's tenant
                            └──► Edge: the registry bucket in JetStream
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import SYSTEM
from pulse.adapters.nats.origin import OriginStreams
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.nats.stream_status import StreamStatusReader
from pulse.adapters.postgres.access import ChangeLog, KeyStore
from pulse.adapters.postgres.commands import CommandStore
from pulse.adapters.postgres.dead_letters import DeadLetterStore
from pulse.adapters.postgres.guard import Guard
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.pool import Pool, Scoped, open_pool
from pulse.adapters.postgres.recent_messages import RecentMessages
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.adapters.postgres.routes import RouteStore
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.adapters.postgres.telemetry_query import TelemetryReader
from pulse.api.control.application import control_app
from pulse.api.control.entrance import ControlBounds
from pulse.domain.access import ChangeRecord
from pulse.domain.command_requests import CommandBounds
from pulse.domain.errors import Outage
from pulse.domain.query import QueryBounds
from pulse.domain.shadow import ShadowBounds
from pulse.runtime.health import health_app
from pulse.runtime.http import Application, UvicornService
from pulse.runtime.lifecycle import Service
from pulse.runtime.settings import Settings
from pulse.services.control import Control, OpenReach, Reach
from pulse.services.dead_letters import DeadLetters
from pulse.topology.declared import load
from pulse.wiring.cli import auditor_on
from pulse.wiring.console import by_path, console_on
from pulse.wiring.mqtt_access import mqtt_hooks
from pulse.wiring.process import Process
from pulse.wiring.routes import AskedTrials, dry_runs_of, sealer_of

CONNECT_S_MAX = 2.0
"""How long a connection to PostgreSQL is tried for; a page waits for it."""
EDGE_TIMEOUT_S = 2.0
"""How long a change waits for the edge to be told; the maintenance role does it otherwise."""


class RegistryEdge:
    """The registry at the edge; satisfies `services.control.Edge`."""

    def __init__(self, client: PulseClient, pool: Pool) -> None:
        self._client = client
        self._bucket = RegistryBucket(client, timeout_s=EDGE_TIMEOUT_S)
        self._truth = RegistryTruth(pool)

    async def project(self, keys: Sequence[str]) -> None:
        """Make the entries under these keys what PostgreSQL says; an Outage at once where the connection is lost."""
        if not self._client.is_connected:
            raise Outage(SYSTEM, "the connection to NATS is lost")
        await self._bucket.project(keys, self._truth.load)


def open_reach_on(pool: Pool, settings: Settings, client: PulseClient) -> OpenReach:
    """Stores on `pool`, for one tenant or for all; `client` replays dead letters."""
    origin, sealer = OriginStreams(client), sealer_of(settings)
    presence_after = settings.presence_after()

    def open_reach(tenant_id: str | None, record: ChangeRecord | None) -> Reach:
        database = Scoped(pool=pool, tenant_id=tenant_id, record=record)
        return Reach(
            identities=IdentityStore(database, presence_after=presence_after),
            telemetry=TelemetryReader(database, statement_s_max=settings.query_s_max, presence_after=presence_after),
            shadows=ShadowStore(database, names_max=settings.shadow_names_max),
            commands=CommandStore(database, open_max=settings.command_open_max),
            routes=RouteStore(database, seals=sealer),
            messages=RecentMessages(database, statement_s_max=settings.query_s_max),
            dead_letters=DeadLetters(store=DeadLetterStore(database), publisher=origin),
            changes=ChangeLog(database),
            keys=KeyStore(database),
        )

    return open_reach


async def ui_services(process: Process) -> list[Service]:
    """The HTTP service, with its address taken, and what the console watches.

    What is not below `/api/` is a broker's question, about health, or a page.
    """
    settings, nats, pool = process.settings, process.nats, await _guarded_pool(process)
    open_reach = open_reach_on(pool, settings, nats)
    declared = load(stream_replicas=settings.stream_replicas)
    control = Control(
        open_reach=open_reach,
        edge=RegistryEdge(nats, pool),
        auditor=auditor_on(nats, pool),
        streams=StreamStatusReader(nats, declared),
        dry_runs=process.stack.enter_context(dry_runs_of(settings)),
        trials=AskedTrials(nats),
    )
    bounds = ControlBounds(
        query=QueryBounds(
            range_s_max=settings.query_range_s_max,
            rows_max=settings.query_rows_max,
            buckets_max=settings.query_buckets_max,
        ),
        shadow=msgspec.convert(settings, ShadowBounds, from_attributes=True),
        command=msgspec.convert(settings, CommandBounds, from_attributes=True),
        body_bytes_max=settings.ui_body_bytes_max,
        import_bytes_max=settings.import_bytes_max,
        import_rows_max=settings.import_rows_max,
        key_requests_max=settings.ui_key_requests_max,
    )
    console, pipeline = console_on(
        replace(process, pool=pool), control=control, open_reach=open_reach, query=bounds.query, declared=declared
    )
    other: Application = by_path(console, health_app(checks=process.checks, registry=process.metrics))
    if settings.mqtt_hook_secret:
        other = mqtt_hooks(process, other)
    service = UvicornService(
        name="console and control API",
        app=control_app(control=control, bounds=bounds, other=other),
        host=settings.ui_host,
        port=settings.ui_port,
        setting="ui",
        connections_max=settings.ui_connections_max,
        request_s_max=settings.ui_request_s_max,
    )
    service.bind()
    return [pipeline, service]


async def _guarded_pool(process: Process) -> Pool:
    """A pool of its own: whoever looks at a page waits for no PostgreSQL that is known to be away."""
    settings, guard = process.settings, Guard()
    process.told_of_postgresql.append(guard)
    return await process.stack.enter_async_context(
        open_pool(
            settings.database_url,
            size_max=settings.ui_database_connections,
            timeout_s=settings.database_timeout_s,
            connect_s_max=min(CONNECT_S_MAX, settings.database_timeout_s),
            application_name="pulse ui",
            make=guard.connect,
        )
    )
