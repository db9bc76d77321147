"""The composition root: the only place that knows which adapter stands behind which service.

    role          services, sinks first
    gateway       group commit ◄─ gateway (HTTP), registry mirror
    ingest        ingest (pulls from JetStream, writes to PostgreSQL)
    maintenance   maintenance (partitions, ledger, epochs, registry, count of dead letters)
    ui            control API (HTTP), wiring/ui.py
    rescue        rescue (pulls from DEAD_LETTERS, writes to PostgreSQL), wiring/rescue.py

`serve` runs any set of roles in one process, on one connection to NATS and one pool to PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from pulse.adapters.nats import connection as nats_connection
from pulse.adapters.nats.audit import AuditReader
from pulse.adapters.nats.committer import GroupCommitter
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.nats.registry_feed import RegistryFeed
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.pool import Pool, open_pool
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.adapters.postgres.watch import DatabaseWatch
from pulse.api.bodies import BodyBounds
from pulse.api.device import DeviceApi
from pulse.domain.limits import Rate, RateLimits, parse_overrides
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.runtime.faults import probe_for
from pulse.runtime.health import Check, Dependency, HealthServer, NotStopping, health_app
from pulse.runtime.http import UvicornService
from pulse.runtime.lifecycle import Service, run_services, stop_on_signals
from pulse.runtime.metrics import GatewayMetrics, IngestMetrics, PublishMetrics, RegistryMetrics, process_registry
from pulse.runtime.settings import Settings
from pulse.services.audit import Auditor
from pulse.services.gateway import Gateway
from pulse.services.ingest import IngestWorker
from pulse.services.registry import DeviceRegistry, RegistryMirror
from pulse.wiring.commands import open_auditor, open_dead_letters
from pulse.wiring.maintenance import maintenance_service
from pulse.wiring.registry_check import RegistryCheck
from pulse.wiring.rescue import rescue_service
from pulse.wiring.streams import INGEST_WORKERS, TELEMETRY, state_of
from pulse.wiring.ui import control_service

__all__ = ["INGEST_WORKERS", "TELEMETRY", "Role", "open_auditor", "open_dead_letters", "serve"]

log = structlog.get_logger()

NATS_WAIT_S_MAX = 60.0
"""How long a starting process waits for NATS before it says so and ends, to be started again."""
BATCH_BYTES_MAX = 8 * 1024 * 1024
"""What one pull may bring; two pulls overlap, and three batches are in hand: all of it stays below 150 MB."""


class Role(StrEnum):
    """What `pulse serve` can run."""

    GATEWAY = "gateway"
    INGEST = "ingest"
    MAINTENANCE = "maintenance"
    UI = "ui"
    RESCUE = "rescue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What the roles of one process share, and what they add to it."""

    settings: Settings
    nats: PulseClient
    pool: Pool
    metrics: CollectorRegistry
    probe: Callable[[str], None]
    stack: AsyncExitStack
    checks: list[Check] = field(default_factory=list)

    def decoder(self) -> PayloadDecoder:
        """The payload rules of the settings."""
        return PayloadDecoder(msgspec.convert(self.settings, Bounds, from_attributes=True))


async def serve(settings: Settings, roles: Sequence[Role]) -> None:
    """Run `roles` until SIGTERM or SIGINT, then drain.

    Raises Outage where NATS cannot be reached within NATS_WAIT_S_MAX, ConfigurationError for what an operator has to
    mend, and whatever ended a service that had a bug.
    """
    title = "+".join(roles)
    metrics = process_registry(role=title)
    postgresql = Dependency("postgresql")
    nats = Dependency("nats")
    async with AsyncExitStack() as stack:
        client = await _connect(settings, title, nats, stack)
        stop = stack.enter_context(stop_on_signals())
        pool = await stack.enter_async_context(
            open_pool(
                settings.database_url,
                size_max=settings.ingest_writers + 2 + (settings.ui_database_connections if Role.UI in roles else 0),
                timeout_s=settings.database_timeout_s,
                application_name=f"pulse {title}",
            )
        )
        process = Process(
            settings=settings,
            nats=client,
            pool=pool,
            metrics=metrics,
            probe=probe_for(settings.crash_at),
            stack=stack,
            checks=[NotStopping(stop), nats],
        )
        health = HealthServer(
            host=settings.health_host, port=settings.health_port, checks=process.checks, registry=metrics
        )
        health.bind()
        services: list[Service] = [health]
        if set(roles) - {Role.GATEWAY}:
            process.checks.append(postgresql)
            services.append(DatabaseWatch(pool, up=postgresql.up, down=postgresql.down))
        for role in Role:
            if role in roles:
                services.extend(await _BUILD[role](process))
        log.info("started", roles=title)
        await run_services(services, stop=stop, drain_s_max=settings.drain_s_max)


async def _connect(settings: Settings, title: str, check: Dependency, stack: AsyncExitStack) -> PulseClient:
    async def up() -> None:
        check.up()

    async def down() -> None:
        check.down("the connection to NATS is lost")

    client = await nats_connection.connect(
        settings.nats_url,
        name=f"pulse {title}",
        wait_s=NATS_WAIT_S_MAX,
        on_reconnect=up,
        on_disconnect=down,
    )
    stack.push_async_callback(nats_connection.close, client, drain_s_max=1.0)
    check.up()
    return client


async def _gateway(process: Process) -> list[Service]:
    settings = process.settings
    registry = DeviceRegistry()
    process.checks.append(RegistryCheck(registry))
    RegistryMetrics(process.metrics).watch(lambda: registry.size)
    committer = GroupCommitter(
        process.nats,
        streams={"telemetry": TELEMETRY},
        metrics=PublishMetrics(process.metrics),
        pending_max=settings.publish_pending_max,
        timeout_s=settings.publish_timeout_s,
        drain_s_max=settings.drain_s_max,
    )
    app = DeviceApi(
        gateway=Gateway(
            publisher=committer,
            registry=registry,
            decoder=process.decoder(),
            limits=RateLimits(
                device=Rate(settings.device_messages_per_s, settings.device_messages_burst),
                tenant=Rate(settings.tenant_messages_per_s, settings.tenant_messages_burst),
                overrides=parse_overrides(settings.tenant_messages_overrides),
            ),
        ),
        metrics=GatewayMetrics(process.metrics),
        durability=await _durability(process.nats),
        bounds=msgspec.convert(settings, BodyBounds, from_attributes=True),
        other=health_app(checks=process.checks, registry=process.metrics),
    )
    http = UvicornService(
        name="gateway",
        app=app,
        host=settings.gateway_host,
        port=settings.gateway_port,
        setting="gateway",
        connections_max=settings.gateway_connections_max,
        keep_alive_s=settings.gateway_keep_alive_s,
        request_s_max=settings.gateway_request_s_max,
    )
    http.bind()
    return [committer, RegistryMirror(feed=RegistryFeed(process.nats), registry=registry), http]


async def _durability(client: PulseClient) -> str:
    """What a PubAck of TELEMETRY is worth, as the stream was when this process started."""
    return "replicated" if (await stream_state(client, TELEMETRY)).replicas > 1 else "disk"


async def _ingest(process: Process) -> list[Service]:
    settings = process.settings

    async def created_ns() -> int:
        return (await state_of(process.nats, TELEMETRY)).created_ns

    source = await process.stack.enter_async_context(
        PullConsumer(
            process.nats,
            stream=TELEMETRY,
            consumer=INGEST_WORKERS,
            created_ns=created_ns,
            batch_max=settings.ingest_batch_max,
            batch_bytes_max=BATCH_BYTES_MAX,
            linger_s=settings.ingest_linger_s_max,
        )
    )
    worker = IngestWorker(
        source=source,
        store=TelemetryStore(process.pool, stream=TELEMETRY, probe=process.probe),
        decoder=process.decoder(),
        metrics=IngestMetrics(process.metrics),
        writers=settings.ingest_writers,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
    )
    return [worker]


async def _maintenance(process: Process) -> list[Service]:
    return [
        maintenance_service(settings=process.settings, nats=process.nats, pool=process.pool, metrics=process.metrics)
    ]


async def _ui(process: Process) -> list[Service]:
    auditor = Auditor(
        streams=AuditReader(process.nats, consumer_of={TELEMETRY: INGEST_WORKERS}), ledger=LedgerReader(process.pool)
    )
    other = health_app(checks=process.checks, registry=process.metrics)
    service = control_service(
        settings=process.settings, nats=process.nats, pool=process.pool, auditor=auditor, other=other
    )
    return [service]


async def _rescue(process: Process) -> list[Service]:
    service = rescue_service(
        settings=process.settings,
        nats=process.nats,
        pool=process.pool,
        decoder=process.decoder(),
        metrics=process.metrics,
        probe=process.probe,
    )
    return [service]


_BUILD = {
    Role.GATEWAY: _gateway,
    Role.INGEST: _ingest,
    Role.MAINTENANCE: _maintenance,
    Role.UI: _ui,
    Role.RESCUE: _rescue,
}
