"""The role `ingest`: TELEMETRY ─► IngestWorker ─► PostgreSQL, and jobs ─► ROUTES."""

from __future__ import annotations

import gc

from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.runtime.health import Dependency
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import IngestMetrics
from pulse.services.ingest import IngestWorker
from pulse.wiring.process import Process
from pulse.wiring.streams import INGEST_WORKERS, TELEMETRY, state_of
from pulse.wiring.waiting import WatchedTelemetryStore

BATCH_BYTES_MAX = 8 * 1024 * 1024
"""What one pull may bring; two pulls overlap, and three batches are in hand: all of it stays below 150 MB."""

GC_OBJECTS = 100_000
"""New objects between two looks for cycles: a batch of 5000 makes 20,000, and no cycle. CPython's 700 cost 5 %."""


async def ingest_services(process: Process) -> list[Service]:
    """The worker, on a consumer of its own."""
    settings = process.settings
    gc.freeze()
    gc.set_threshold(GC_OBJECTS)

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
    check = Dependency("ingest", detail="the first look at the tables")
    process.checks.append(check)
    worker = IngestWorker(
        source=source,
        store=WatchedTelemetryStore(TelemetryStore(process.pool, stream=TELEMETRY, probe=process.probe), check),
        decoder=process.decoder(),
        metrics=IngestMetrics(process.metrics),
        writers=settings.ingest_writers,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
        route=process.router.route,
    )
    return [worker]
