"""What a device at 100 times its rate and a tenant at 10 times its own do to everybody else's waits.

    .venv/bin/python bench/fairness.py [--json] [--rounds 5] [--seconds 4]

    quiet    50 devices of tenant `acme`, each below its rate: these are measured
    device   one more device of `acme`, at 100 times the rate of a device
    tenant   another tenant, with limits of its own, whose devices together send 10 times what it may

`pulse serve gateway` on a nats-server with sync_interval: always. The noise comes from a process of its own. A round
has three turns, in an order that changes, so that whatever else the machine does falls on all of them:

    alone        no noise
    elsewhere    the noise goes to a second gateway: what it takes from the machine, but not from the gateway measured
    here         the noise goes to the same gateway

All senders keep to their rate, whatever they are answered; the wait of a request that was due before its predecessor
was answered begins when it was due. The ratios are those of the medians over all rounds, to `alone` and `elsewhere`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop
from rich.console import Console
from rich.table import Table

from gateway import METRICS, TOKEN, process
from publish import fsync_us, machine
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.registry import RegistryBucket
from pulse.domain.identity import Device, Tenant, TokenDigest, digest
from pulse.domain.limits import Rate, TenantLimits
from pulse.domain.registry import Record, record_key
from pulse.topology.declared import load

QUIET_DEVICES = 50
QUIET_PER_S = 2.5
DEVICE_RATE = Rate(5.0, 10)
TENANT_RATE = Rate(50.0, 100)
"""Of the noisy tenant, whose devices have no limit each, so that its own is the one that is met."""
DEVICE_TIMES, TENANT_TIMES = 100, 10
NOISY_CONNECTIONS = 16
ANSWER_S_MAX = 10.0
ALONE, ELSEWHERE, HERE = NOISES = ("alone", "elsewhere", "here")
BODY = json.dumps({"metrics": METRICS}, separators=(",", ":")).encode()


class Heard(msgspec.Struct):
    """What one group of senders was answered: how often each status and limit, and the waits in ms."""

    answers: dict[str, int] = {}
    waits_ms: list[float] = []


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A few seconds with noise or without; `cpu_us` is the CPU of the gateway measured, a request."""

    noise: str
    quiet: Heard
    device: Heard | None = None
    tenant: Heard | None = None
    cpu_us: float = math.nan


def request(tenant_id: str, device_id: str) -> bytes:
    """A whole request of a device."""
    path = f"/ingest/v1/tenant/{tenant_id}/device/{device_id}/telemetry"
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


class Sender:
    """One connection that sends its requests in turn at one rate; a tenth of the CPU of a client library."""

    def __init__(self, requests: Sequence[bytes], *, per_s: float, first_in_s: float, heard: Heard) -> None:
        self._requests = requests
        self._interval_s = 1 / per_s
        self._first_in_s = first_in_s
        self._heard = heard

    async def run(self, port: int, seconds: float) -> None:
        """Send for so long; what is due then is not sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        begin_s = time.perf_counter()
        due_s = begin_s + self._first_in_s
        number = 0
        async with asyncio.timeout(seconds + ANSWER_S_MAX):
            while due_s < begin_s + seconds:
                from_s = due_s
                if (early_s := due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(early_s)
                    from_s = time.perf_counter()
                writer.write(self._requests[number % len(self._requests)])
                answer = await _answer(reader)
                self._heard.waits_ms.append((time.perf_counter() - from_s) * 1000)
                self._heard.answers[answer] = self._heard.answers.get(answer, 0) + 1
                number += 1
                due_s += self._interval_s
        writer.close()
        await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> str:
    """The status of the next answer, and the limit that it names where it does."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    body = json.loads(await reader.readexactly(length))
    return f"{head[9:12].decode()} {body.get('limit', '')}".strip()


async def send(requests: Sequence[bytes], *, port: int, connections: int, per_s: float, seconds: float) -> Heard:
    """All `requests` together at `per_s`, over so many connections."""
    heard = Heard()
    async with asyncio.TaskGroup() as group:
        for index in range(connections):
            share = requests[index::connections] or requests
            sender = Sender(share, per_s=per_s / connections, first_in_s=index / per_s, heard=heard)
            group.create_task(sender.run(port, seconds))
    return heard


async def make_noise(port: int, seconds: float) -> dict[str, Heard]:
    """The two noisy ones."""
    async with asyncio.TaskGroup() as group:
        device = group.create_task(
            send(
                [request("acme", "loud")],
                port=port, connections=NOISY_CONNECTIONS, per_s=DEVICE_RATE.per_s * DEVICE_TIMES, seconds=seconds,
            )
        )  # fmt: skip
        tenant = group.create_task(
            send(
                [request("loud", f"d{number}") for number in range(QUIET_DEVICES)],
                port=port, connections=NOISY_CONNECTIONS, per_s=TENANT_RATE.per_s * TENANT_TIMES, seconds=seconds,
            )
        )  # fmt: skip
    return {"device": device.result(), "tenant": tenant.result()}


async def prepare(url: str) -> None:
    """Streams, tenants and devices."""
    token = (TokenDigest(digest(TOKEN)),)
    unlimited = Rate(0, 1)
    records: list[Record] = [
        Tenant("acme", enabled=True),
        Tenant("loud", enabled=True, limits=TenantLimits(messages=TENANT_RATE, device_messages=unlimited)),
        Device("acme", "loud", enabled=True, tokens=token),
    ]
    for tenant_id in ("acme", "loud"):
        records += [Device(tenant_id, f"d{number}", enabled=True, tokens=token) for number in range(QUIET_DEVICES)]
    by_key = {record_key(record): record for record in records}

    async def known(keys: Sequence[str]) -> dict[str, Record]:
        return {key: by_key[key] for key in keys}

    async with connection(url, name="bench") as client:
        declared = load()
        provisioner = Provisioner(client)
        await provisioner.apply(declared, await provisioner.plan(declared))
        await RegistryBucket(client).project(list(by_key), known)


async def take_turn(noise_: str, port: int, noise_port: int, server: psutil.Process, *, seconds: float) -> Turn:
    """The quiet devices for `seconds`, and the noise from another process."""
    before_s = sum(server.cpu_times()[:2])
    noise = None
    if noise_ != ALONE:
        to_port = port if noise_ == HERE else noise_port
        arguments = [__file__, "--make-noise", str(to_port), "--seconds", str(seconds + 0.5)]
        noise = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=subprocess.PIPE)
        assert noise.stdout is not None
        await noise.stdout.readline()
    quiet = await send(
        [request("acme", f"d{number}") for number in range(QUIET_DEVICES)],
        port=port, connections=QUIET_DEVICES, per_s=QUIET_DEVICES * QUIET_PER_S, seconds=seconds,
    )  # fmt: skip
    if noise is None:
        return Turn(noise=noise_, quiet=quiet, cpu_us=_cpu_us(server, before_s, quiet))
    said, _ = await noise.communicate()
    heard = msgspec.json.decode(said, type=dict[str, Heard])
    cpu_us = _cpu_us(server, before_s, quiet, *(heard.values() if noise_ == HERE else ()))
    return Turn(noise=noise_, quiet=quiet, device=heard["device"], tenant=heard["tenant"], cpu_us=cpu_us)


def _cpu_us(server: psutil.Process, before_s: float, *heard: Heard) -> float:
    answered = sum(sum(each.answers.values()) for each in heard)
    spent_s = float(sum(server.cpu_times()[:2])) - before_s
    return spent_s / max(1, answered) * 1e6


async def measure(folder: Path, *, rounds: int, seconds: float) -> tuple[list[Turn], list[float]]:
    """All turns, and the time of an fsync before each round."""
    turns: list[Turn] = []
    fsyncs: list[float] = []
    nats = NatsServer(
        folder / "nats", port=ports.free_port(), monitor_port=ports.free_port(), password=secrets.token_hex(8)
    )
    with ExitStack() as stack:
        nats.start()
        stack.callback(nats.stop)
        await prepare(nats.url)
        port, gateway = serve_gateway(stack, nats.url, folder / "gateway.log")
        noise_port, _ = serve_gateway(stack, nats.url, folder / "second.log")
        for noise in (HERE, ELSEWHERE):
            await take_turn(noise, port, noise_port, gateway, seconds=1.0)
        for order in itertools.islice(itertools.cycle(itertools.permutations(NOISES)), rounds):
            fsyncs.append(fsync_us(folder))
            for noise in order:
                turns += [await take_turn(noise, port, noise_port, gateway, seconds=seconds)]
    return turns, fsyncs


def serve_gateway(stack: ExitStack, nats_url: str, log: Path) -> tuple[int, psutil.Process]:
    """A gateway that ends with `stack`."""
    port = ports.free_port()
    settings = {
        "nats_url": nats_url,
        "gateway_port": port,
        "health_port": ports.free_port(),
        "log_level": "warning",
        "device_messages_per_s": DEVICE_RATE.per_s,
        "device_messages_burst": DEVICE_RATE.burst,
    }
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return port, stack.enter_context(process(["-m", "pulse", *sets, "serve", "gateway"], port, log))


def percentile(waits_ms: Sequence[float], percent: float) -> float:
    """The least wait that so many per cent do not exceed."""
    ordered = sorted(waits_ms)
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * percent / 100) - 1)]


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """Medians over the rounds of p50 and p99 by turn, their ratios, and all answers by sender."""
    found: dict[str, Any] = {}
    for name in NOISES:
        taken = [turn for turn in turns if turn.noise == name]
        found[name] = {
            f"p{percent}_ms": round(statistics.median(percentile(turn.quiet.waits_ms, percent) for turn in taken), 2)
            for percent in (50, 99)
        } | {"cpu_us": round(statistics.median(turn.cpu_us for turn in taken), 1)}
    for name in (ALONE, ELSEWHERE):
        ratio = {key: round(found[HERE][key] / found[name][key], 2) for key in ("p50_ms", "p99_ms")}
        found[f"here to {name}"] = ratio | {"cpu_us": ""}
    answers: dict[str, Counter[str]] = {"quiet": Counter(), "device": Counter(), "tenant": Counter()}
    for turn in turns:
        for sender, heard in (("quiet", turn.quiet), ("device", turn.device), ("tenant", turn.tenant)):
            answers[sender].update({} if heard is None else heard.answers)
    found["answers"] = {sender: dict(sorted(counts.items())) for sender, counts in answers.items()}
    return found


def print_tables(found: dict[str, Any], lines: Sequence[str]) -> None:
    waits = Table("the quiet devices", "p50 ms", "p99 ms", "gateway CPU µs a request", title="Waits")
    for name in (*NOISES, f"here to {ALONE}", f"here to {ELSEWHERE}"):
        waits.add_row(name, *(str(found[name][key]) for key in ("p50_ms", "p99_ms", "cpu_us")))
    answers = Table("sender", "answers", title="Answers")
    for sender, counts in found["answers"].items():
        answers.add_row(sender, ", ".join(f"{count:,} × {answer}" for answer, count in counts.items()))
    console = Console(width=max(110, Console().width))
    console.print(waits, answers)
    for line in lines:
        console.print(line, highlight=False)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="Of one turn; a round has three.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the stream is stored: a real disk.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--make-noise", type=int, hidden=True)
def main(rounds: int, seconds: float, folder: Path | None, as_json: bool, make_noise: int | None) -> None:
    if make_noise is not None:
        print("ready", flush=True)
        print(msgspec.json.encode(uvloop.run(globals()["make_noise"](make_noise, seconds))).decode())
        return
    with tempfile.TemporaryDirectory(prefix="pulse-bench-", dir=folder) as scratch:
        turns, fsyncs = uvloop.run(measure(Path(scratch), rounds=rounds, seconds=seconds))
    found = summary(turns)
    if as_json:
        print(json.dumps({"machine": machine(), "fsync_us": statistics.median(fsyncs), **found}, indent=2))
        return
    print_tables(
        found,
        [f"{rounds} rounds of 3 × {seconds:g} s; an fsync of 4 KiB: {statistics.median(fsyncs):.0f} µs", machine()],
    )


if __name__ == "__main__":
    main()
