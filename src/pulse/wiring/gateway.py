"""The role `gateway`: devices over HTTP, on the gateway that its process shares."""

from __future__ import annotations

import msgspec

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.streams import stream_state
from pulse.api.bodies import BodyBounds
from pulse.api.device import SINGLE, DeviceApi
from pulse.runtime.health import health_app
from pulse.runtime.http import Direct, UvicornService
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import GatewayMetrics
from pulse.wiring.process import Process
from pulse.wiring.streams import TELEMETRY


async def gateway_services(process: Process) -> list[Service]:
    """The HTTP service, with its address taken."""
    settings = process.settings
    app = DeviceApi(
        gateway=process.gateway,
        metrics=GatewayMetrics(process.metrics),
        durability=await _durability(process.nats),
        bounds=msgspec.convert(settings, BodyBounds, from_attributes=True),
        other=health_app(checks=process.checks, registry=process.metrics),
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
    return [http]


async def _durability(client: PulseClient) -> str:
    """What a PubAck of TELEMETRY is worth, as the stream was when this process started."""
    return "replicated" if (await stream_state(client, TELEMETRY)).replicas > 1 else "disk"
