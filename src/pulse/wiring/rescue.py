"""The role `rescue`: DEAD_LETTERS ─► Rescue ─► the origin stream, the ledger and `dead_letters`."""

from __future__ import annotations

from collections.abc import Mapping

from pulse.adapters.nats.origin import OriginStreams
from pulse.adapters.nats.single_consumer import SingleConsumer
from pulse.adapters.postgres.dead_letters import RescueStore
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.runtime.health import Dependency
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import CommandMetrics, IngestMetrics, RescueMetrics, ShadowMetrics
from pulse.services.batches import Settler
from pulse.services.commands import CommandSettler
from pulse.services.ingest import TelemetrySettler, written_at_once
from pulse.services.rescue import Rescue, Stream
from pulse.services.shadow import ShadowSettler
from pulse.topology.declared import load
from pulse.wiring.command import command_settling, now_ms
from pulse.wiring.process import Process
from pulse.wiring.shadow import shadow_settlements
from pulse.wiring.streams import COMMANDS, DEAD_LETTERS, RESCUE_WORKERS, SHADOW, TELEMETRY, state_of
from pulse.wiring.waiting import (
    WatchedCommandSettling,
    WatchedRescueStore,
    WatchedShadowSettlements,
    WatchedTelemetryStore,
)


async def rescue_services(process: Process) -> list[Service]:
    """The service."""
    nats, settings = process.nats, process.settings

    async def created_ns() -> int:
        return (await state_of(nats, DEAD_LETTERS)).created_ns

    check = Dependency("rescue", detail="the first look at the tables")
    process.checks.append(check)
    rescue = Rescue(
        source=SingleConsumer(nats, stream=DEAD_LETTERS, consumer=RESCUE_WORKERS, created_ns=created_ns),
        origin=OriginStreams(nats),
        store=WatchedRescueStore(RescueStore(process.pool, probe=process.probe), check),
        streams=rescued_streams(_chances(process, check)),
        metrics=RescueMetrics(process.metrics),
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
    )
    return [rescue]


def rescued_streams(chances: Mapping[str, Settler]) -> dict[str, Stream]:
    """Every declared stream whose consumer gives up; of those in `chances` the rescue can do what their workers do."""
    declared = load()
    work_queues = {stream.name for stream in declared.streams if stream.retention == "workqueue"}
    return {
        each.stream: Stream(each.config.name, work_queue=each.stream in work_queues, chance=chances.get(each.stream))
        for each in declared.consumers
        if each.config.max_deliver > 0
    }


def _chances(process: Process, check: Dependency) -> dict[str, Settler]:
    telemetry = WatchedTelemetryStore(TelemetryStore(process.pool, stream=TELEMETRY, probe=process.probe), check)
    return {
        TELEMETRY: TelemetrySettler(
            store=telemetry,
            decoder=process.decoder(),
            metrics=IngestMetrics(process.metrics),
            hear=written_at_once(telemetry),
            probe=process.probe,
            route=process.router.route,
        ),
        SHADOW: process.routed(
            ShadowSettler(
                store=WatchedShadowSettlements(shadow_settlements(process), check),
                metrics=ShadowMetrics(process.metrics),
                posted=_look_yourself,
                probe=process.probe,
            )
        ),
        COMMANDS: process.routed(
            CommandSettler(
                store=WatchedCommandSettling(command_settling(process), check),
                metrics=CommandMetrics(process.metrics),
                posted=_look_yourself,
                now_ms=now_ms,
                probe=process.probe,
            )
        ),
    }


def _look_yourself() -> None:
    """The postman is in another process, and looks often."""
