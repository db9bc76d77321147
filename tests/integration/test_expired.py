"""Messages that a stream's limits remove before anybody has processed them: counted exactly, and told everywhere."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from dead_letter_bench import Bench, bench, envelope, topology
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.audit import AuditReader
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.ledger import LedgerReader
from pulse.runtime.metrics import AuditMetrics
from pulse.services.audit import Auditor, AuditWatch
from pulse.topology.declared import Declared
from pulse.wiring.streams import INGEST_WORKERS, TELEMETRY
from worker_bench import until

SOURCE = Path(__file__).resolve().parents[2] / "src"
FIRST, REST = 40, 260
LIMIT_MESSAGES, LIMIT_SUBJECT, LIMIT_BYTES, LIMIT_AGE_S = 100, 60, 30_000, 2.0


@pytest.fixture
async def system(nats: NatsServer, database: str) -> AsyncIterator[Bench]:
    async with bench(nats.url, database) as made:
        yield made


def limited(**limits: object) -> Declared:
    """What is shipped, with other limits of TELEMETRY."""
    shipped = topology()
    streams = tuple(
        msgspec.structs.replace(each, **limits) if each.name == TELEMETRY else each for each in shipped.streams
    )
    return Declared(streams=streams, consumers=shipped.consumers)


def subject_of(sequence: int) -> str:
    """Two noisy tenants and a quiet one, so that a limit by subject leaves gaps in the middle."""
    return f"telemetry.{('t1', 't1', 't2', 't1', 't1', 't1', 't3')[sequence % 7] if sequence % 29 else 't3'}"


def kept_by_messages(sequences: Sequence[int], _there: int) -> set[int]:
    return set(sequences[-LIMIT_MESSAGES:])


def kept_by_bytes(sequences: Sequence[int], there: int) -> set[int]:
    """How many fit is the server's affair; that it lets go of the oldest is not."""
    assert 0 < there < REST
    return set(sequences[-there:])


def kept_by_subject(sequences: Sequence[int], _there: int) -> set[int]:
    of: dict[str, list[int]] = {}
    for sequence in sequences:
        of.setdefault(subject_of(sequence), []).append(sequence)
    return {sequence for each in of.values() for sequence in each[-LIMIT_SUBJECT:]}


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"max_msgs": LIMIT_MESSAGES}, kept_by_messages),
        ({"max_bytes": LIMIT_BYTES}, kept_by_bytes),
        ({"max_msgs_per_subject": LIMIT_SUBJECT}, kept_by_subject),
    ],
    ids=["messages", "bytes", "messages of a subject"],
)
async def test_what_a_limit_removes_while_no_worker_runs_is_counted_to_the_message(
    system: Bench, limits: dict[str, int], kept: Callable[[Sequence[int], int], set[int]]
) -> None:
    await system.apply(limited(**limits))
    await publish(system, FIRST)
    await system.ingest(lambda: system.settled(FIRST))
    await publish(system, FIRST + REST)
    state = await stream_state(system.client, TELEMETRY)
    there = kept(range(1, FIRST + REST + 1), state.messages)
    assert state.messages == len(there)
    unprocessed = set(range(FIRST + 1, FIRST + REST + 1))
    gone = len(unprocessed - there)
    assert 0 < gone < REST
    audit = await system.audit()
    assert (audit.accepted, audit.stored, audit.dead) == (FIRST + REST, FIRST, 0)
    assert (audit.in_flight, audit.expired) == (REST - gone, gone)
    await system.ingest(lambda: system.settled(FIRST + REST - gone))
    assert set(await system.stored()) == set(range(1, FIRST + 1)) | (unprocessed & there)
    audit = await system.audit()
    assert (audit.stored, audit.in_flight, audit.expired) == (FIRST + REST - gone, 0, gone)


async def test_what_has_grown_too_old_is_counted_to_the_message(system: Bench) -> None:
    await publish(system, FIRST)
    await system.ingest(lambda: system.settled(FIRST))
    await publish(system, FIRST + 25)
    await system.apply(limited(max_age=int(LIMIT_AGE_S * 1e9), duplicate_window=int(LIMIT_AGE_S * 1e9)))

    async def all_are_gone() -> bool:
        return (await stream_state(system.client, TELEMETRY)).messages == 0

    await until(all_are_gone)
    audit = await system.audit()
    assert (audit.accepted, audit.stored, audit.in_flight, audit.expired) == (FIRST + 25, FIRST, 0, 25)


async def test_it_is_told_by_metrics_log_audit_and_doctor(
    system: Bench, nats: NatsServer, database: str, scratch: Path
) -> None:
    registry = CollectorRegistry()
    streams = AuditReader(system.client, consumer_of={TELEMETRY: INGEST_WORKERS})
    auditor = Auditor(streams=streams, ledger=LedgerReader(system.pool))
    watch = AuditWatch(auditor=auditor, metrics=AuditMetrics(registry))
    await system.apply(limited(max_msgs=LIMIT_MESSAGES))
    for total, more in ((LIMIT_MESSAGES, 0), (LIMIT_MESSAGES + 7, 7), (LIMIT_MESSAGES + 7, 0), (LIMIT_MESSAGES + 9, 2)):
        await publish(system, total)
        with capture_logs() as logged:
            await watch.look(TELEMETRY)
        alarms = [line for line in logged if line["log_level"] == "error"]
        assert [(line["event"], line["more"]) for line in alarms] == (
            [("messages expired unprocessed", more)] if more else []
        )
    labels = {"stream": TELEMETRY, "state": "expired"}
    assert registry.get_sample_value("pulse_audit_messages", labels) == 9
    code, told, errors = await asyncio.to_thread(pulse, "audit", nats, database, scratch)
    assert (code, told["audits"][0]["expired"]) == (1, 9)
    assert "9 messages expired unprocessed" in errors
    code, told, _ = await asyncio.to_thread(pulse, "doctor", nats, database, scratch)
    (line,) = (each for each in told["findings"] if each["check"] == "audit" and TELEMETRY in each["text"])
    assert (code, line["status"]) == (1, "failing")
    assert "9 expired" in line["text"]


async def publish(system: Bench, up_to: int) -> None:
    """Good messages from where the stream ends up to the sequence `up_to`."""
    first = (await stream_state(system.client, TELEMETRY)).last_seq + 1
    for sequence in range(first, up_to + 1):
        subject = subject_of(sequence)
        body = envelope(tenant=subject.removeprefix("telemetry."))
        assert await system.publish(body, subject=subject) == [sequence]


def pulse(command: str, nats: NatsServer, database: str, folder: Path) -> tuple[int, dict[str, Any], str]:
    """Run a command; its exit code, its JSON, and what it says on stderr."""
    environment = {
        **{name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG"}},
        "PYTHONPATH": str(SOURCE),
        "NATS_URL": nats.url,
        "DATABASE_URL": database,
    }
    done = subprocess.run(
        [sys.executable, "-m", "pulse", command, "--json"],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout), done.stderr
