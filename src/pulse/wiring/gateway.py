"""The role `gateway`: devices over HTTP, on the gateway that its process shares."""

from __future__ import annotations

import msgspec

from pulse.adapters.nats.ask import Asker
from pulse.adapters.nats.command_watch import command_watch
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.streams import stream_state
from pulse.api.bodies import BodyBounds
from pulse.api.device import DeviceApi
from pulse.api.device_paths import SINGLE
from pulse.api.device_reads import DeviceReads
from pulse.runtime.health import health_app
from pulse.runtime.http import Direct, UvicornService
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import GatewayMetrics, PollMetrics
from pulse.services.polls import Polls
from pulse.wiring.process import Process
from pulse.wiring.streams import TELEMETRY


async def gateway_services(process: Process) -> list[Service]:
    """The HTTP service, with its address taken; before it stops, those who wait for commands have an answer."""
    settings = process.settings
    metrics = GatewayMetrics(process.metrics)
    asker = Asker(process.nats, timeout_s=settings.gateway_ask_s_max)
    polls = Polls(
        asker=asker,
        publisher=process.committer,
        watch=lambda told: command_watch(process.nats, told),
        waiting_max=settings.gateway_polls_max,
    )
    PollMetrics(process.metrics).watch(lambda: polls.count)
    reads = DeviceReads(
        gateway=process.gateway,
        asker=asker,
        polls=polls,
        metrics=metrics,
        wait_s_max=settings.gateway_poll_s_max,
        device_reads_max=settings.gateway_device_reads_max,
        other=health_app(checks=process.checks, registry=process.metrics),
    )
    app = DeviceApi(
        gateway=process.gateway,
        metrics=metrics,
        durability=await _durability(process.nats),
        bounds=msgspec.convert(settings, BodyBounds, from_attributes=True),
        other=reads,
    )
    http = UvicornService(
        name="gateway",
        app=app,
        direct=Direct(SINGLE, app.direct),
        overloaded=app.overloaded,
        host=settings.gateway_host,
        port=settings.gateway_port,
        setting="gateway",
        connections_max=settings.gateway_connections_max,
        keep_alive_s=settings.gateway_keep_alive_s,
        request_s_max=settings.gateway_request_s_max,
    )
    http.bind()
    return [http, polls]


async def _durability(client: PulseClient) -> str:
    """What a PubAck of TELEMETRY is worth, as the stream was when this process started."""
    return "replicated" if (await stream_state(client, TELEMETRY)).replicas > 1 else "disk"
