"""The role `commands`: COMMANDS ─► CommandWorker ─► PostgreSQL ─► Postman ─► DOWN.

It also makes the commands of fleets, and answers gateways about devices. What time does to commands is a chore of the
role `maintenance`.
"""

from __future__ import annotations

import time

from pulse.adapters.nats.ask import Answerer
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.nats.heard import heard_until_ms
from pulse.adapters.postgres.command_fleets import FleetLots
from pulse.adapters.postgres.command_settling import CommandSettling
from pulse.adapters.postgres.command_sweep import CommandSweep
from pulse.adapters.postgres.commands import open_commands
from pulse.domain.command import told_all
from pulse.domain.errors import ConfigurationError, LimitExceeded, Outage
from pulse.domain.limits import Rate, RateLimits
from pulse.runtime.health import Dependency
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import CommandMetrics, FleetMetrics, SweepMetrics
from pulse.services.command_sweep import Sweep
from pulse.services.commands import CommandWorker
from pulse.services.fleets import FleetExpander
from pulse.services.maintenance import Chore, Maintenance
from pulse.wiring.postman import postman_of
from pulse.wiring.process import Process
from pulse.wiring.streams import COMMAND_WORKERS, COMMANDS, state_of
from pulse.wiring.waiting import WatchedCommandSettling

KIND = "commands"
"""Of what is in the outbox, and of the questions that gateways ask."""
ANSWERS_MAX = 2
"""Questions that are answered at the same time; each holds one PostgreSQL connection."""
CONNECTIONS = 2 + ANSWERS_MAX
"""To PostgreSQL, beside those of the writers: the postman's, the fleets', and those of the answers."""
BATCH_BYTES_MAX = 4 * 1024 * 1024
"""What one pull may bring."""
TOLD_MAX = 100
"""Commands that a device is told of in one answer; the rest once it has answered for these."""


async def command_services(process: Process) -> list[Service]:
    """What is said goes first: the postman is the sink of the others."""
    settings = process.settings

    async def created_ns() -> int:
        return (await state_of(process.nats, COMMANDS)).created_ns

    source = await process.stack.enter_async_context(
        PullConsumer(
            process.nats,
            stream=COMMANDS,
            consumer=COMMAND_WORKERS,
            created_ns=created_ns,
            batch_max=settings.command_batch_max,
            batch_bytes_max=BATCH_BYTES_MAX,
            linger_s=settings.command_linger_s_max,
        )
    )
    check = Dependency(KIND, detail="the first look at the tables")
    process.checks.append(check)
    postman = postman_of(process, KIND)
    worker = CommandWorker(
        source=source,
        store=WatchedCommandSettling(command_settling(process), check),
        metrics=CommandMetrics(process.metrics),
        posted=postman.tell,
        now_ms=now_ms,
        writers=settings.command_writers,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
        routed=process.routed,
    )
    fleets = FleetExpander(
        store=FleetLots(process.pool, probe=process.probe),
        metrics=FleetMetrics(process.metrics),
        posted=postman.tell,
        now_ms=now_ms,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
    )
    return [postman, worker, fleets, _answerer(process)]


def command_settling(process: Process) -> CommandSettling:
    """Where messages of COMMANDS are settled."""
    settings = process.settings
    letters = Rate(settings.mqtt_dead_letters_per_s, settings.mqtt_dead_letters_burst)
    limits = RateLimits(device=Rate(0, 1), tenant=letters)

    def keeps(tenant_id: str) -> bool:
        try:
            limits.admit(tenant_id, "", time.monotonic_ns())
        except LimitExceeded:
            return False
        return True

    return CommandSettling(process.pool, stream=COMMANDS, keeps=keeps, probe=process.probe)


def command_sweep(process: Process) -> Maintenance:
    """What time does to commands; apart from other chores, of which some take long."""
    settings = process.settings

    async def heard_ms() -> int | None:
        try:
            return await heard_until_ms(process.nats, COMMANDS, COMMAND_WORKERS)
        except ConfigurationError as error:
            raise Outage("nats", error.message, hint=error.hint) from error

    sweep = Sweep(
        store=CommandSweep(process.pool),
        heard_ms=heard_ms,
        metrics=SweepMetrics(process.metrics),
        resend_s=settings.command_resend_s,
        now_ms=now_ms,
    )
    chore = Chore(name="commands", run=sweep.run_once, interval_s=settings.command_sweep_interval_s)
    return Maintenance(chores=[chore], name="command sweep")


def now_ms() -> int:
    """The time of the wall, in ms since 1970."""
    return time.time_ns() // 1_000_000


def _answerer(process: Process) -> Answerer:
    async def answer(tenant_id: str, device_id: str, _: bytes) -> bytes:
        commands = await open_commands(process.pool, tenant_id, device_id, at_ms=now_ms(), limit=TOLD_MAX)
        return told_all(commands, bytes_max=process.nats.max_payload // 2)

    return Answerer(process.nats, kind=KIND, answer=answer, concurrency_max=ANSWERS_MAX)
