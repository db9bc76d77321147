"""Stream → PostgreSQL: the ingest worker beside what its parts can do, on the same servers in the same run.

    .venv/bin/python bench/drain.py [--json] [--rounds 3] [--messages 300000] [--folder DIR] [--set name=value …]

TELEMETRY is filled with envelopes of about 250 bytes from 2000 devices of 10 tenants, so that the limits of the stream
hold as they are declared: 100,000 messages a subject, 1 GB. Then, in turns within every round, each on a fresh consumer
that is paused until the worker waits for it, and on empty tables:

    raw       pull and ack over a bare socket, nothing done with the messages: what nats-server gives
    copy      COPY of as many rows into the same table from two connections: what PostgreSQL takes
    sunday    a plain worker of nats-py and asyncpg (bench/drain_parts.py), on a part of the messages
    pulse     `pulse serve ingest`, every message settled in the ledger

and, if they are asked for, `pulse` with routes, so many in each tenant, until all is acked, which is up to a second
later than it is stored: `elsewhere-100` (for other devices), `question-100` (one question that all of them ask, and
none says yes), `questions-100` (each its own), `jobs-1` (each message becomes so many jobs).

At last comes `pulse` live: a publisher as fast as it goes, then at half of what that gave, and single messages.
CPU is that of each process, so it compares where the clock does not: other work on the machine slows all of them.
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
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import asyncpg
import click
import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop
from rich.console import Console
from rich.table import Table

import drain_load
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.streams import ConsumerState, consumer_state
from pulse.adapters.postgres.migrate import available, migrate
from pulse.domain.route import DeviceFilter, Match, Route, Webhook, encode_route
from pulse.topology.declared import load

STREAM, CONSUMER = "TELEMETRY", "ingest-workers"
HERE = Path(__file__).parent
POLL_S = 0.02
WARM_UP_S = 1.0
"""A process that has just begun to pull still imports and connects what its other services need."""
TURN_S_MAX = 300.0
SUNDAY_PART = 5
LIVE_S = 6.0
FLAT_OUT = 0.0
LONE = 20
COPY_BATCH = 5000
COPY_COLUMNS = ("ts", "tenant_id", "device_id", "seq", "site_id", "metrics", "position")
ROUTED = {
    "elsewhere": Match(devices=DeviceFilter(prefix="other-"), expression="metrics.humidity > 50.0"),
    "question": Match(expression="metrics.temperature > 1000.0 && metrics.door == 'open'"),
    "questions": Match(expression="metrics.temperature > 1000.0 && metrics.rssi == NUMBER"),
    "jobs": Match(),
}
"""Which messages the routes of a way want; NUMBER is the route's own."""
INSERT_ROUTE = "INSERT INTO routes (tenant_id, route_id, definition) VALUES ($1, $2, $3::json)"
LATENCY = """
    SELECT percentile_disc(ARRAY[0.5, 0.99, 1.0]) WITHIN GROUP (
        ORDER BY extract(epoch FROM pg_xact_commit_timestamp(telemetry.xmin) - ts)::float8 * 1000)
    FROM telemetry
"""


class Turn(msgspec.Struct, frozen=True):
    """One way on `count` messages; CPU in µs a message, of the worker, nats-server and PostgreSQL."""

    way: str
    count: int
    per_s: float
    worker_us: float
    nats_us: float
    postgres_us: float
    rss_mb: float


@dataclass(kw_only=True)
class Bench:
    """The servers, and what a worker is started with."""

    client: PulseClient
    nats: NatsServer
    postgres: PostgresServer
    database: asyncpg.Connection[asyncpg.Record]
    settings: Sequence[str]
    folder: Path

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "NATS_URL": self.nats.url,
            "DATABASE_URL": self.postgres.url,
            "PULSE_DATA_DIR": str(self.folder / "none"),
            "PULSE_HEALTH_PORT": str(ports.free_port()),
        }

    def command(self, way: str) -> list[str]:
        if is_pulse(way):
            flags = [part for setting in self.settings for part in ("--set", setting)]
            return [sys.executable, "-m", "pulse", *flags, "serve", "ingest"]
        return [sys.executable, str(HERE / "drain_parts.py"), way]

    @asynccontextmanager
    async def worker(self, way: str) -> AsyncIterator[psutil.Process]:
        """The worker of `way` in a process of its own, waiting for a consumer that is paused."""
        with (self.folder / f"{way}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *self.command(way), env=self.environment(), stdout=log, stderr=log
            )
        try:
            await self.until(lambda state: state.waiting_pulls > 0 or state.delivered_stream_seq > 0, process)
            await asyncio.sleep(WARM_UP_S)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            await process.wait()

    async def until(self, satisfied: Callable[[ConsumerState], bool], process: Process | None = None) -> None:
        """Wait until the consumer is as it should be; raises where the worker has ended."""
        end = time.monotonic() + TURN_S_MAX
        while not satisfied(await consumer_state(self.client, STREAM, CONSUMER)):
            assert time.monotonic() < end, "the consumer stands still"
            assert process is None or process.returncode is None, f"the worker has ended: see {self.folder}"
            await asyncio.sleep(POLL_S)

    async def until_settled(self, count: int) -> None:
        """Wait until the ledger has so many rows; acks of what a device said last may come up to a second later."""
        end = time.monotonic() + TURN_S_MAX
        while await self.database.fetchval("SELECT coalesce(sum(telemetry_rows), 0) FROM ledger") < count:
            assert time.monotonic() < end, f"the worker stands still: see {self.folder}"
            await asyncio.sleep(POLL_S)

    async def api(self, subject: str, body: object = None) -> None:
        answer = await self.client.request(f"$JS.API.{subject}", msgspec.json.encode(body or {}), timeout=30)
        assert b'"error"' not in answer.data, answer.data

    async def renew(self, *, paused: bool) -> None:
        """Empty tables, and a consumer that has delivered nothing."""
        await self.database.execute("TRUNCATE telemetry, ledger, device_state, dead_letters")
        await self.database.execute("DROP TABLE IF EXISTS sunday")
        await self.database.execute("CHECKPOINT")
        declared = next(each for each in load().consumers if each.stream == STREAM)
        config = msgspec.to_builtins(declared.config)
        if paused:
            config["pause_until"] = "2099-01-01T00:00:00Z"
        await self.client.request(f"$JS.API.CONSUMER.DELETE.{STREAM}.{CONSUMER}")
        await self.api(f"CONSUMER.CREATE.{STREAM}.{CONSUMER}", {"stream_name": STREAM, "config": config})

    async def route(self, way: str) -> None:
        """Let every tenant have the routes of this way, and no job wait; `pulse` has none."""
        kind, _, count = way.partition("-")
        await self.database.execute("TRUNCATE routes CASCADE")
        await self.api("STREAM.PURGE.ROUTES")
        rows = [
            (route.tenant_id, route.route_id, encode_route(route).decode())
            for tenant in range(drain_load.TENANTS)
            for route in routes(kind, f"tenant-{tenant}", int(count or 0))
        ]
        await self.database.executemany(INSERT_ROUTE, rows)

    async def resume(self) -> None:
        """Let the consumer deliver; nats-server 2.15 does so to pulls that wait only once a message arrives."""
        await self.api(f"CONSUMER.PAUSE.{STREAM}.{CONSUMER}")
        subject, body = drain_load.body(0, random.Random(0))
        await self.client.jetstream().publish(subject, body.replace(b"%d" % drain_load.TS, now_ms()))

    def server_cpu(self) -> tuple[float, float]:
        """CPU seconds so far of nats-server and of PostgreSQL with all its backends, ended ones included."""
        nats, postgres = (psutil.Process(server.pid) for server in (self.nats, self.postgres))
        return cpu_s(nats), cpu_s(postgres, ended=True) + sum(map(cpu_s, postgres.children()))


def is_pulse(way: str) -> bool:
    return way == "pulse" or way.partition("-")[0] in ROUTED


def routes(kind: str, tenant_id: str, count: int) -> list[Route]:
    made = []
    for number in range(count):
        match = ROUTED[kind]
        match = msgspec.structs.replace(match, expression=match.expression.replace("NUMBER", str(number)))
        destination = Webhook(url="https://hooks.example.com/")
        made.append(Route(tenant_id=tenant_id, route_id=f"r-{number:04}", destination=destination, match=match))
    return made


def now_ms() -> bytes:
    return b"%d" % (time.time_ns() // 1_000_000)


def cpu_s(process: psutil.Process, *, ended: bool = False) -> float:
    times = process.cpu_times()
    own = float(times.user + times.system)
    return own + float(times.children_user + times.children_system) if ended else own


def rss_mb_max(process: psutil.Process) -> float:
    """The peak that the kernel remembers."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


async def drain(bench: Bench, way: str, count: int) -> Turn:
    """Let the worker of `way` settle the first `count` messages of the stream."""
    await bench.renew(paused=True)
    await bench.route(way)
    async with bench.worker(way) as worker:
        servers, own, start = bench.server_cpu(), cpu_s(worker), time.perf_counter()
        await bench.resume()
        if way == "pulse":
            await bench.until_settled(count)
        else:
            await bench.until(lambda state: state.ack_floor_stream_seq >= count)
        elapsed = time.perf_counter() - start
        own, after, rss = cpu_s(worker) - own, bench.server_cpu(), rss_mb_max(worker)
    if is_pulse(way):
        stored = await bench.database.fetchval("SELECT count(DISTINCT position) FROM telemetry")
        assert stored >= count, f"{stored} of {count} rows"
    nats, postgres = (later - before for later, before in zip(after, servers, strict=True))
    each = 1e6 / count
    return Turn(way, count, count / elapsed, own * each, nats * each, postgres * each, rss)


def copy_texts(count: int) -> list[bytes]:
    """Rows like those that the messages become, in batches of COPY's text format."""
    chance, start = random.Random(1), datetime.now(UTC)
    lines = []
    for number in range(count):
        device, (_, envelope) = number % drain_load.DEVICES, drain_load.body(number, chance)
        metrics = envelope[envelope.index(b'"metrics":') + 10 : envelope.rindex(b',"seq"')].decode()
        ts = start + timedelta(milliseconds=number // 100)
        tenant = f"tenant-{device % drain_load.TENANTS}"
        lines.append(f"{ts}\t{tenant}\tdevice-{device:05}\t{number}\t\\N\t{metrics}\t{number}\n")
    return ["".join(lines[at : at + COPY_BATCH]).encode() for at in range(0, count, COPY_BATCH)]


async def copy(bench: Bench, count: int) -> Turn:
    """COPY alone: text made beforehand, two connections, a transaction for each batch."""
    await bench.renew(paused=False)
    await bench.database.execute("SELECT ensure_telemetry_day($1)", datetime.now(UTC).date())
    texts = copy_texts(count)

    async def write(link: asyncpg.Connection[asyncpg.Record]) -> None:
        while texts:
            await link.copy_to_table("telemetry", source=BytesIO(texts.pop()), columns=COPY_COLUMNS)

    links = [await asyncpg.connect(bench.postgres.url) for _ in range(2)]
    before, start = bench.server_cpu(), time.perf_counter()
    await asyncio.gather(*map(write, links))
    elapsed, after = time.perf_counter() - start, bench.server_cpu()
    for link in links:
        await link.close()
    return Turn("copy", count, count / elapsed, 0.0, 0.0, (after[1] - before[1]) / count * 1e6, 0.0)


async def live(bench: Bench, per_s: float) -> dict[str, float]:
    """Publisher and worker at the same time; the rate until the last row, and how long messages took."""
    await bench.api(f"STREAM.PURGE.{STREAM}")
    await bench.renew(paused=False)
    async with bench.worker("pulse") as worker:
        start = time.perf_counter()
        publisher = await asyncio.create_subprocess_exec(
            sys.executable,
            str(HERE / "drain_load.py"),
            str(per_s),
            str(LIVE_S),
            env=bench.environment(),
            stdout=PIPE,
        )
        answer = json.loads((await publisher.communicate())[0])
        published_s = time.perf_counter()
        await bench.until_settled(answer["count"])
        behind_s = time.perf_counter() - published_s
        rss = rss_mb_max(worker)
    stored = await bench.database.fetchval("SELECT count(*) FROM telemetry")
    assert stored == answer["count"], f"{stored} of {answer['count']} rows, {published_s - start:.1f} s"
    p50, p99, most = await bench.database.fetchval(LATENCY)
    return {
        "published_per_s": answer["per_s"],
        "stored_per_s": answer["count"] / (answer["seconds"] + behind_s),
        "publisher_late_ms": answer["late_s"] * 1e3,
        "behind_s": behind_s,
        "p50_ms": p50,
        "p99_ms": p99,
        "max_ms": most,
        "rss_mb": rss,
    }


async def lone(bench: Bench) -> dict[str, float]:
    """Messages one at a time, with nothing else to do: from the edge to the commit."""
    await bench.api(f"STREAM.PURGE.{STREAM}")
    await bench.renew(paused=False)
    chance = random.Random(2)
    async with bench.worker("pulse"):
        for number in range(LONE):
            subject, body = drain_load.body(number, chance)
            await asyncio.sleep(0.2 + chance.random() / 10)
            await bench.client.jetstream().publish(subject, body.replace(b"%d" % drain_load.TS, now_ms()))
        await bench.until(lambda state: state.pending == state.ack_pending == 0)
    p50, _, most = await bench.database.fetchval(LATENCY)
    return {"p50_ms": p50, "max_ms": most}


@asynccontextmanager
async def servers(folder: Path, settings: Sequence[str]) -> AsyncIterator[Bench]:
    """A nats-server with the declared streams of the worker and a migrated PostgreSQL, both of their own."""
    word = secrets.token_hex(8)
    nats = NatsServer(folder / "nats", port=ports.free_port(), monitor_port=ports.free_port(), password=word)
    postgres = PostgresServer(folder / "postgres", port=ports.free_port(), password=word, superuser_password=word)
    try:
        nats.start()
        postgres.start()
        admin = await asyncpg.connect(postgres.url_of("postgres", superuser=True))
        await admin.execute("ALTER SYSTEM SET track_commit_timestamp = on")
        await admin.execute("GRANT pg_checkpoint TO pulse")
        await admin.close()
        postgres.restart()
        database = await asyncpg.connect(postgres.url)
        await migrate(database, available())
        async with connection(nats.url, name="bench") as client:
            bench = Bench(
                client=client, nats=nats, postgres=postgres, database=database, settings=settings, folder=folder
            )
            for declared in load().streams:
                if declared.name in {STREAM, "ROUTES", "DEAD_LETTERS", "KV_registry"}:
                    await bench.api(f"STREAM.CREATE.{declared.name}", declared)
            for tenant in range(drain_load.TENANTS):
                await database.execute("INSERT INTO tenants (tenant_id) VALUES ($1)", f"tenant-{tenant}")
            yield bench
        await database.close()
    finally:
        nats.kill()
        postgres.kill()


async def measure(
    folder: Path, *, messages: int, rounds: int, ways: Sequence[str], settings: Sequence[str]
) -> dict[str, Any]:
    async with servers(folder, settings) as bench:
        await drain_load.publish(bench.client, count=messages)
        turns: list[Turn] = []
        for _ in range(rounds):
            for way in ways:
                if way == "copy":
                    turns.append(await copy(bench, messages))
                elif way in {"raw", "sunday"} or is_pulse(way):
                    turns.append(await drain(bench, way, messages // SUNDAY_PART if way == "sunday" else messages))
        result: dict[str, Any] = {"ways": summary(turns)}
        if "live" in ways:
            full = [await live(bench, FLAT_OUT) for _ in range(rounds)]
            half_per_s = statistics.median(each["stored_per_s"] for each in full) / 2
            result["live"] = medians(full)
            result["live_half"] = medians([await live(bench, half_per_s) for _ in range(rounds)])
            result["lone"] = await lone(bench)
        return result


def summary(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Medians of each way, least and most of its rates, and its ratio to the ingest worker's."""
    rows = []
    ways = list(dict.fromkeys(turn.way for turn in turns))
    rates = {way: statistics.median(turn.per_s for turn in turns if turn.way == way) for way in ways}
    for way in ways:
        taken = [msgspec.structs.asdict(turn) for turn in turns if turn.way == way]
        row = medians([{key: value for key, value in each.items() if key != "way"} for each in taken])
        least, most = min(each["per_s"] for each in taken), max(each["per_s"] for each in taken)
        ratio = rates["pulse"] / rates[way] if "pulse" in rates else None
        rows.append({"way": way, **row, "per_s_min": least, "per_s_max": most, "pulse_is": ratio})
    return rows


def medians(taken: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in taken) for key in taken[0]}


def machine() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    one, five, _ = os.getloadavg()
    return (
        f"{os.cpu_count()} × {cpu}, {platform.system()} {platform.release()}, CPython {platform.python_version()}, "
        f"load {one:.1f} (1 min) {five:.1f} (5 min) at the end"
    )


def print_tables(result: dict[str, Any]) -> None:
    console = Console(width=max(110, Console().width))
    table = Table(title="Stream → PostgreSQL; CPU in µs a message")
    for name in ("way", "messages", "msg/s", "least", "most", "pulse is", "worker", "nats", "postgres", "RSS MB"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in result["ways"]:
        ratio = f"{row['pulse_is']:.2f} ×" if row["pulse_is"] else ""
        rates = (f"{row[key]:,.0f}" for key in ("count", "per_s", "per_s_min", "per_s_max"))
        cpu = (f"{row[key]:.1f}" if row[key] else "" for key in ("worker_us", "nats_us", "postgres_us"))
        table.add_row(row["way"], *rates, ratio, *cpu, f"{row['rss_mb']:.0f}" if row["rss_mb"] else "")
    console.print(table)
    for name in ("live", "live_half", "lone"):
        if name in result:
            facts = ", ".join(f"{key} {value:,.1f}" for key, value in result[name].items())
            console.print(f"{name}: {facts}", highlight=False, soft_wrap=True)
    console.print(result["machine"], highlight=False, soft_wrap=True)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--messages", default=300_000, show_default=True, help="Whole thousands, at most 1,000,000.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--ways", default="raw,copy,sunday,pulse,live", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where both servers store: a real disk.")
@click.option("--set", "settings", multiple=True, help="A setting of the worker, name=value.")
@click.option("--json", "as_json", is_flag=True)
def main(  # noqa: PLR0917 - click passes them by name
    messages: int, rounds: int, ways: str, folder: Path | None, settings: tuple[str, ...], as_json: bool
) -> None:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="pulse-bench-", dir=folder, ignore_cleanup_errors=True) as scratch:
        result = uvloop.run(
            measure(Path(scratch), messages=messages, rounds=rounds, ways=ways.split(","), settings=settings)
        )
    result["machine"] = f"{machine()}; load {load:.1f} at the start"
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result)


if __name__ == "__main__":
    main()
