"""The console put together: pages over the control API's own services, and what only people need.

health and metrics ◄─┐
console pages      ◄─┴─ whatever is not below /api/ or a broker's question
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from pulse.adapters.http.role_metrics import RoleMetrics
from pulse.adapters.nats.browse import MessageBrowser
from pulse.adapters.nats.origin import OriginStreams
from pulse.adapters.nats.stream_levels import StreamLevelReader
from pulse.adapters.passwords import Argon2Passwords
from pulse.adapters.postgres.access import KeyStore
from pulse.adapters.postgres.console import AccountStore, SessionStore
from pulse.adapters.postgres.dead_letters import DeadLetterStore
from pulse.adapters.postgres.fleet import FleetReader
from pulse.adapters.postgres.pool import Scoped
from pulse.adapters.postgres.route_overview import RouteOverview
from pulse.domain.access import ChangeRecord
from pulse.domain.account import SessionLife
from pulse.domain.command_requests import CommandBounds
from pulse.domain.pipeline import SystemState
from pulse.domain.query import QueryBounds
from pulse.domain.shadow import ShadowBounds
from pulse.runtime.health import HEALTH_PATHS
from pulse.runtime.http import Application, Receive, Scope, Send
from pulse.services.console import Console, Desk, OpenDesk
from pulse.services.control import Control, OpenReach
from pulse.services.dead_letters import DeadLetters
from pulse.services.pipeline import Pipeline
from pulse.services.sign_in import SignIn
from pulse.topology.declared import Declared
from pulse.ui.application import console_app
from pulse.ui.assets import Assets
from pulse.wiring.process import Process
from pulse.wiring.streams import TELEMETRY

LIBRARIES = Path(sys.prefix) / "share" / "pulse" / "web"
"""Where `./pulse` and the image put the two libraries that pages load (docs/adr/0019)."""
SYSTEMS = ("nats", "postgresql")


def open_desk_on(process: Process) -> OpenDesk:
    """Stores on the process's pool, for one tenant or for all."""
    presence_after = process.settings.presence_after()
    publisher = OriginStreams(process.nats)

    def open_desk(tenant_id: str | None, record: ChangeRecord | None) -> Desk:
        reading = Scoped(pool=process.pool, tenant_id=tenant_id)
        changing = Scoped(pool=process.pool, tenant_id=tenant_id, record=record)
        return Desk(
            search=FleetReader(reading, presence_after=presence_after),
            routes=RouteOverview(reading),
            dead_letters=DeadLetters(store=DeadLetterStore(changing), publisher=publisher),
        )

    return open_desk


def pipeline_of(process: Process, control: Control, declared: Declared) -> Pipeline:
    """What everybody who watches sees."""
    checks = [check for check in process.checks if check.name in SYSTEMS]

    def systems() -> list[SystemState]:
        return [
            SystemState(name=check.name, ok=status.ok, since=status.since, detail=status.detail)
            for check in checks
            for status in (check.status(),)
        ]

    consumer_of = {consumer.stream: consumer.config.name for consumer in declared.consumers}
    streams = [stream.name for stream in declared.streams if not stream.name.startswith("KV_")]
    return Pipeline(
        levels=StreamLevelReader(process.nats, [(name, consumer_of.get(name)) for name in streams]),
        edge=RoleMetrics(process.settings.role_addresses.split()),
        fleet=FleetReader(Scoped(pool=process.pool), presence_after=process.settings.presence_after()),
        auditor=control.auditor,
        audited=TELEMETRY,
        systems=systems,
    )


def console_on(
    process: Process, *, control: Control, open_reach: OpenReach, query: QueryBounds, declared: Declared
) -> tuple[Application, Pipeline]:
    """The pages, and the service that keeps their picture."""
    settings, pool = process.settings, process.pool
    pipeline = pipeline_of(process, control, declared)
    sign_in = SignIn(
        keys=KeyStore(pool),
        accounts=AccountStore(pool),
        sessions=SessionStore(pool),
        passwords=Argon2Passwords(),
        life=SessionLife(life_s=settings.ui_session_s_max, idle_s=settings.ui_session_idle_s_max),
    )
    console = Console(
        control=control,
        sign_in=sign_in,
        pipeline=pipeline,
        messages=MessageBrowser(process.nats),
        open_reach=open_reach,
        open_desk=open_desk_on(process),
        prefixes={
            stream.name: stream.subjects[0].removesuffix(".>")
            for stream in declared.streams
            if stream.name in ("TELEMETRY", "SHADOW", "COMMANDS", "ROUTES")
        },
        query=query,
        shadow=msgspec.convert(settings, ShadowBounds, from_attributes=True),
        command=msgspec.convert(settings, CommandBounds, from_attributes=True),
        import_rows_max=settings.import_rows_max,
        import_bytes_max=settings.import_bytes_max,
        gateway_url=settings.gateway_public_url or f"http://{settings.gateway_host}:{settings.gateway_port}",
        mqtt_url=settings.mqtt_public_url or settings.mqtt_url,
    )
    return console_app(console=console, assets=Assets(LIBRARIES), public_url=settings.ui_public_url), pipeline


def by_path(console: Application, health: Application) -> Application:
    """`health` for its own paths, the console for all others."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inner = health if scope["path"] in HEALTH_PATHS else console
        await inner(scope, receive, send)

    return app
