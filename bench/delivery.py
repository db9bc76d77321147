"""How many webhooks one delivery worker sends, and what destinations that misbehave cost the others.

    .venv/bin/python bench/delivery.py [--jobs 10000] [--json]

    one          all jobs for one destination on this machine, which answers at once
    many         the same for 160 destinations
    with bad     the same, while 20 more hang, 20 refuse, and 10 say 429: p99 of the 160, from taken to answered

Jobs stand in ROUTES before the worker starts, but for the p99: there they come at a steady rate. The worker is the real
process, with fsync; its CPU is that of the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import click
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from chaos.system import System
from deliveries import OK, SETTINGS, Destination, Request, add_routes, answer, are_gone, destinations, publish_jobs
from publish import machine
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.domain.route import Webhook
from pulse.topology.declared import load

PASSWORD = "bench"  # noqa: S105 - of servers that live as long as this
HEALTHY, HANGING, REFUSING, BUSY = 160, 20, 20, 10
AS_SHIPPED = {name: SETTINGS[name] for name in ("PULSE_SECRET_KEYS", "PULSE_WEBHOOK_NETWORKS_ALLOWED")}
STEADY_PER_S = 400
STEADY_S = 10


def well(_destination: Destination, _request: Request) -> bytes:
    return OK


def hangs(_destination: Destination, _request: Request) -> None:
    return None


def busy(_destination: Destination, _request: Request) -> bytes:
    return answer(429, "Retry-After: 2")


async def drained(system: System, client: PulseClient, made: Sequence[Destination], jobs: int) -> dict[str, float]:
    """Jobs a second, and µs of CPU of the worker for each, over what stood in ROUTES."""
    names = [f"r{number}" for number in range(len(made))]
    await add_routes(system.database_url, dict(zip(names, [each.url for each in made], strict=True)))
    await publish_jobs(client, [(1 + number, names[number % len(names)]) for number in range(jobs)])
    role = system.role("delivery", **AS_SHIPPED)
    started = time.monotonic()
    async with role.supervised():
        begun, before = sum(len(each.requests) for each in made), psutil.Process(role.pid).cpu_times()
        while not (first := [each.requests[0].at for each in made if each.requests]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while not await are_gone(client):  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(0.05)
        last = max(request.at for each in made for request in each.requests)
        cpu = psutil.Process(role.pid).cpu_times()
    sent = sum(len(each.requests) for each in made)
    return {
        "per_s": sent / (last - min(first)),
        "cpu_us": (cpu.user + cpu.system - before.user - before.system) * 1e6 / (sent - begun),
        "sent": sent,
        "elapsed_s": time.monotonic() - started,
    }


async def steady(system: System, client: PulseClient, *, bad: bool) -> float:
    """p99 in ms of the healthy ones, from when a job was taken until its destination had it."""
    behaviours = [well] * HEALTHY + ([hangs] * HANGING + [busy] * BUSY if bad else [])
    async with destinations(*behaviours) as made:
        targets = {f"{'bad' if bad else 'good'}-{number}": Webhook(url=each.url) for number, each in enumerate(made)}
        if bad:
            targets |= {
                f"no-{number}": Webhook(url=f"http://127.0.0.1:{ports.free_port()}/") for number in range(REFUSING)
            }
        await add_routes(system.database_url, dict(targets))
        names, taken = list(targets), dict[str, float]()
        async with system.role("delivery", **AS_SHIPPED).supervised():
            for second in range(STEADY_S * 10):
                count = STEADY_PER_S // 10
                jobs = [
                    (1 + second * count + number, names[(second * count + number) % len(names)])
                    for number in range(count)
                ]
                before = time.monotonic()
                taken |= dict.fromkeys(await publish_jobs(client, jobs), before)
                await asyncio.sleep(max(0.0, 0.1 - (time.monotonic() - before)))
            await asyncio.sleep(2.0)
        waits = sorted(
            r.at - taken[r.webhook_id] for each in made[:HEALTHY] for r in each.requests if r.webhook_id in taken
        )
    return waits[int(len(waits) * 0.99)] * 1000


async def measure(jobs: int) -> dict[str, float]:
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="pulse bench ") as folder:
        postgres = PostgresServer(
            Path(folder) / "pg", port=ports.free_port(), password=PASSWORD, superuser_password=PASSWORD
        )
        postgres.start()
        try:
            for name in ("one", "many", "alone", "with_bad"):
                nats = NatsServer(
                    Path(folder) / name, port=ports.free_port(), monitor_port=ports.free_port(), password=PASSWORD
                )
                nats.start()
                administrator = await asyncpg.connect(postgres.url_of("postgres", superuser=True))
                await administrator.execute(f"CREATE DATABASE bench_{name} OWNER pulse")
                await administrator.close()
                home = Path(folder) / f"home-{name}"
                home.mkdir()
                system = System(nats=nats, database_url=postgres.url_of(f"bench_{name}"), folder=home, topology=load())
                await system.prepare()
                try:
                    async with connection(nats.url, name="bench") as client:
                        if name in ("one", "many"):
                            async with destinations(*[well] * (1 if name == "one" else HEALTHY)) as made:
                                found = await drained(system, client, made, jobs)
                            results |= {f"{name}_per_s": found["per_s"], f"{name}_cpu_us": found["cpu_us"]}
                        else:
                            results[f"{name}_p99_ms"] = await steady(system, client, bad=name == "with_bad")
                finally:
                    nats.kill()
        finally:
            postgres.kill()
    results["p99_ratio"] = results["with_bad_p99_ms"] / results["alone_p99_ms"]
    return results


@click.command()
@click.option("--jobs", default=10_000, help="That stand in ROUTES at first.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def main(jobs: int, as_json: bool) -> None:
    """Measure the delivery role."""
    results = asyncio.run(measure(jobs))
    if as_json:
        print(json.dumps({"machine": machine(), **results}))
        return
    table = Table(title=f"deliveries, {os.cpu_count()} cores")
    table.add_column("what")
    table.add_column("", justify="right")
    for name, value in results.items():
        table.add_row(name, f"{value:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
