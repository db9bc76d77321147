"""The role `rescue`: DEAD_LETTERS ─► Rescue ─► the origin stream, the ledger and `dead_letters`."""

from __future__ import annotations

from pulse.adapters.nats.origin import OriginStreams
from pulse.adapters.nats.single_consumer import SingleConsumer
from pulse.adapters.postgres.dead_letters import RescueStore
from pulse.domain.settlement import Message, Settlement, settle
from pulse.domain.telemetry import PayloadDecoder
from pulse.runtime.health import Dependency
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import RescueMetrics
from pulse.services.rescue import Rescue, Stream
from pulse.topology.declared import load
from pulse.wiring.process import Process
from pulse.wiring.streams import DEAD_LETTERS, RESCUE_WORKERS, TELEMETRY, state_of
from pulse.wiring.waiting import WatchedRescueStore


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
        streams=rescued_streams(process.decoder()),
        metrics=RescueMetrics(process.metrics),
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
    )
    return [rescue]


def rescued_streams(decoder: PayloadDecoder) -> dict[str, Stream]:
    """Every declared stream with a consumer of ours; of telemetry the rescue can do what its worker does."""

    def telemetry(position: int, message: Message) -> Settlement:
        return settle([(position, message)], decoder)

    chances = {TELEMETRY: telemetry}
    declared = load()
    work_queues = {stream.name for stream in declared.streams if stream.retention == "workqueue"}
    return {
        each.stream: Stream(each.config.name, work_queue=each.stream in work_queues, chance=chances.get(each.stream))
        for each in declared.consumers
        if each.stream != DEAD_LETTERS
    }
