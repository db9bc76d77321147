"""Requests a second of the gateway, fsync included, beside the same application with no NATS behind it.

    .venv/bin/python bench/gateway.py [--json] [--rounds 3] [--seconds 3] [--connections 64,256] [--rows 100]

    pulse   `pulse serve gateway` on a nats-server with sync_interval: always
    app     the same application on the same server, its messages answered at once: what HTTP alone costs

The load comes from wrk (apt-get install wrk), on the same machine as all else. The two take turns within every round,
so that whatever else the machine does falls on both; the table shows medians, least and most. Each device sends one
message a request, or a batch of `--rows`. Whether the stream has grown by as much as was answered is checked.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from publish import fsync_us, machine
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.nats.streams import stream_state
from pulse.api.bodies import BodyBounds
from pulse.api.device import DeviceApi
from pulse.api.device_paths import SINGLE
from pulse.domain.identity import Device, Tenant, TokenDigest, digest
from pulse.domain.limits import Rate, RateLimits
from pulse.domain.receipt import Receipt, Waiting
from pulse.domain.registry import Change, Complete, Put, Reading, Record, record_key
from pulse.domain.shadow import ShadowBounds
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.runtime.health import health_app
from pulse.runtime.http import Direct, UvicornService
from pulse.runtime.lifecycle import stop_on_signals
from pulse.runtime.metrics import GatewayMetrics
from pulse.runtime.settings import Settings
from pulse.services.gateway import Gateway
from pulse.services.registry import DeviceRegistry
from pulse.topology.declared import Declared, load

TENANT, TOKEN, DEVICES = "bench", "pulse_" + "x" * 43, 500
READY_S_MAX = 20.0
SOURCE = str(Path(__file__).resolve().parents[1] / "src")
METRICS = {"temperature": 21.5, "humidity": 48.25, "pressure": 1013.2, "door": "closed", "ok": True, "battery": 87}
"""About 120 bytes; 250 with the envelope."""
LUA = """
local requests, next_one = {{}}, 0
function init(args)
  wrk.headers["Authorization"] = "Bearer {token}"
  wrk.headers["Content-Type"] = "application/json"
  for device = 0, {devices} - 1 do
    local path = string.gsub("{path}", "DEVICE", "d" .. device)
    local body = string.gsub([[{body}]], "DEVICE", "d" .. device)
    requests[device] = wrk.format("POST", path, nil, body)
  end
end
function request()
  next_one = (next_one + 1) % {devices}
  return requests[next_one]
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("\\nRESULT %d %d %f %f %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""


class Turn(msgspec.Struct, frozen=True):
    """One way of serving one kind of load: requests a second, waits in ms, CPU of the serving process a request."""

    way: str
    load: str
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    failed: int


class Load(msgspec.Struct, frozen=True):
    """What wrk sends: over so many connections, so many readings a request."""

    name: str
    connections: int
    rows: int
    script: Path


class AtOnce:
    """A publisher that has every message on disk before it is asked."""

    def __init__(self) -> None:
        self._seq = itertools.count(1)
        self._loop = asyncio.get_running_loop()

    def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        future: asyncio.Future[Receipt] = self._loop.create_future()
        future.set_result(Receipt("TELEMETRY", next(self._seq)))
        return future

    def send(self, subject: str, body: bytes, *, message_id: str, waiting: Waiting) -> None:
        waiting.set_result(Receipt("TELEMETRY", next(self._seq)))


def records() -> list[Record]:
    token = TokenDigest(digest(TOKEN))
    devices = [Device(TENANT, f"d{number}", enabled=True, tokens=(token,)) for number in range(DEVICES)]
    return [Tenant(TENANT, enabled=True), *devices]


async def serve_app(port: int) -> None:
    """The same application, without NATS."""
    settings = Settings()
    registry = DeviceRegistry()
    changes: list[Change] = [Reading(from_scratch=True), *map(Put, records()), Complete()]
    for change in changes:
        registry.apply(change)
    metrics = CollectorRegistry()
    app = DeviceApi(
        gateway=Gateway(
            publisher=AtOnce(),
            registry=registry,
            decoder=PayloadDecoder(msgspec.convert(settings, Bounds, from_attributes=True)),
            shadow_bounds=msgspec.convert(settings, ShadowBounds, from_attributes=True),
            limits=RateLimits(device=Rate(1e6, 10**6), tenant=Rate(1e6, 10**6)),
        ),
        metrics=GatewayMetrics(metrics),
        durability="none",
        bounds=msgspec.convert(settings, BodyBounds, from_attributes=True),
        other=health_app(checks=[], registry=metrics),
    )
    with stop_on_signals() as stop:
        direct = Direct(SINGLE, app.direct)
        service = UvicornService(name="app", app=app, direct=direct, host="127.0.0.1", port=port, setting="app")
        await service.run(stop)


async def prepare(url: str) -> None:
    """TELEMETRY as declared but for its limit a subject, and the devices."""
    shipped = load()
    streams = tuple(
        msgspec.structs.replace(stream, max_msgs_per_subject=-1) if stream.name == "TELEMETRY" else stream
        for stream in shipped.streams
    )
    declared = Declared(streams=streams, consumers=())
    by_key = {record_key(record): record for record in records()}

    async def known(keys: Sequence[str]) -> Mapping[str, Record]:
        return {key: by_key[key] for key in keys}

    async with connection(url, name="bench") as client:
        provisioner = Provisioner(client)
        await provisioner.apply(declared, await provisioner.plan(declared))
        await RegistryBucket(client).project(list(by_key), known)


async def last_seq(url: str) -> int:
    async with connection(url, name="bench") as client:
        return (await stream_state(client, "TELEMETRY")).last_seq


@contextmanager
def process(arguments: Sequence[str], port: int, log: Path) -> Iterator[psutil.Process]:
    """A child that answers at `port`, ended at the end."""
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": SOURCE},
            stdout=file,
            stderr=file,
            cwd=log.parent,
        )
    try:
        deadline = time.monotonic() + READY_S_MAX
        while not _answers(f"http://127.0.0.1:{port}/readyz"):
            if child.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException(f"{arguments} is not ready:\n{log.read_text()}")
            time.sleep(0.05)
        yield psutil.Process(child.pid)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:  # noqa: S310 - our own http URL
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def script_for(folder: Path, *, rows: int) -> Path:
    """The Lua script that makes each device's request once and sends them in turn."""
    payload = {"metrics": METRICS}
    path, body = f"/ingest/v1/tenant/{TENANT}/device/DEVICE/telemetry", json.dumps(payload, separators=(",", ":"))
    if rows > 1:
        path = "/ingest/v1/batch"
        messages = [{"payload": payload}] * rows
        body = json.dumps({"tenant_id": TENANT, "device_id": "DEVICE", "messages": messages}, separators=(",", ":"))
    script = folder / f"post-{rows}.lua"
    script.write_text(LUA.format(token=TOKEN, devices=DEVICES, path=path, body=body))
    return script


def take_turn(way: str, load_: Load, port: int, server: psutil.Process, *, seconds: float) -> Turn:
    """Let wrk send for `seconds`."""
    before = sum(server.cpu_times()[:2])
    command = ["wrk", "-t1", f"-c{load_.connections}", f"-d{seconds:g}s", "--timeout", "10s", "-s", str(load_.script)]
    said = subprocess.run(
        [*command, f"http://127.0.0.1:{port}"], capture_output=True, text=True, check=True, timeout=seconds + 30
    ).stdout
    cpu_s = sum(server.cpu_times()[:2]) - before
    _, requests, duration_us, p50_us, p99_us, failed = said[said.rindex("RESULT") :].split()
    return Turn(
        way=way,
        load=load_.name,
        per_s=int(requests) / int(duration_us) * 1e6 * load_.rows,
        p50_ms=float(p50_us) / 1000,
        p99_ms=float(p99_us) / 1000,
        cpu_us=cpu_s / max(1, int(requests)) * 1e6 / load_.rows,
        failed=int(failed),
    )


def measure(folder: Path, *, loads: Sequence[Load], rounds: int, seconds: float) -> tuple[list[Turn], list[float]]:
    """All turns, and the time of an fsync before each round."""
    turns: list[Turn] = []
    fsyncs: list[float] = []
    nats = NatsServer(
        folder / "nats", port=ports.free_port(), monitor_port=ports.free_port(), password=secrets.token_hex(8)
    )
    with ExitStack() as stack:
        nats.start()
        stack.callback(nats.stop)
        asyncio.run(prepare(nats.url))
        gateway_port, app_port = ports.free_port(), ports.free_port()
        settings = {
            "nats_url": nats.url,
            "gateway_port": gateway_port,
            "health_port": ports.free_port(),
            "log_level": "warning",
            # On, far above what can be sent: what they cost is in the figures.
            "device_messages_per_s": 1e6,
            "device_messages_burst": 10**6,
            "tenant_messages_per_s": 1e6,
            "tenant_messages_burst": 10**6,
        }
        sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        gateway = stack.enter_context(
            process(["-m", "pulse", *sets, "serve", "gateway"], gateway_port, folder / "gateway.log")
        )
        this = str(Path(__file__).resolve())
        app = stack.enter_context(process([this, "--serve-app", str(app_port)], app_port, folder / "app.log"))
        for round_ in range(rounds + 1):
            fsyncs.append(fsync_us(folder))
            for load_ in loads:
                before = asyncio.run(last_seq(nats.url))
                taken = [
                    take_turn("app", load_, app_port, app, seconds=seconds if round_ else 1.0),
                    take_turn("pulse", load_, gateway_port, gateway, seconds=seconds if round_ else 1.0),
                ]
                grown = asyncio.run(last_seq(nats.url)) - before
                answered = taken[1].per_s * (seconds if round_ else 1.0)
                if grown < 0.95 * answered:
                    raise click.ClickException(f"{answered:.0f} were answered and {grown} are in the stream")
                if round_:  # the one before is the warm-up
                    turns += taken
    return turns, fsyncs[1:]


def summary(turns: Sequence[Turn], loads: Sequence[Load]) -> list[dict[str, Any]]:
    """A row for each load and way, with the ratio of its median to that of the application alone."""
    rows = []
    for load_ in loads:
        alone = statistics.median(turn.per_s for turn in turns if (turn.load, turn.way) == (load_.name, "app"))
        for way in ("app", "pulse"):
            taken = [turn for turn in turns if (turn.load, turn.way) == (load_.name, way)]
            rates = [turn.per_s for turn in taken]
            rows.append(
                {
                    "load": load_.name,
                    "way": way,
                    "per_s": round(statistics.median(rates)),
                    "per_s_min": round(min(rates)),
                    "per_s_max": round(max(rates)),
                    "ratio": round(statistics.median(rates) / alone, 2),
                    "p50_ms": round(statistics.median(turn.p50_ms for turn in taken), 1),
                    "p99_ms": round(statistics.median(turn.p99_ms for turn in taken), 1),
                    "cpu_us": round(statistics.median(turn.cpu_us for turn in taken), 1),
                    "failed": sum(turn.failed for turn in taken),
                }
            )
    return rows


def print_table(rows: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> None:
    table = Table(title="The gateway over HTTP, nats-server with sync_interval: always")
    for name in ("load", "way", "readings/s", "least", "most", "of app", "p50 ms", "p99 ms", "CPU µs", "failed"):
        table.add_column(name, justify="left" if name in {"load", "way"} else "right")
    for row in rows:
        rates = (f"{row[name]:,}" for name in ("per_s", "per_s_min", "per_s_max"))
        rest = (str(row[name]) for name in ("ratio", "p50_ms", "p99_ms", "cpu_us", "failed"))
        table.add_row(row["load"], row["way"], *rates, *rest, end_section=row["way"] == "pulse")
    console = Console(width=max(110, Console().width))
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--connections", default="64,256", show_default=True, help="Of single messages.")
@click.option("--batch-connections", default=16, show_default=True)
@click.option("--rows", default=100, show_default=True, help="Of a batch.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Of one turn.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the stream is stored: a real disk.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--serve-app", type=int, hidden=True)
def main(  # noqa: PLR0917 - click passes them by name
    connections: str,
    batch_connections: int,
    rows: int,
    rounds: int,
    seconds: float,
    folder: Path | None,
    as_json: bool,
    serve_app: int | None,
) -> None:
    if serve_app is not None:
        uvloop.run(globals()["serve_app"](serve_app))
        return
    if shutil.which("wrk") is None:
        raise click.ClickException("wrk, which makes the load, is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory(prefix="pulse-bench-", dir=folder) as scratch:
        single, batch = script_for(Path(scratch), rows=1), script_for(Path(scratch), rows=rows)
        loads = [Load(f"{n} connections", n, 1, single) for n in map(int, connections.split(","))]
        loads.append(Load(f"batches of {rows}, {batch_connections} connections", batch_connections, rows, batch))
        turns, fsyncs = measure(Path(scratch), loads=loads, rounds=rounds, seconds=seconds)
    found = summary(turns, loads)
    if as_json:
        fsync = {"median": statistics.median(fsyncs), "min": min(fsyncs), "max": max(fsyncs)}
        print(json.dumps({"machine": machine(), "fsync_us": fsync, "rows": found}, indent=2))
        return
    how = f"{rounds} rounds of {seconds:g} s after a warm-up, wrk with one thread, {DEVICES} devices, limits on"
    print_table(found, [how, f"an fsync of 4 KiB: {statistics.median(fsyncs):.0f} µs", machine()])


if __name__ == "__main__":
    main()
