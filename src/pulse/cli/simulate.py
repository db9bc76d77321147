"""`pulse simulate`: be many devices, and prove afterwards that every accepted message is stored once.

    make tenant, devices, tokens ─► wait until they are admitted ─► send ─► wait for the pipeline ─► compare

Ctrl-C while it sends ends the sending and goes on behind it; a second one, or one at any other time, ends at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pulse.adapters.postgres.pool import open_pool
from pulse.adapters.postgres.simulation import RunReader
from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.identities import open_identities
from pulse.cli.interrupt import Interrupt
from pulse.cli.simulate_drain import AuditTotals, drain, read_totals
from pulse.cli.simulate_entrance import Target, open_entrance
from pulse.cli.simulate_load import Load, Plan
from pulse.cli.simulate_report import Report, report_of, table_of
from pulse.domain.errors import CheckFailed, Outage, Reason, Refusal
from pulse.domain.identity import NewDevice, check_tenant_id
from pulse.domain.registry import device_key, tenant_key
from pulse.domain.simulation import DEVICES_MAX, Fleet
from pulse.domain.tally import MESSAGES_MAX, Outcome, Storage, compare
from pulse.wiring.cli import open_auditor

TENANT = "demo-sim"
SHOWN_EVERY_S = 0.2
CLOCK_MARGIN = timedelta(seconds=5)


@click.command()
@click.option("--devices", type=click.IntRange(1, DEVICES_MAX), default=500, show_default=True, help="How many.")
@click.option(
    "--rate",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=2000,
    show_default=True,
    help="Messages a second, of all devices together.",
)
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(0, 86_400, min_open=True),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="How long to send.",
)
@click.option("--tenant", "tenant_id", metavar="TENANT_ID", default=TENANT, show_default=True, help="Made if need be.")
@click.option("--protocol", type=click.Choice(["http", "mqtt"]), default="http", show_default=True)
@click.option("--gateway", "gateway_url", metavar="URL", help="Default: gateway_host and gateway_port of the settings.")
@click.option("--broker", "broker_url", metavar="URL", help="With --protocol mqtt; default: mqtt_url of the settings.")
@click.option(
    "--connections",
    type=click.IntRange(1, 10_000),
    default=256,
    show_default=True,
    help="Messages under way at the same time; with MQTT each device has a connection of its own.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="The same seed, the same fleet.")
@click.option("--heartbeats", type=click.FloatRange(0, 1), default=0, help="Part of the messages that are heartbeats.")
@click.option(
    "--duplicates", type=click.FloatRange(0, 1), default=0, help="Part that is sent twice under one Idempotency-Key."
)
@click.option("--commands", is_flag=True, help="With --protocol mqtt: devices do what commands and their shadows say.")
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
    broker_url: str | None,
    connections: int,
    seed: int,
    heartbeats: float,
    duplicates: float,
    commands: bool,
    as_json: bool,
) -> None:
    """Be many devices that send at a steady rate, and check that every message arrived once.

    The devices get new tokens at each start, so run it once a tenant at a time. Exits 1 where an accepted message is
    not stored, where one is stored twice, or where the audit disagrees. Ctrl-C ends the sending, not the check.
    """
    settings = context.settings()
    if commands and protocol != "mqtt":
        raise click.UsageError("--commands is for --protocol mqtt")
    count = round(rate * duration_s)
    if not 1 <= count <= MESSAGES_MAX:
        raise click.UsageError(f"--rate times --duration is {count:,} messages; a run can have 1 to {MESSAGES_MAX:,}")
    plan = Plan(
        fleet=Fleet(size=devices, seed=seed),
        rate=rate,
        count=count,
        connections=connections,
        heartbeats=heartbeats,
        duplicates=duplicates,
        # Above the numbers of every run before it, so that a row is known by its device and number.
        seq_base=time.time_ns() // 1000,
    )
    target = Target(
        settings=settings,
        tenant_id=check_tenant_id(tenant_id),
        protocol=protocol,
        url=broker_url if protocol == "mqtt" else gateway_url,
        commands=commands,
    )
    report = await _run(plan, target)
    if as_json:
        print_json(report)
    else:
        console.print(table_of(report))
    if report.fault:
        raise CheckFailed(report.fault)


async def _run(plan: Plan, target: Target) -> Report:
    settings = target.settings
    async with (
        open_entrance(target, devices=plan.fleet.size, connections=plan.connections) as entrance,
        open_auditor(settings) as auditor,
        open_pool(
            settings.database_url,
            size_max=2,
            timeout_s=settings.database_timeout_s,
            application_name="pulse simulate",
        ) as pool,
    ):
        await entrance.check()
        before = await read_totals(auditor)
        tokens = await _make_devices(plan.fleet, target)
        await entrance.admit(plan.fleet.device_ids(), tokens)
        progress_console.print(f"{plan.fleet.size:,} devices are ready", style="dim", highlight=False)
        reader = RunReader(pool, target.tenant_id)
        since = datetime.now(UTC) - CLOCK_MARGIN
        with Interrupt() as interrupt:
            load = Load(client=entrance.client, plan=plan, tokens=tokens, stop=interrupt.asked)
            async with _shown(load, plan):
                duration_s = await load.run(reader)
            interrupt.now_ends_at_once()

            async def storage() -> Storage:
                return await _storage(load, plan, reader, since)

            async def all_stored() -> bool:
                return (await storage()).missing == 0

            async def all_arrived(totals: AuditTotals) -> bool:
                """A broker has confirmed what the bridge may not have passed on yet."""
                confirmed = load.tally.by_outcome[Outcome.ACCEPTED] + load.tally.by_outcome[Outcome.HEARTBEAT]
                return target.protocol != "mqtt" or totals.accepted - before.accepted >= confirmed

            try:
                after = await drain(auditor, all_stored=all_stored, all_arrived=all_arrived)
            except Outage as outage:
                accepted = load.tally.by_outcome[Outcome.ACCEPTED]
                raise CheckFailed(
                    f"not verified: {load.tally.sent:,} sent, {accepted:,} accepted, and then: {outage.message}",
                    hint="`pulse audit` tells once it is back",
                ) from outage
            return report_of(
                load.tally,
                protocol=target.protocol,
                tenant_id=target.tenant_id,
                interrupted=interrupt.asked.is_set(),
                duration_s=duration_s,
                storage=await storage(),
                dead_letters=await reader.dead_letters(since=since),
                stored_after=load.stored_after,
                audit=after.since(before),
            )


async def _storage(load: Load, plan: Plan, reader: RunReader, since: datetime) -> Storage:
    """What is stored now of what was accepted."""
    found = await reader.rows(since=since, until=datetime.now(UTC) + CLOCK_MARGIN, seqs=plan.seqs)
    rows = {number: found[name] for number, name in enumerate(plan.fleet.device_ids()) if name in found}
    return compare(load.tally, rows, seq_base=plan.seq_base)


async def _make_devices(fleet: Fleet, target: Target) -> list[str]:
    """Tenant, devices, and a new token for each, by number; the edge is told. Raises Outage."""
    ids = fleet.device_ids()
    async with open_identities(target.settings) as identities:
        try:
            await identities.store.add_tenant(target.tenant_id, name="Simulated devices")
        except Refusal as refusal:
            if refusal.reason is not Reason.CONFLICT:
                raise
            if not (await identities.store.tenant(target.tenant_id)).enabled:
                raise CheckFailed(
                    f"tenant {target.tenant_id} is disabled, so its devices cannot send",
                    hint="choose another with --tenant",
                ) from refusal
        new = [NewDevice(device_id=device_id, name="Simulated device") for device_id in ids]
        tokens = await identities.store.add_devices(target.tenant_id, new, reissue=True)
        keys = [tenant_key(target.tenant_id), *(device_key(target.tenant_id, device_id) for device_id in ids)]
        with Progress(console=progress_console, transient=True, disable=not progress_console.is_terminal) as progress:
            task = progress.add_task(f"making {len(ids):,} devices", total=len(keys))
            if not await identities.project(keys, on_progress=lambda done: progress.advance(task, done)):
                raise Outage("nats", "the gateway cannot be told of the devices")
    return list(tokens.values())


@asynccontextmanager
async def _shown(load: Load, plan: Plan) -> AsyncIterator[None]:
    """A live bar on a terminal while `load` runs; one line elsewhere."""
    if not progress_console.is_terminal:
        progress_console.print(f"sending {plan.count:,} messages at {plan.rate:,.0f}/s", highlight=False)
        yield
        return
    columns = (
        TextColumn("sending"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=progress_console, transient=True) as progress:
        task = progress.add_task("", total=plan.count, facts="")

        async def show() -> None:
            at, sent = time.monotonic(), 0
            while True:
                await asyncio.sleep(SHOWN_EVERY_S)
                now, tally = time.monotonic(), load.tally
                rate, at, sent = (tally.sent - sent) / (now - at), now, tally.sent
                accepted = tally.by_outcome[Outcome.ACCEPTED] + tally.by_outcome[Outcome.HEARTBEAT]
                p50_s, p99_s = tally.latencies.quantile_s(0.5), tally.latencies.quantile_s(0.99)
                facts = (
                    f"{rate:,.0f}/s  accepted {accepted:,}  refused {tally.by_outcome[Outcome.REFUSED]:,}"
                    f"  retried {tally.retried:,}  p50 {p50_s * 1000:.1f} ms  p99 {p99_s * 1000:.1f} ms"
                )
                progress.update(task, completed=tally.sent, facts=facts)

        shower = asyncio.create_task(show(), name="progress")
        try:
            yield
        finally:
            shower.cancel()
