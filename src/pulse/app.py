"""The composition root: the only place that knows which adapter stands behind which service.

    role          services, sinks first
    gateway       group commit ◄─ gateway (HTTP), registry mirror
    ingest        ingest (pulls from JetStream, writes to PostgreSQL)
    maintenance   maintenance (partitions, ledger, epochs, registry)

`serve` runs any set of roles in one process, on one connection to NATS and one pool to PostgreSQL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import structlog
from prometheus_client import CollectorRegistry

from pulse.adapters.nats import connection as nats_connection
from pulse.adapters.nats.audit import AuditReader
from pulse.adapters.nats.committer import GroupCommitter
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.nats.registry_feed import RegistryFeed
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.pool import Pool, open_pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.adapters.postgres.watch import DatabaseWatch
from pulse.api.device import DeviceApi
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.runtime.faults import probe_for
from pulse.runtime.health import Check, CheckStatus, Dependency, HealthServer, NotStopping, health_app
from pulse.runtime.http import UvicornService
from pulse.runtime.lifecycle import Service, run_services, stop_on_signals
from pulse.runtime.metrics import GatewayMetrics, IngestMetrics, RegistryMetrics, process_registry
from pulse.runtime.settings import Settings
from pulse.services.audit import Auditor
from pulse.services.gateway import Gateway
from pulse.services.ingest import IngestWorker
from pulse.services.maintenance import Chore, Maintenance
from pulse.services.reconcile import RegistryReconciler
from pulse.services.registry import DeviceRegistry, RegistryMirror

log = structlog.get_logger()

TELEMETRY = "TELEMETRY"
INGEST_WORKERS = "ingest-workers"
NATS_WAIT_S_MAX = 60.0
"""How long a starting process waits for NATS before it says so and ends, to be started again."""
BATCH_BYTES_MAX = 32 * 1024 * 1024
"""What one pull may bring; two such batches and their COPY text stay below the memory of a worker."""


class Role(StrEnum):
    """What `pulse serve` can run."""

    GATEWAY = "gateway"
    INGEST = "ingest"
    MAINTENANCE = "maintenance"


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
        return PayloadDecoder(
            Bounds(
                metric_count_max=self.settings.metric_count_max,
                metric_name_length_max=self.settings.metric_name_length_max,
                metric_string_length_max=self.settings.metric_string_length_max,
                ts_past_s_max=self.settings.ts_past_s_max,
                ts_future_s_max=self.settings.ts_future_s_max,
            )
        )


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
                size_max=settings.ingest_writers + 2,
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
        if {Role.INGEST, Role.MAINTENANCE} & set(roles):
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
        pending_max=settings.publish_pending_max,
        timeout_s=settings.publish_timeout_s,
        drain_s_max=settings.drain_s_max,
    )
    app = DeviceApi(
        gateway=Gateway(publisher=committer, registry=registry, decoder=process.decoder()),
        metrics=GatewayMetrics(process.metrics),
        durability=await _durability(process.nats),
        body_bytes_max=settings.body_bytes_max,
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
    state = await stream_state(client, TELEMETRY)
    return "replicated" if state.replicas > 1 else "disk"


async def _ingest(process: Process) -> list[Service]:
    settings = process.settings

    async def created_ns() -> int:
        return (await stream_state(process.nats, TELEMETRY)).created_ns

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
    settings = process.settings
    ledger = LedgerReader(process.pool)
    reconciler = RegistryReconciler(truth=RegistryTruth(process.pool), projection=RegistryBucket(process.nats))
    repairs = RegistryMetrics(process.metrics)

    async def partitions() -> None:
        today = datetime.now(UTC).date()
        for ahead in range(-1, settings.partitions_ahead_days + 1):
            await ledger.ensure_day(today + timedelta(days=ahead))

    async def epochs() -> None:
        state = await stream_state(process.nats, TELEMETRY)
        await ledger.observe(TELEMETRY, state.created_ns, state.last_seq)

    async def registry() -> None:
        repairs.repaired((await reconciler.reconcile_once()).total)

    often_s, seldom_s = settings.maintenance_interval_s, settings.reconcile_interval_s
    chores = [
        Chore(name="partitions", run=partitions, interval_s=often_s),
        Chore(name="epochs", run=epochs, interval_s=often_s),
        Chore(name="ledger", run=ledger.merge, interval_s=often_s),
        Chore(name="registry", run=registry, interval_s=seldom_s),
    ]
    return [Maintenance(chores=chores)]


_BUILD = {Role.GATEWAY: _gateway, Role.INGEST: _ingest, Role.MAINTENANCE: _maintenance}


class RegistryCheck:
    """The check `registry`: not ready until all devices have been read once."""

    name = "registry"

    def __init__(self, registry: DeviceRegistry) -> None:
        self._registry = registry
        self._dependency = Dependency(self.name, detail="the devices from JetStream")

    def status(self) -> CheckStatus:
        """Where it stands now."""
        if self._registry.ready:
            self._dependency.up()
        return self._dependency.status()


@asynccontextmanager
async def open_auditor(settings: Settings) -> AsyncIterator[Auditor]:
    """An auditor on connections of its own, for a command."""
    async with (
        nats_connection.connection(settings.nats_url, name="pulse audit") as client,
        open_pool(
            settings.database_url,
            size_max=1,
            timeout_s=settings.database_timeout_s,
            application_name="pulse audit",
        ) as pool,
    ):
        yield Auditor(streams=AuditReader(client, consumer_of={TELEMETRY: INGEST_WORKERS}), ledger=LedgerReader(pool))
