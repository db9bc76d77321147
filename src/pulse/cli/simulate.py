"""`pulse simulate`: be many devices, and prove afterwards that every accepted message is stored once.

    make tenant, devices, tokens ─► wait until the gateway admits them ─► send ─► wait for the pipeline ─► compare

Ctrl-C while it sends ends the sending and goes on behind it; a second one, or one at any other time, ends at once.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pulse.adapters.http.device import DeviceClient, Message, open_device_client
from pulse.adapters.postgres.pool import open_pool
from pulse.adapters.postgres.simulation import RunReader
from pulse.app import open_auditor
from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.identities import Identities, open_identities
from pulse.cli.simulate_drain import AuditTotals, drain, read_totals
from pulse.cli.simulate_load import Load, Plan
from pulse.cli.simulate_report import Report, fault_of, report_of, table_of
from pulse.domain.errors import CheckFailed, ConfigurationError, Outage, Reason, Refusal
from pulse.domain.identity import NewDevice, check_tenant_id
from pulse.domain.registry import device_key, tenant_key
from pulse.domain.simulation import DEVICES_MAX, Fleet
from pulse.domain.tally import MESSAGES_MAX, Outcome, compare
from pulse.runtime.settings import Settings

TENANT = "demo-sim"
ADMISSION_S_MAX = 30.0
ADMISSION_CHECKED_MAX = 50
"""Devices whose admission is waited for, spread over all; they are told to the edge in order, the last one last."""
ADMISSION_POLL_S = 0.05
SHOWN_EVERY_S = 0.2
CLOCK_MARGIN = timedelta(seconds=5)

Fraction = click.FloatRange(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the run goes."""

    settings: Settings
    tenant_id: str
    gateway_url: str


@click.command()
@click.option("--devices", type=click.IntRange(1, DEVICES_MAX), default=500, show_default=True, help="How many.")
@click.option(
    "--rate", type=click.FloatRange(0, 1e6, min_open=True), default=2000, show_default=True, help="Messages a second, in all."
)
@click.option(
    "--duration", "duration_s", type=click.FloatRange(0, 86_400, min_open=True), default=30, show_default=True,
    metavar="SECONDS", help="How long to send.",
)
@click.option("--tenant", "tenant_id", metavar="TENANT_ID", default=TENANT, show_default=True, help="Made if need be.")
@click.option("--protocol", type=click.Choice(["http"]), default="http", show_default=True)
@click.option("--gateway", "gateway_url", metavar="URL", help="Default: that of the settings gateway_host and _port.")
@click.option("--connections", type=click.IntRange(1, 10_000), default=64, show_default=True, help="At most so many.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Same seed, same fleet and choices.")
@click.option("--heartbeats", type=Fraction, default=0, help="This part of the messages are heartbeats.")
@click.option("--duplicates", type=Fraction, default=0, help="This part is sent twice, under one Idempotency-Key.")
@json_option
@click.pass_obj
@as_async
async def simulate(
    context: Context,
    *,
    devices: int,
    rate: float,
    duration_s: float,
    tenant_id: str,
    protocol: str,
    gateway_url: str | None,
    connections: int,
    seed: int,
    heartbeats: float,
    duplicates: float,
    as_json: bool,
) -> None:
    """Be many devices that send at a steady rate, and check that every message arrived once.

    Gives the devices of the tenant new tokens, so one run a tenant at a time. Exits 1 where an accepted message is not
    stored, where one is stored twice, or where the audit disagrees.
    """
    settings = context.settings()
    count = round(rate * duration_s)
    if not 1 <= count <= MESSAGES_MAX:
        raise click.UsageError(f"--rate times --duration is {count:,} messages; 1 to {MESSAGES_MAX:,} can be kept book of")
    plan = Plan(
        fleet=Fleet(size=devices, seed=seed),
        rate=rate,
        count=count,
        connections=connections,
        heartbeats=heartbeats,
        duplicates=duplicates,
        # Above those of any run before, so that every row is known by its device and number.
        seq_base=time.time_ns() // 1000,
    )
    target = Target(
        settings=settings,
        tenant_id=check_tenant_id(tenant_id),
        gateway_url=gateway_url or f"http://{_reachable(settings.gateway_host)}:{settings.gateway_port}",
    )
    report = await _run(plan, target)
    if as_json:
        print_json(report)
    else:
        console.print(table_of(report))
    if fault := fault_of(report):
        raise CheckFailed(fault)


async def _run(plan: Plan, target: Target) -> Report:
    settings = target.settings
    async with (
        open_device_client(
            target.gateway_url, tenant_id=target.tenant_id, connections=plan.connections
        ) as client,
        open_auditor(settings) as auditor,
        open_pool(
            settings.database_url,
            size_max=2,
            timeout_s=settings.database_timeout_s,
            application_name="pulse simulate",
        ) as pool,
    ):
        await client.check()
        before = await read_totals(auditor)
        tokens = await _make_devices(plan.fleet, target)
        await _wait_for_admission(client, plan.fleet.device_ids(), tokens)
        reader = RunReader(pool, target.tenant_id)
        since = datetime.now(UTC) - CLOCK_MARGIN
        with _stopped_by_signals() as (stop, sending_ended):
            load = Load(client=client, plan=plan, tokens=tokens, stop=stop)
            async with _shown_sending(load, plan):
                duration_s = await load.run(reader)
            sending_ended()
        after = await drain(auditor, progress_console)
        numbers = {device_id: number for number, device_id in enumerate(plan.fleet.device_ids())}
        rows = await reader.rows(since=since, until=datetime.now(UTC) + CLOCK_MARGIN, seqs=plan.seqs)
        return report_of(
            load=load,
            plan=plan,
            tenant_id=target.tenant_id,
            duration_s=duration_s,
            interrupted=stop.is_set(),
            storage=compare(load.tally, {numbers[name]: found for name, found in rows.items()}, seq_base=plan.seq_base),
            dead_letters=await reader.dead_letters(since=since),
            before=before,
            after=after,
        )


async def _make_devices(fleet: Fleet, target: Target) -> list[str]:
    """Tenant, devices and a new token for each, in the order of their numbers; told to the edge."""
    ids = fleet.device_ids()
    async with open_identities(target.settings) as identities:
        try:
            await identities.store.add_tenant(target.tenant_id, name="Simulated devices")
        except Refusal as refusal:
            if refusal.reason is not Reason.CONFLICT:
                raise
        new = [NewDevice(device_id=device_id, name="Simulated") for device_id in ids]
        tokens = await identities.store.add_devices(target.tenant_id, new, reissue=True)
        await _tell_the_edge(identities, target.tenant_id, ids)
    return [tokens[device_id] for device_id in ids]


async def _tell_the_edge(identities: Identities, tenant_id: str, ids: Sequence[str]) -> None:
    keys = [tenant_key(tenant_id), *(device_key(tenant_id, device_id) for device_id in ids)]
    with Progress(console=progress_console, transient=True, disable=not progress_console.is_terminal) as progress:
        task = progress.add_task(f"making {len(ids):,} devices", total=len(keys))
        if not await identities.project(keys, on_progress=lambda done: progress.advance(task, done)):
            raise Outage("nats", "the gateway cannot be told of the devices", hint="is it running? `pulse up` starts one")


async def _wait_for_admission(client: DeviceClient, ids: Sequence[str], tokens: Sequence[str]) -> None:
    """Return once the gateway knows the tokens; it is asked with a payload that it refuses, so nothing is stored."""
    step = max(1, len(ids) // ADMISSION_CHECKED_MAX)
    waiting = list(range(len(ids) - 1, -1, -step))
    deadline = time.monotonic() + ADMISSION_S_MAX
    while waiting:
        number = waiting[-1] if len(waiting) < 2 else waiting[0]
        answer = await client.send(Message(ids[number], tokens[number], "telemetry", b"{}", "admission"))
        if answer.status == 422:
            waiting.remove(number)
        elif time.monotonic() > deadline:
            raise CheckFailed(
                f"the gateway does not admit device {ids[number]} after {ADMISSION_S_MAX:.0f} s: status {answer.status}",
                hint="is it of the same system, is the tenant enabled? `pulse tenant list`",
            )
        else:
            await asyncio.sleep(ADMISSION_POLL_S)
    progress_console.print(f"{len(ids):,} devices are made and admitted", style="dim", highlight=False)


@contextmanager
def _stopped_by_signals() -> Iterator[tuple[asyncio.Event, object]]:
    """An event that the first SIGINT or SIGTERM sets."""
    raise NotImplementedError
