"""Shadow updates a second: SHADOW → `pulse serve shadow` → PostgreSQL, beside what its parts can do in the same run.

    .venv/bin/python bench/shadows.py [--json] [--rounds 3] [--updates 50000] [--folder DIR] [--set name=value …]

An update is `reported` with six attributes, some 250 bytes with its envelope. It waits in the stream when the worker
begins; it is done when its shadow, its change, what its device hears, and the ledger are committed. The worker's
process posts what devices hear to DOWN meanwhile: `told` is the rate until the last of that is on disk as well.

    raw       pull and ack, nothing done with the messages
    rows      the same rows written by two connections, 1000 updates a transaction, nothing read and nothing merged
    many      `pulse serve shadow`, updates of 2000 devices of ten tenants
    few       the same, of 20 devices
    one       the same, of one device: at most 10,000, as many as the stream keeps of one tenant
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import click
import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chaos.system import Role, System, eventually  # noqa: E402
from pulse.adapters.embedded import ports  # noqa: E402
from pulse.adapters.embedded.nats_server import NatsServer  # noqa: E402
from pulse.adapters.embedded.postgres_server import PostgresServer  # noqa: E402
from pulse.adapters.nats.committer import GroupCommitter  # noqa: E402
from pulse.adapters.nats.connection import PulseClient, connection  # noqa: E402
from pulse.adapters.nats.consumer import PullConsumer  # noqa: E402
from pulse.adapters.nats.streams import consumer_state, stream_state  # noqa: E402
from pulse.adapters.postgres.outbox import put_into_outbox  # noqa: E402
from pulse.adapters.postgres.pool import open_pool, transaction  # noqa: E402
from pulse.adapters.postgres.shadows import write_shadows  # noqa: E402
from pulse.domain.envelope import wrap  # noqa: E402
from pulse.domain.shadow import Shadow, ShadowBounds, ShadowKey, read_update  # noqa: E402
from pulse.domain.shadow_requests import Changed, change  # noqa: E402
from pulse.domain.subjects import MessageType  # noqa: E402
from pulse.runtime.metrics import PublishMetrics  # noqa: E402
from pulse.topology.declared import load  # noqa: E402

STREAM, CONSUMER = "SHADOW", "shadow-workers"
TENANTS = 10
OF_ONE_TENANT_MAX = 10_000
DEVICES = {"raw": 2000, "rows": 2000, "many": 2000, "few": 20, "one": 1}
LIMIT_S = 120.0
BATCH = 1000
BOUNDS = ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8)
PASSWORD = secrets.token_urlsafe(16)


class Turn(msgspec.Struct, frozen=True):
    """One way: updates a second, until committed and until told; CPU in µs an update of worker, NATS and PostgreSQL."""

    way: str
    count: int
    per_s: float
    told_per_s: float = 0.0
    worker_us: float = 0.0
    nats_us: float = 0.0
    postgres_us: float = 0.0


def update(number: int, chance: random.Random) -> bytes:
    """What a device says."""
    return (
        f'{{"state":{{"reported":{{"temperature":{chance.uniform(-20, 40):.2f},"battery_v":{chance.uniform(3, 4):.3f},'
        f'"door":"closed","motion":{"true" if number % 3 else "false"},"firmware":"1.{number % 4}","led":"on"}}}}}}'
    ).encode()


def key_of(number: int, devices: int) -> ShadowKey:
    """Whose update the `number`-th is."""
    device = number % devices
    return ShadowKey(f"tenant-{device % TENANTS}", f"device-{device:05}")


async def publish(client: PulseClient, way: str, count: int) -> None:
    """Fill the stream, by group commit."""
    committer = GroupCommitter(
        client,
        streams={"shadow": STREAM},
        metrics=PublishMetrics(CollectorRegistry()),
        pending_max=count,
        timeout_s=LIMIT_S,
        drain_s_max=LIMIT_S,
    )
    run, stop, chance = secrets.token_hex(4), asyncio.Event(), random.Random(1)
    running = asyncio.create_task(committer.run(stop))
    await asyncio.sleep(0.1)
    futures = []
    for number in range(count):
        key = key_of(number, DEVICES[way])
        body = wrap(
            tenant_id=key.tenant_id,
            device_id=key.device_id,
            message_type=MessageType.SHADOW,
            received_ms=time.time_ns() // 1_000_000,
            source="mqtt",
            payload=update(number, chance),
        )
        futures.append(committer.submit(f"shadow.{key.tenant_id}", body, message_id=f"{run}-{number}"))
    await asyncio.gather(*futures)
    stop.set()
    await running


async def pause(client: PulseClient, until: str = "") -> None:
    """Let the consumer deliver nothing; without `until`, let it."""
    body = json.dumps({"pause_until": until} if until else {}).encode()
    answer = await client.request(f"$JS.API.CONSUMER.PAUSE.{STREAM}.{CONSUMER}", body, timeout=10)
    assert b'"error"' not in answer.data, answer.data


async def raw(client: PulseClient, count: int) -> Turn:
    """The stream's part of the work."""

    async def created_ns() -> int:
        return (await stream_state(client, STREAM)).created_ns

    started, taken = time.perf_counter(), 0
    async with PullConsumer(
        client,
        stream=STREAM,
        consumer=CONSUMER,
        created_ns=created_ns,
        batch_max=BATCH,
        batch_bytes_max=1 << 22,
        linger_s=0.02,
    ) as source:
        while taken < count:
            batch = await source.fetch()
            assert batch, "the stream is empty"
            await source.ack(batch)
            taken += len(batch.messages)
    return Turn("raw", count, count / (time.perf_counter() - started))


async def rows(system: System, postgres: PostgresServer, count: int) -> Turn:
    """PostgreSQL's part: what an update becomes, made beforehand, one shadow after the other."""
    chance = random.Random(1)
    made: list[Changed] = [
        change(
            key_of(number, DEVICES["rows"]),
            Shadow(),
            read_update(update(number, chance)),
            at_ms=number,
            who="device",
            bounds=BOUNDS,
            position=number,
        )
        for number in range(count)
    ]
    batches = [made[low : low + BATCH] for low in range(0, count, BATCH)]
    before = cpu_s(postgres.pid)
    started = time.perf_counter()
    async with open_pool(system.database_url, size_max=2, timeout_s=LIMIT_S, application_name="bench") as pool:

        async def write(part: int) -> None:
            # Even batches are of the even thousands of devices, and odd ones of the odd: no two write one row.
            for batch in batches[part::2]:
                async with transaction(pool) as database:
                    shadows = {each.change.key: each.shadow for each in batch}
                    await write_shadows(database, shadows, [each.change for each in batch])
                    await put_into_outbox(database, [said for each in batch for said in each.said])

        await asyncio.gather(write(0), write(1))
        elapsed = time.perf_counter() - started
    return Turn("rows", count, count / elapsed, postgres_us=(cpu_s(postgres.pid) - before) / count * 1e6)


async def pulse(  # noqa: PLR0917 - all of it is different things
    way: str,
    servers: tuple[NatsServer, PostgresServer],
    database: asyncpg.Connection[asyncpg.Record],
    client: PulseClient,
    role: Role,
    count: int,
) -> Turn:
    """The worker, ready and waiting when the first update may come."""
    await role.start()
    await asyncio.sleep(1)
    pids = (role.pid, *(server.pid for server in servers))
    before, started = [cpu_s(pid) for pid in pids], time.perf_counter()
    await pause(client)
    await publish(client, way, 1)  # nats-server delivers to pulls that wait only once a message arrives

    async def settled() -> bool:
        query = "SELECT sum(upper(r) - lower(r)) > $1 FROM ledger, unnest(positions) AS r"
        return bool(await database.fetchval(query, count))

    async def told() -> bool:
        return not await database.fetchval("SELECT EXISTS (SELECT FROM outbox)")

    await eventually(settled, f"{count} updates are settled", limit_s=LIMIT_S)
    elapsed = time.perf_counter() - started
    await eventually(told, "the outbox is empty", limit_s=LIMIT_S)
    told_s = time.perf_counter() - started
    cpu = [(cpu_s(pid) - was) / count * 1e6 for pid, was in zip(pids, before, strict=True)]
    assert role.deaths == []
    assert (await consumer_state(client, STREAM, CONSUMER)).pending == 0
    assert await database.fetchval("SELECT sum(version) = $1 FROM shadows", count + 1)
    return Turn(way, count, count / elapsed, count / told_s, *cpu)


async def take_turn(way: str, *, count: int, folder: Path, settings: Sequence[str]) -> Turn:
    """One way, on servers of its own."""
    nats = NatsServer(folder / "nats", port=ports.free_port(), monitor_port=ports.free_port(), password=PASSWORD)
    postgres = PostgresServer(
        folder / "postgres", port=ports.free_port(), password=PASSWORD, superuser_password=PASSWORD
    )
    servers = (nats, postgres)
    for server in servers:
        await asyncio.to_thread(server.start)
    system = System(nats=nats, database_url=postgres.url, folder=folder, topology=load(), devices=1)
    variables = {f"PULSE_{name.upper()}": value for name, _, value in (each.partition("=") for each in settings)}
    role = system.role("shadow", **variables)
    async with AsyncExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
        await system.prepare()
        database = await asyncpg.connect(postgres.url)
        stack.push_async_callback(database.close)
        if way == "rows":
            return await rows(system, postgres, count)
        client = await stack.enter_async_context(connection(nats.url, name="bench"))
        if way == "raw":
            await publish(client, way, count)
            return await raw(client, count)
        stack.callback(role.kill)
        await pause(client, "2099-01-01T00:00:00Z")
        await publish(client, way, count)
        return await pulse(way, servers, database, client, role, count)


def cpu_s(pid: int | None) -> float:
    """Of a process and its children, ended ones included."""
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    times = psutil.Process(pid).cpu_times()
    return float(total + times.children_user + times.children_system)


def machine() -> str:
    """What it was measured on, and how busy that was."""
    models = [line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if "model name" in line]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    one, five, _ = os.getloadavg()
    return f"{os.cpu_count()} × {cpu}, CPython {platform.python_version()}, load {one:.1f} (1 min) {five:.1f} (5 min)"


def print_table(turns: Sequence[Turn], about: str) -> None:
    """Medians, least and most of each way."""
    table = Table("way", "updates/s", "least", "most", "told/s", "worker µs", "nats µs", "postgres µs", box=None)
    for way in dict.fromkeys(turn.way for turn in turns):
        taken = [turn for turn in turns if turn.way == way]
        rates = [turn.per_s for turn in taken]
        rest = (
            statistics.median(getattr(turn, name) for turn in taken)
            for name in ("told_per_s", "worker_us", "nats_us", "postgres_us")
        )
        cells = (statistics.median(rates), min(rates), max(rates), *rest)
        table.add_row(way, *(f"{cell:,.0f}" if cell else "" for cell in cells))
    console = Console(width=max(110, Console().width))
    console.print(table)
    console.print(about, highlight=False, soft_wrap=True)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--updates", default=50_000, show_default=True, help="At most 100,000.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--ways", default=",".join(DEVICES), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where both servers store: a real disk.")
@click.option("--set", "settings", multiple=True, help="A setting of the worker, name=value.")
@click.option("--json", "as_json", is_flag=True)
def main(  # noqa: PLR0917 - click passes them by name
    updates: int, rounds: int, ways: str, folder: Path | None, settings: tuple[str, ...], as_json: bool
) -> None:
    """Measure, and print a table."""
    before, turns = machine(), []
    for _ in range(rounds):
        for way in ways.split(","):
            count = min(updates, OF_ONE_TENANT_MAX - 1) if way == "one" else updates
            with tempfile.TemporaryDirectory(prefix="pulse-bench-", dir=folder, ignore_cleanup_errors=True) as scratch:
                turns.append(uvloop.run(take_turn(way, count=count, folder=Path(scratch), settings=settings)))
    about = f"{before} at the start, {machine().rpartition(', ')[2]} at the end"
    if as_json:
        print(json.dumps({"turns": msgspec.to_builtins(turns), "machine": about}, indent=2))
    else:
        print_table(turns, about)


if __name__ == "__main__":
    main()
