"""Fsynced publishes a second: group commit beside plain `publish()`, on the same nats-server in the same run.

    .venv/bin/python bench/publish.py [--json] [--rounds 5] [--seconds 1] [--callers 1,64,256,1000,5000] [--folder DIR]

Each caller publishes one message after the other and waits for each receipt. The ways of publishing take turns within
every round, so that whatever else the machine does falls on all of them; the table shows medians, least and most.

    plain      nats-py's `js.publish()` with a message id, the server answers after the fsync of that message
    group      GroupCommitter
    repeats    GroupCommitter, where one publish in a hundred repeats an id that it has stored before
    strangers  GroupCommitter, where one publish in a thousand repeats an id that another process has stored
    frames     batches of 1000 that were put together beforehand, four on their way: what the server takes at most
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import platform
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.committer import GroupCommitter
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.publication import Publication, batch_frames
from pulse.domain.batching import Limits
from pulse.topology.declared import load

SUBJECT = "telemetry.bench"
STREAMS = {"telemetry": "TELEMETRY"}
REPEAT_EVERY, STRANGER_EVERY, STRANGERS = 100, 1000, 200
FRAMES_BATCH, FRAMES_IN_FLIGHT = 1000, 4
FSYNC_TRIES = 200

Publish = Callable[[str], Awaitable[object]]
"""Publishes one message under this id, and returns once it is on disk."""


class Turn(msgspec.Struct, frozen=True):
    """One way of publishing for `seconds`: its rate, and how long a caller waited."""

    way: str
    callers: int
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    """CPU of this process (publisher and callers) for each message."""


async def take_turn(way: str, publish: Publish, *, callers: int, seconds: float) -> Turn:
    """Let `callers` publish as fast as they get answers."""
    name = f"{way}-{secrets.token_hex(4)}"
    ids = (f"{name}-{number}" for number in itertools.count())
    waits: list[float] = []

    async def caller() -> None:
        before = time.perf_counter()
        while before < end:
            await publish(next(ids))
            after = time.perf_counter()
            waits.append(after - before)
            before = after

    gc.collect()
    start, cpu = time.perf_counter(), time.process_time()
    end = start + seconds
    await asyncio.gather(*(caller() for _ in range(callers)))
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    waits.sort()
    return Turn(
        way=way,
        callers=callers,
        per_s=len(waits) / elapsed,
        p50_ms=waits[len(waits) // 2] * 1e3,
        p99_ms=waits[len(waits) * 99 // 100] * 1e3,
        cpu_us=cpu / len(waits) * 1e6,
    )


def plain(client: PulseClient, body: bytes) -> Publish:
    jetstream = client.jetstream()

    async def publish(message_id: str) -> object:
        return await jetstream.publish(SUBJECT, body, timeout=60.0, headers={"Nats-Msg-Id": message_id})

    return publish


def grouped(committer: GroupCommitter, body: bytes) -> Publish:
    def publish(message_id: str) -> Awaitable[object]:
        return committer.submit(SUBJECT, body, message_id=message_id)

    return publish


def with_repeats(committer: GroupCommitter, body: bytes) -> Publish:
    """Every hundredth publish has an id that was stored long before, so it is in no batch that is on its way."""
    stored: list[str] = []
    numbers = itertools.count(1)

    def publish(message_id: str) -> Awaitable[object]:
        number = next(numbers)
        if number % REPEAT_EVERY == 0 and len(stored) > 20:
            message_id = stored[number // REPEAT_EVERY % (len(stored) // 2)]
        elif number % REPEAT_EVERY == 1:
            stored.append(message_id)
        return committer.submit(SUBJECT, body, message_id=message_id)

    return publish


async def with_strangers(client: PulseClient, committer: GroupCommitter, body: bytes) -> Publish:
    """Every thousandth publish has an id of which only the stream knows; when they are used up, there are no more."""
    name = secrets.token_hex(4)
    strangers = [f"{name}-{number}" for number in range(STRANGERS)]
    store = plain(client, body)
    await asyncio.gather(*(store(stranger) for stranger in strangers))
    numbers = itertools.count(1)

    def publish(message_id: str) -> Awaitable[object]:
        if next(numbers) % STRANGER_EVERY == 0 and strangers:
            message_id = strangers.pop()
        return committer.submit(SUBJECT, body, message_id=message_id)

    return publish


async def send_frames(client: PulseClient, body: bytes, *, seconds: float) -> Turn:
    """Batches that cost this process nothing but the write; made in rounds of ten outside the clock."""
    inbox = client.new_inbox()
    slots = asyncio.Semaphore(FRAMES_IN_FLIGHT)

    async def on_reply(reply: Any) -> None:
        assert b'"error"' not in reply.data, reply.data
        slots.release()

    subscription = await client.subscribe(inbox, cb=on_reply)
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    elapsed, count = 0.0, 0
    while elapsed < seconds:
        name = secrets.token_hex(4)
        batches = [
            b"".join(
                batch_frames(
                    [
                        Publication(SUBJECT.encode(), body, f"{name}-{batch}-{number}".encode(), 0.0, future)
                        for number in range(FRAMES_BATCH)
                    ],
                    f"{name}-{batch}".encode(),
                    inbox.encode(),
                )
            )
            for batch in range(10)
        ]
        start = time.perf_counter()
        for frames in batches:
            await slots.acquire()
            await client._send_command(frames)
            await client._flush_pending()
        for _ in range(FRAMES_IN_FLIGHT):
            await slots.acquire()
        elapsed += time.perf_counter() - start
        count += len(batches) * FRAMES_BATCH
        for _ in range(FRAMES_IN_FLIGHT):
            slots.release()
    await subscription.unsubscribe()
    return Turn(way="frames", callers=0, per_s=count / elapsed, p50_ms=0.0, p99_ms=0.0, cpu_us=0.0)


def fsync_us(folder: Path) -> float:
    """The median of an appended 4 KiB and its fsync in `folder`: the least that any durable answer costs."""
    times = []
    path = folder / "fsync"
    with path.open("wb", buffering=0) as file:
        for _ in range(FSYNC_TRIES):
            start = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    path.unlink()
    return statistics.median(times) * 1e6


@asynccontextmanager
async def stream(folder: Path) -> AsyncIterator[PulseClient]:
    """The declared stream TELEMETRY on a nats-server of its own; emptied by age and bytes alone."""
    server = NatsServer(
        folder / "nats", port=ports.free_port(), monitor_port=ports.free_port(), password=secrets.token_hex(8)
    )
    server.start()
    try:
        async with connection(server.url, name="bench") as client:
            declared = next(stream for stream in load().streams if stream.name == "TELEMETRY")
            config = msgspec.structs.replace(declared, max_msgs_per_subject=-1)
            answer = await client.request("$JS.API.STREAM.CREATE.TELEMETRY", msgspec.json.encode(config), timeout=10.0)
            assert b'"error"' not in answer.data, answer.data
            yield client
    finally:
        server.stop()


async def measure(
    folder: Path, *, callers: Sequence[int], rounds: int, seconds: float, body_bytes: int, options: dict[str, int]
) -> tuple[list[Turn], list[float]]:
    """All turns, and the time of an fsync before each round."""
    turns: list[Turn] = []
    fsyncs: list[float] = []
    body = secrets.token_bytes(body_bytes)
    async with (
        stream(folder) as client,
        GroupCommitter(
            client, streams=STREAMS, timeout_s=60.0, attempt_timeout_s=30.0, limits=Limits(**options)
        ) as committer,
    ):
        ways = {
            "plain": plain(client, body),
            "group": grouped(committer, body),
            "repeats": with_repeats(committer, body),
        }
        for round_ in range(rounds + 1):
            fsyncs.append(fsync_us(folder))
            taken = []
            for count in callers:
                ways["strangers"] = await with_strangers(client, committer, body)
                for way, publish in ways.items():
                    taken.append(
                        await take_turn(way, publish, callers=count, seconds=seconds if round_ else seconds / 4)
                    )
            taken.append(await send_frames(client, body, seconds=seconds))
            if round_:  # the one before is the warm-up
                turns += taken
    return turns, fsyncs[1:]


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    one, five, _ = os.getloadavg()
    return (
        f"{os.cpu_count()} × {cpu}, {platform.system()} {platform.release()}, CPython {platform.python_version()}, "
        f"load {one:.1f} (1 min) {five:.1f} (5 min) at the end"
    )


def summary(turns: list[Turn]) -> list[dict[str, Any]]:
    """A row for each number of callers and way, with the ratio of its median to plain's."""
    rows = []
    plain_per_s: dict[int, float] = {}
    for (callers, way), group in itertools.groupby(
        sorted(turns, key=lambda turn: (turn.callers, turn.way != "plain", turn.way)),
        key=lambda turn: (turn.callers, turn.way),
    ):
        taken = list(group)
        rates = [turn.per_s for turn in taken]
        median = statistics.median(rates)
        if way == "plain":
            plain_per_s[callers] = median
        rows.append(
            {
                "callers": callers,
                "way": way,
                "per_s": round(median),
                "per_s_min": round(min(rates)),
                "per_s_max": round(max(rates)),
                "p50_ms": round(statistics.median(turn.p50_ms for turn in taken), 2),
                "p99_ms": round(statistics.median(turn.p99_ms for turn in taken), 2),
                "cpu_us": round(statistics.median(turn.cpu_us for turn in taken), 1),
                "ratio": round(median / plain_per_s[callers], 1) if callers in plain_per_s else None,
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], lines: list[str]) -> None:
    table = Table(title="Fsynced publishes, nats-server with sync_interval: always")
    for name in ("callers", "way", "msg/s", "least", "most", "× plain", "p50 ms", "p99 ms", "client CPU µs"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        has_callers = bool(row["callers"])
        table.add_row(
            str(row["callers"]) if has_callers else "",
            row["way"],
            f"{row['per_s']:,}",
            f"{row['per_s_min']:,}",
            f"{row['per_s_max']:,}",
            f"{row['ratio']:.1f}" if row["ratio"] else "",
            f"{row['p50_ms']:.1f}" if has_callers else "",
            f"{row['p99_ms']:.1f}" if has_callers else "",
            f"{row['cpu_us']:.1f}" if has_callers else "",
            end_section=row["way"] == "strangers",
        )
    console = Console(width=max(110, Console().width))
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--callers", default="1,64,256,1000,5000", show_default=True, help="How many publish at the same time.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Of one turn.")
@click.option("--body-bytes", default=250, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the stream is stored: a real disk.")
@click.option(
    "--option", "options", multiple=True, help="name=number of a limit of GroupCommitter, as in batch_max=500."
)
@click.option("--json", "as_json", is_flag=True)
def main(  # noqa: PLR0917 - click passes them by name
    callers: str,
    rounds: int,
    seconds: float,
    body_bytes: int,
    folder: Path | None,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    counts = [int(count) for count in callers.split(",")]
    given = {name: int(value) for name, _, value in (option.partition("=") for option in options)}
    with tempfile.TemporaryDirectory(prefix="pulse-bench-", dir=folder) as scratch:
        turns, fsyncs = uvloop.run(
            measure(Path(scratch), callers=counts, rounds=rounds, seconds=seconds, body_bytes=body_bytes, options=given)
        )
    rows = summary(turns)
    fsync = {"median": statistics.median(fsyncs), "min": min(fsyncs), "max": max(fsyncs)}
    if as_json:
        print(json.dumps({"machine": machine(), "fsync_us": fsync, "options": given, "rows": rows}, indent=2))
        return
    disk = f"an fsync of 4 KiB: {fsync['median']:.0f} µs (round by round {fsync['min']:.0f} to {fsync['max']:.0f})"
    how = f"{rounds} rounds of {seconds:g} s after a warm-up, bodies of {body_bytes} bytes, {given or 'defaults'}"
    print_table(rows, [how, disk, machine()])


if __name__ == "__main__":
    main()
