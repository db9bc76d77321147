"""What the roles of one process share.

The edge's part of it is made when the first role asks for it, and once: two roles with a registry each would watch the
bucket twice, tell of two sizes under one name, and let a device send twice as often.

    gateway ─┐                  ┌─► committer ─► JetStream
    bridge ──┴─► Gateway ───────┼─► limits ──┐
    ui ────────────────────────►└─► registry ◄── RegistryMirror ◄── RegistryFeed

    ingest, shadow, ──┬─► router ─► committer ─► JetStream
    commands, rescue ─┘     └─► routes ◄── RouteMirror ◄── RegistryFeed, PostgreSQL
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
from prometheus_client import CollectorRegistry

from pulse.adapters.expressions.cel import Compiler
from pulse.adapters.nats.committer import GroupCommitter
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.registry_feed import RegistryFeed
from pulse.adapters.postgres.device_attributes import DeviceAttributeStore
from pulse.adapters.postgres.ordered_jobs import OrderedJobs
from pulse.adapters.postgres.pool import Pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.adapters.postgres.route_matches import RouteMatches
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.adapters.postgres.watch import Told
from pulse.domain.limits import Rate, RateLimits
from pulse.domain.registry import Change
from pulse.domain.shadow import ShadowBounds
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.runtime.health import Check
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import PublishMetrics, RegistryMetrics, RoutingMetrics
from pulse.runtime.settings import Settings
from pulse.services.batches import Settler
from pulse.services.device_attributes import AttributeCache
from pulse.services.gateway import Gateway
from pulse.services.registry import DeviceRegistry, RegistryMirror
from pulse.services.registry import RegistryFeed as Feed
from pulse.services.route_jobs import JobSender
from pulse.services.route_table import RouteMirror, RouteTable
from pulse.services.routing import RoutedSettler, Router
from pulse.wiring.registry_check import RegistryCheck
from pulse.wiring.streams import DEAD_LETTERS, DOWN, ROUTES, SERVED, TELEMETRY

ROUTE_KEYS = "route.>"
"""The part of the registry that holds routes."""
NATS_WAIT_S_MAX = 60.0
"""How long a starting process waits for NATS before it says so and ends, to be started again."""


class OutermostFeed:
    """The registry's feed; who has to see each change before the registry does stands in front, before it is run."""

    def __init__(self, feed: Feed) -> None:
        self.outermost = feed

    def watch(self) -> AsyncGenerator[Change, None]:
        """The changes, as the outermost passes them on."""
        return self.outermost.watch()


@dataclass(frozen=True, kw_only=True)
class Process:
    """What the roles of one process share, and what they add to it.

    `shared` are the services behind what was asked for; they are sinks of all roles and start before them.
    `told_of_postgresql` hear whether it answers.
    """

    settings: Settings
    nats: PulseClient
    pool: Pool
    metrics: CollectorRegistry
    probe: Callable[[str], None]
    stack: AsyncExitStack
    checks: list[Check] = field(default_factory=list)
    shared: list[Service] = field(default_factory=list)
    told_of_postgresql: list[Told] = field(default_factory=list)

    def decoder(self) -> PayloadDecoder:
        """The payload rules of the settings."""
        return PayloadDecoder(payload_bounds(self.settings))

    @property
    def shadow_bounds(self) -> ShadowBounds:
        """How large the settings let a shadow become."""
        return msgspec.convert(self.settings, ShadowBounds, from_attributes=True)

    @cached_property
    def registry_feed(self) -> OutermostFeed:
        """Where the registry's changes come from."""
        return OutermostFeed(RegistryFeed(self.nats))

    @cached_property
    def registry(self) -> DeviceRegistry:
        """All devices in memory; the process is not ready before it is complete."""
        registry = DeviceRegistry()
        self.checks.append(RegistryCheck(registry))
        RegistryMetrics(self.metrics).watch(lambda: registry.size)
        self.shared.append(RegistryMirror(feed=self.registry_feed, registry=registry))
        return registry

    @cached_property
    def limits(self) -> RateLimits:
        """How often devices and tenants may send, by whatever protocol."""
        settings = self.settings
        return RateLimits(
            device=Rate(settings.device_messages_per_s, settings.device_messages_burst),
            tenant=Rate(settings.tenant_messages_per_s, settings.tenant_messages_burst),
            of_tenant=self.registry.limits_of,
        )

    @cached_property
    def committer(self) -> GroupCommitter:
        """What stores messages of devices, dead letters, what is said to devices, and jobs."""
        settings = self.settings
        committer = GroupCommitter(
            self.nats,
            streams={prefix: stream for stream, prefix in SERVED.items()}
            | {"dead": DEAD_LETTERS, "down": DOWN, "routes": ROUTES},
            metrics=PublishMetrics(self.metrics),
            pending_max=settings.publish_pending_max,
            timeout_s=settings.publish_timeout_s,
            drain_s_max=settings.drain_s_max,
        )
        self.shared.append(committer)
        return committer

    @cached_property
    def lines(self) -> OrderedJobs:
        """Where jobs of ordered routes stand."""
        return OrderedJobs(self.pool, jobs_max=self.settings.route_in_line_max)

    @cached_property
    def router(self) -> Router:
        """What makes jobs of messages that are stored; it follows the routes, and nothing else of the registry."""
        metrics = RoutingMetrics(self.metrics)
        table = RouteTable(compiler=Compiler(), metrics=metrics)
        router = Router(
            table=table,
            sender=JobSender(publisher=self.committer, lines=self.lines, metrics=metrics),
            attributes=AttributeCache(DeviceAttributeStore(self.pool)),
        )
        self.shared.append(
            RouteMirror(
                feed=RegistryFeed(self.nats, keys=ROUTE_KEYS),
                truth=RegistryTruth(self.pool),
                table=table,
                records=RouteMatches(self.pool),
                take_matches=router.take_matches,
            )
        )
        return router

    def routed(self, settler: Settler) -> Settler:
        """The same, with its messages routed once they are settled."""
        ledger = TelemetryStore(self.pool, stream=TELEMETRY)
        return RoutedSettler(settler, router=self.router, dead_among=ledger.dead_among)

    @cached_property
    def gateway(self) -> Gateway:
        """The decision on what devices send."""
        return Gateway(
            publisher=self.committer,
            registry=self.registry,
            decoder=self.decoder(),
            shadow_bounds=self.shadow_bounds,
            limits=self.limits,
        )


def payload_bounds(settings: Settings) -> Bounds:
    """What a payload may be; a reading that retention would drop at once is too old to be accepted."""
    bounds = msgspec.convert(settings, Bounds, from_attributes=True)
    if not settings.telemetry_retention_days:
        return bounds
    kept_s = settings.telemetry_retention_days * 86_400
    return msgspec.structs.replace(bounds, ts_past_s_max=min(bounds.ts_past_s_max, kept_s))
