"""The composition root: the only place that knows which adapter stands behind which service.

What a role is made of stands in `wiring/{role}.py`. `serve` runs any set of roles in one process, on one connection
to NATS and one pool to PostgreSQL.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

import structlog

from pulse.adapters.nats import connection as nats_connection
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.postgres.pool import open_pool
from pulse.adapters.postgres.watch import DatabaseWatch
from pulse.runtime.faults import probe_for
from pulse.runtime.health import Dependency, HealthServer, NotStopping
from pulse.runtime.lifecycle import Service, run_services, stop_on_signals
from pulse.runtime.metrics import process_registry
from pulse.runtime.roles import Role
from pulse.runtime.settings import Settings
from pulse.wiring.bridge import bridge_services
from pulse.wiring.command import CONNECTIONS as COMMAND_CONNECTIONS
from pulse.wiring.command import command_services
from pulse.wiring.delivery import CONNECTIONS as DELIVERY_CONNECTIONS
from pulse.wiring.delivery import delivery_services
from pulse.wiring.gateway import gateway_services
from pulse.wiring.ingest import ingest_services
from pulse.wiring.maintenance import maintenance_services
from pulse.wiring.process import NATS_WAIT_S_MAX, Process
from pulse.wiring.rescue import rescue_services
from pulse.wiring.shadow import CONNECTIONS as SHADOW_CONNECTIONS
from pulse.wiring.shadow import shadow_services
from pulse.wiring.ui import ui_services

log = structlog.get_logger()


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
                size_max=_connections_max(settings, roles),
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
        if set(roles) - {Role.GATEWAY, Role.BRIDGE}:
            process.checks.append(postgresql)
            process.told_of_postgresql.append(postgresql)
            services.append(DatabaseWatch(pool, told=process.told_of_postgresql))
        own = [service for role in Role if role in roles for service in await _BUILD[role](process)]
        services += process.shared + own
        # What is here by now stays. A full collection would walk all of it, 90,000 objects in 50 ms, amid the answers.
        gc.collect()
        gc.freeze()
        log.info("started", roles=title)
        await run_services(services, stop=stop, drain_s_max=settings.drain_s_max)


def _connections_max(settings: Settings, roles: Sequence[Role]) -> int:
    """How many connections to PostgreSQL a process may have: those of its roles, and two for what comes in between."""
    of_role = {
        Role.INGEST: settings.ingest_writers,
        Role.SHADOW: settings.shadow_writers + SHADOW_CONNECTIONS,
        Role.COMMANDS: settings.command_writers + COMMAND_CONNECTIONS,
        Role.DELIVERY: DELIVERY_CONNECTIONS,
    }
    return 2 + sum(of_role.get(role, 0) for role in roles)


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


_BUILD: dict[Role, Callable[[Process], Awaitable[list[Service]]]] = {
    Role.GATEWAY: gateway_services,
    Role.INGEST: ingest_services,
    Role.MAINTENANCE: maintenance_services,
    Role.UI: ui_services,
    Role.RESCUE: rescue_services,
    Role.BRIDGE: bridge_services,
    Role.SHADOW: shadow_services,
    Role.COMMANDS: command_services,
    Role.DELIVERY: delivery_services,
}
