"""The role `gateway`: group commit ◄─ gateway (HTTP), registry mirror."""

from __future__ import annotations

import msgspec

from pulse.adapters.nats.committer import GroupCommitter
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.registry_feed import RegistryFeed
from pulse.adapters.nats.streams import stream_state
from pulse.api.bodies import BodyBounds
from pulse.api.device import SINGLE, DeviceApi
from pulse.domain.limits import Rate, RateLimits
from pulse.runtime.health import health_app
from pulse.runtime.http import Direct, UvicornService
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import GatewayMetrics, PublishMetrics, RegistryMetrics
from pulse.services.gateway import Gateway
from pulse.services.registry import DeviceRegistry, RegistryMirror
from pulse.wiring.process import Process
from pulse.wiring.registry_check import RegistryCheck
from pulse.wiring.streams import TELEMETRY


async def gateway_services(process: Process) -> list[Service]:
    """The services, sinks first, with the address taken."""
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
                of_tenant=registry.limits_of,
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
    return [committer, RegistryMirror(feed=RegistryFeed(process.nats), registry=registry), http]


async def _durability(client: PulseClient) -> str:
    """What a PubAck of TELEMETRY is worth, as the stream was when this process started."""
    return "replicated" if (await stream_state(client, TELEMETRY)).replicas > 1 else "disk"
