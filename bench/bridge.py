"""From an MQTT broker into TELEMETRY: messages a second, with one bridge and with two, beside the client alone.

    .venv/bin/python bench/bridge.py [--json] [--rounds 3] [--seconds 5] [--inflight 1000] [--folder DIR]

mosquitto, nats-server (which syncs before it answers) and the load, QoS 1, on the same cores. The load keeps a bounded
lead over what has arrived, so broker and bridge are busy all the while. The ways take turns within a round.

    client     the bridge's MQTT client, which acknowledges each message as it comes, and nothing behind it
    1 bridge   `pulse serve bridge`: a PUBACK for each message once JetStream has it on disk
    2 bridges  two of them, which share the subscription
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import click
import msgspec
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from bridge_load import DEVICES, TENANTS  # noqa: E402
from brokers import Mosquitto  # noqa: E402
from gateway_process import NOWHERE, answers, project  # noqa: E402
from pulse.adapters.embedded import ports  # noqa: E402
from pulse.adapters.embedded.nats_server import NatsServer  # noqa: E402
from pulse.adapters.nats.connection import PulseClient, connection  # noqa: E402
from pulse.adapters.nats.provisioner import Provisioner  # noqa: E402
from pulse.adapters.nats.streams import stream_state  # noqa: E402
from pulse.domain.identity import Device, Tenant  # noqa: E402
from pulse.topology.declared import load  # noqa: E402

LOAD = str(Path(__file__).with_name("bridge_load.py"))
PASSWORD = secrets.token_urlsafe(16)
WARM_UP_S = 1.0
POLL_S = 0.05
FSYNC_TRIES = 100
WAYS = {"client": 0, "1 bridge": 1, "2 bridges": 2}


class Turn(msgspec.Struct, frozen=True):
    """One way for a while: messages a second, the CPU of each part in µs a message, and what an fsync took before."""

    way: str
    per_s: float
    fsync_us: float
    cpu_us: dict[str, float]


async def prepare(client: PulseClient) -> None:
    """Streams and devices."""
    provisioner, declared = Provisioner(client), load()
    await provisioner.apply(declared, await provisioner.plan(declared))
    tenants = [Tenant(f"tenant-{number}", enabled=True) for number in range(TENANTS)]
    devices = [Device(f"tenant-{n % TENANTS}", f"device-{n:05}", enabled=True) for n in range(DEVICES)]
    await project(client, [*tenants, *devices])


@asynccontextmanager
async def bridges(count: int, nats: NatsServer, broker: Mosquitto, folder: Path) -> AsyncIterator[list[int]]:
    """That many `pulse serve bridge`, ready; their pids."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PULSE_")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "NATS_URL": nats.url, "DATABASE_URL": NOWHERE}
    environment |= {f"PULSE_{who}_MESSAGES_PER_S": "1000000" for who in ("DEVICE", "TENANT")}
    running = []
    try:
        for number in range(count):
            port = ports.free_port()
            own = {"PULSE_MQTT_URL": broker.url, "PULSE_MQTT_CLIENT_ID": f"bridge-{number}"}
            with (folder / f"bridge-{number}.log").open("wb") as output:
                running.append(
                    subprocess.Popen(  # noqa: ASYNC220 - it has to be there before the next step
                        [sys.executable, "-m", "pulse", "serve", "bridge"],
                        env=environment | own | {"PULSE_HEALTH_PORT": str(port)},
                        stdout=output,
                        stderr=output,
                        cwd=folder,
                    )
                )
            await answers(f"http://127.0.0.1:{port}/readyz")
        yield [each.pid for each in running]
    finally:
        for each in running:
            each.terminate()
            each.wait(10)


@asynccontextmanager
async def bare_client(broker: Mosquitto) -> AsyncIterator[tuple[int, Callable[[], int]]]:
    """The client alone: its pid, and how many messages it has had."""
    process = subprocess.Popen(  # noqa: ASYNC220 - it has to be there before the next step
        [sys.executable, LOAD, "receive", broker.url, "client"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )
    seen = 0

    def listen() -> None:
        nonlocal seen
        assert process.stdout is not None
        for line in process.stdout:
            seen = int(line)

    await asyncio.to_thread(lambda: process.stdout.readline() if process.stdout else None)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield process.pid, lambda: seen
    finally:
        process.kill()
        process.wait()


async def take_turn(way: str, *, seconds: float, inflight: int, folder: Path) -> Turn:
    """Run `way` on servers of its own."""
    nats = NatsServer(folder / "nats", port=ports.free_port(), monitor_port=ports.free_port(), password=PASSWORD)
    broker = Mosquitto(folder=folder / "mosquitto", inflight=inflight)
    nats.start()
    broker.start()
    fsync = _fsync_us(folder)
    try:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(connection(nats.url, name="bench"))
            await prepare(client)
            parts: dict[str, list[int]] = {"mosquitto": [broker.process.pid or 0], "nats-server": [nats.pid or 0]}
            if WAYS[way]:
                parts["bridge"] = await stack.enter_async_context(bridges(WAYS[way], nats, broker, folder))
                count = None
            else:
                pid, count = await stack.enter_async_context(bare_client(broker))
                parts["client"] = [pid]

            async def arrived() -> int:
                return count() if count is not None else (await stream_state(client, "TELEMETRY")).last_seq

            with subprocess.Popen(  # noqa: ASYNC220 - it has to be there before the next step
                [sys.executable, LOAD, "publish", str(broker.port)],
                env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
                stdin=subprocess.PIPE,
                text=True,
            ) as publisher:
                try:
                    parts["load"] = [publisher.pid]
                    return await _measure(way, parts, arrived, publisher, seconds, fsync_us=fsync)
                finally:
                    publisher.kill()
    finally:
        broker.kill()
        nats.kill()


async def _measure(
    way: str,
    parts: dict[str, list[int]],
    arrived: Callable[[], Awaitable[int]],
    publisher: subprocess.Popen[str],
    seconds: float,
    *,
    fsync_us: float,
) -> Turn:
    async def follow(until: float) -> int:
        while True:
            now = await arrived()
            print(now, file=publisher.stdin, flush=True)
            if time.perf_counter() >= until:
                return now
            await asyncio.sleep(POLL_S)

    first = await follow(time.perf_counter() + WARM_UP_S)
    started, cpu = time.perf_counter(), {part: _cpu_s(pids) for part, pids in parts.items()}
    last = await follow(started + seconds)
    elapsed = time.perf_counter() - started
    count = max(1, last - first)
    return Turn(
        way=way,
        per_s=count / elapsed,
        fsync_us=fsync_us,
        cpu_us={part: (_cpu_s(pids) - cpu[part]) / count * 1e6 for part, pids in parts.items()},
    )


def _fsync_us(folder: Path) -> float:
    """The median of an appended 4 KiB and its fsync: the least that any durable answer costs."""
    times = []
    with (folder / "fsync").open("wb", buffering=0) as file:
        for _ in range(FSYNC_TRIES):
            started = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def _cpu_s(pids: Sequence[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(each.user + each.system for each in times))


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=5.0, show_default=True)
@click.option("--inflight", default=1000, show_default=True, help="mosquitto's max_inflight_messages.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where nats-server stores; its disk is what is measured."
)
def main(as_json: bool, rounds: int, seconds: float, inflight: int, folder: Path | None) -> None:
    """Measure and print."""
    turns: list[Turn] = []
    for _ in range(rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory(dir=folder, prefix="pulse-bench-") as own:
                turns.append(asyncio.run(take_turn(way, seconds=seconds, inflight=inflight, folder=Path(own))))
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
    parts = ["client", "bridge", "nats-server", "mosquitto", "load"]
    table = Table("", "msg/s (median)", "least–most", *(f"{part} µs" for part in parts))
    for way in WAYS:
        own_turns = [turn for turn in turns if turn.way == way]
        rates = [turn.per_s for turn in own_turns]
        cpu = [
            f"{statistics.median(turn.cpu_us[part] for turn in own_turns):.1f}" if part in own_turns[0].cpu_us else ""
            for part in parts
        ]
        table.add_row(way, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}–{max(rates):,.0f}", *cpu)
    console.print(table)


if __name__ == "__main__":
    main()
