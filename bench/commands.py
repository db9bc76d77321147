"""Commands a second, from asking to the device's last word: made → DOWN → MQTT → acknowledged → succeeded → stored.

    .venv/bin/python bench/commands.py [--json] [--rounds 3] [--count 4000] [--devices 200] [--folder DIR]

mosquitto, nats-server (which syncs before it answers), PostgreSQL, `pulse serve bridge`, `pulse serve commands` and the
devices, which answer at once, on the same cores. Each round has servers of its own.

    one by one   each command is a transaction of its own, eight at a time, as from the control API
    fleet        one request makes all of them
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import click
import msgspec
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from brokers import Mosquitto  # noqa: E402
from chaos.load import TENANT  # noqa: E402
from chaos.system import Role, System, eventually  # noqa: E402
from pulse.adapters.embedded import ports  # noqa: E402
from pulse.adapters.embedded.nats_server import NatsServer  # noqa: E402
from pulse.adapters.embedded.postgres_server import PostgresServer  # noqa: E402
from pulse.adapters.mqtt.packets import (  # noqa: E402
    Version,
    encode_connect,
    encode_pubacks,
    encode_publish,
    encode_subscribe,
)
from pulse.adapters.mqtt.reader import Reader  # noqa: E402
from pulse.adapters.postgres.commands import CommandStore  # noqa: E402
from pulse.adapters.postgres.pool import open_pool  # noqa: E402
from pulse.domain.command import NewCommand  # noqa: E402
from pulse.domain.fleet import Filter, NewFleet  # noqa: E402
from pulse.topology.declared import load  # noqa: E402

MAKERS = 8
HOUR_MS = 3_600_000
LIMIT_S = 120.0
PASSWORD = secrets.token_urlsafe(16)
WAYS = ("one by one", "fleet")
PACKET_ID_MAX = 65_535
LATENCIES = """
    SELECT percentile_cont($1::float8[]) WITHIN GROUP (ORDER BY ended.at_ms - begun.at_ms)
    FROM command_moves AS begun JOIN command_moves AS ended USING (tenant_id, command_id)
    WHERE begun.state = 'queued' AND ended.state = 'succeeded'
"""


class Turn(msgspec.Struct, frozen=True):
    """Commands a second, ms from made to the last word at the edge, and the CPU of each part in µs a command."""

    way: str
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]


@asynccontextmanager
async def devices(broker: Mosquitto) -> AsyncIterator[None]:
    """All devices, on one connection: each command is acknowledged, and succeeds, as soon as it is heard."""
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    writer.write(encode_connect(version=Version.V3_1_1, client_id="devices", keep_alive_s=0, clean_start=True))
    await reader.readexactly(4)
    writer.write(encode_subscribe(1, [f"tenant/{TENANT}/device/+/commands"], version=Version.V3_1_1))
    await reader.readexactly(5)
    answering = asyncio.create_task(_answer(reader, writer), name="devices")
    try:
        yield
    finally:
        answering.cancel()
        await asyncio.wait([answering])
        writer.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    packets, packet_id = Reader(Version.V3_1_1), 1
    while data := await reader.read(262_144):
        arrivals, _ = packets.feed(data)
        for arrival in arrivals:
            command_id = msgspec.json.decode(arrival.payload)["commandId"]
            for state in ("acknowledged", "succeeded"):
                packet_id = packet_id % PACKET_ID_MAX + 1
                answer = msgspec.json.encode({"commandId": command_id, "state": state})
                topic = f"{arrival.topic.decode()}/ack"
                writer.write(encode_publish(topic, answer, packet_id=packet_id, version=Version.V3_1_1))
        writer.write(encode_pubacks([arrival.packet_id for arrival in arrivals]))
        await writer.drain()


async def make(way: str, store: CommandStore, device_ids: Sequence[str], count: int) -> None:
    """Ask for `count` commands."""
    if way == "fleet":
        for _ in range(count // len(device_ids)):
            fleet = NewFleet(
                tenant_id=TENANT,
                name="blink",
                payload=b'{"times":3}',
                ttl_ms=HOUR_MS,
                timeout_ms=HOUR_MS,
                filter=Filter(all=True),
            )
            await store.create_fleet(fleet, who="bench", at_ms=_now_ms())
        return

    async def maker(first: int) -> None:
        for number in range(first, count, MAKERS):
            command = NewCommand(
                tenant_id=TENANT,
                device_id=device_ids[number % len(device_ids)],
                name="blink",
                payload=b'{"times":3}',
                ttl_ms=HOUR_MS,
                timeout_ms=HOUR_MS,
            )
            await store.create(command, who="bench", at_ms=_now_ms())

    await asyncio.gather(*map(maker, range(MAKERS)))


async def take_turn(way: str, *, count: int, device_count: int, folder: Path) -> Turn:
    """One way, on servers of its own."""
    nats = NatsServer(folder / "nats", port=ports.free_port(), monitor_port=ports.free_port(), password=PASSWORD)
    postgres = PostgresServer(
        folder / "postgres", port=ports.free_port(), password=PASSWORD, superuser_password=PASSWORD
    )
    broker = Mosquitto(folder=folder / "mosquitto", inflight=1000)
    servers = (nats, postgres, broker)
    for server in servers:
        await asyncio.to_thread(server.start)
    try:
        system = System(nats=nats, database_url=postgres.url, folder=folder, topology=load(), devices=device_count)
        await system.prepare()
        many = {f"PULSE_{who}_MESSAGES_PER_S": "1000000" for who in ("DEVICE", "TENANT")}
        bridge = system.role("bridge", PULSE_MQTT_URL=broker.url, PULSE_MQTT_CLIENT_ID="bridge-1", **many)
        return await _measure(way, system, {"bridge": bridge, "commands": system.role("commands")}, servers, count)
    finally:
        for server in reversed(servers):
            server.kill()


async def _measure(
    way: str,
    system: System,
    roles: dict[str, Role],
    servers: tuple[NatsServer, PostgresServer, Mosquitto],
    count: int,
) -> Turn:
    nats, postgres, broker = servers
    async with AsyncExitStack() as stack:
        for role in roles.values():
            await role.start()
            stack.callback(role.kill)
        await stack.enter_async_context(devices(broker))
        pool = await stack.enter_async_context(
            open_pool(system.database_url, size_max=MAKERS, timeout_s=10, application_name="bench")
        )
        pids = {name: role.pid for name, role in roles.items()}
        pids |= {"nats-server": nats.pid or 0, "postgres": postgres.pid or 0, "mosquitto": broker.process.pid or 0}

        async def all_succeeded() -> bool:
            return bool(await pool.fetchval("SELECT count(*) = $1 FROM commands WHERE state = 'succeeded'", count))

        started, before = time.perf_counter(), {name: _cpu_s(pid) for name, pid in pids.items()}
        await make(way, CommandStore(pool, open_max=count), list(system.tokens), count)
        await eventually(all_succeeded, f"{count} commands succeed", limit_s=LIMIT_S)
        elapsed = time.perf_counter() - started
        cpu = {name: (_cpu_s(pid) - before[name]) / count * 1e6 for name, pid in pids.items()}
        p50_ms, p99_ms = await pool.fetchval(LATENCIES, [0.5, 0.99])
    return Turn(way, count / elapsed, p50_ms, p99_ms, cpu)


def _cpu_s(pid: int) -> float:
    """Of a process and its children, PostgreSQL's among them, that are there now."""
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--count", default=4000, show_default=True, help="Commands in a turn; rounded down to whole fleets.")
@click.option("--devices", "device_count", default=200, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the servers store; its disk is measured too.")
def main(as_json: bool, rounds: int, count: int, device_count: int, folder: Path | None) -> None:
    """Measure and print."""
    turns: list[Turn] = []
    count -= count % device_count
    for _ in range(rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory(dir=folder, prefix="pulse-bench-", ignore_cleanup_errors=True) as own:
                turns.append(asyncio.run(take_turn(way, count=count, device_count=device_count, folder=Path(own))))
            if not as_json:
                Console(stderr=True).print(turns[-1])
    if as_json:
        print(json.dumps([msgspec.structs.asdict(turn) for turn in turns]))
        return
    console = Console()
    load_1 = os.getloadavg()[0]
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {load_1:.1f}, CPython {platform.python_version()}"
    )
    parts = list(turns[0].cpu_us)
    table = Table("", "commands/s (median)", "least–most", "p50 ms", "p99 ms", *(f"{part} µs" for part in parts))
    for way in WAYS:
        own_turns = [turn for turn in turns if turn.way == way]
        rates = [turn.per_s for turn in own_turns]
        cpu = [f"{statistics.median(turn.cpu_us[part] for turn in own_turns):.0f}" for part in parts]
        latencies = [
            f"{statistics.median(getattr(turn, name) for turn in own_turns):.0f}" for name in ("p50_ms", "p99_ms")
        ]
        table.add_row(way, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}–{max(rates):,.0f}", *latencies, *cpu)
    console.print(table)


if __name__ == "__main__":
    main()
