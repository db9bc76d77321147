"""`pulse doctor` against real servers, each thing really broken: what it says, how it exits, that it never hangs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from compose_files import NATS_CONF
from compose_server import compose_nats
from conftest import PostgresServerFactory
from dead_letter_bench import envelope
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import open_connection
from pulse.topology.declared import load

SOURCE = Path(__file__).resolve().parents[2] / "src"
LIMIT_S = 150.0
TELEMETRY = "TELEMETRY"


@dataclass(kw_only=True)
class Patient:
    """What the doctor looks at; `settings` are flags of his."""

    nats_url: str
    monitor_port: int
    database_url: str
    folder: Path
    settings: dict[str, str] = field(default_factory=dict)

    def examined(self, *arguments: str) -> tuple[int, list[dict[str, str]]]:
        """The exit code and the findings."""
        done = self.run("--json", *arguments)
        assert done.stdout, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        assert told["ok"] == (done.returncode == 0)
        findings: list[dict[str, str]] = told["findings"]
        assert all(bool(each.get("advice")) or each["status"] in ("ok", "not run") for each in findings), findings
        return done.returncode, findings

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        given = [part for name, value in self.settings.items() for part in ("--set", f"{name}={value}")]
        environment = {
            **{name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG"}},
            "PYTHONPATH": str(SOURCE),
            "NATS_URL": self.nats_url,
            "DATABASE_URL": self.database_url,
            "PULSE_EMBEDDED_NATS_MONITOR_PORT": str(self.monitor_port),
        }
        return subprocess.run(
            [sys.executable, "-m", "pulse", *given, "doctor", *arguments],
            env=environment, cwd=self.folder, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip

    async def sql(self, *statements: str) -> None:
        async with open_connection(self.database_url, timeout_s=10, application_name="test") as database:
            for statement in statements:
                await database.execute(statement)


async def prepared(nats: NatsServer, database_url: str, folder: Path) -> Patient:
    """Streams, tables and partitions as they should be."""
    monitor_port = int(nats.monitor_url.rpartition(":")[2])
    patient = Patient(nats_url=nats.url, monitor_port=monitor_port, database_url=database_url, folder=folder)
    async with open_connection(database_url, timeout_s=10, application_name="test") as database:
        await migrate(database, available())
    async with connection(nats.url, name="test") as client:
        provisioner = Provisioner(client)
        await provisioner.apply(load(), await provisioner.plan(load()))
    await patient.sql("SELECT ensure_telemetry_day(current_date + ahead) FROM generate_series(-1, 3) AS ahead")
    return patient


@pytest.fixture
async def patient(nats: NatsServer, database: str, scratch: Path) -> Patient:
    """A healthy one."""
    return await prepared(nats, database, scratch)


@pytest.fixture
async def mortal(nats: NatsServer, postgres: PostgresServer, scratch: Path) -> Patient:
    """A healthy one whose PostgreSQL may be broken."""
    return await prepared(nats, postgres.url, scratch)


@pytest.fixture
async def postgres(postgres_server_factory: PostgresServerFactory) -> PostgresServer:
    server = postgres_server_factory()
    await asyncio.to_thread(server.start)
    return server


def of(findings: list[dict[str, str]], check: str, status: str = "") -> dict[str, str]:
    """The one finding of `check`, of `status` where it is given."""
    found = [each for each in findings if each["check"] == check and status in ("", each["status"])]
    assert len(found) == 1, findings
    return found[0]


def not_well(findings: list[dict[str, str]]) -> set[str]:
    return {each["check"] for each in findings if each["status"] in ("failing", "warning")}


def test_of_a_healthy_system_everything_is_ok(patient: Patient) -> None:
    code, findings = patient.examined()
    assert (code, not_well(findings)) == (0, set())
    assert {each["status"] for each in findings} == {"ok"}
    checks = {each["check"] for each in findings}
    assert checks >= {"nats", "nats sync", "nats disk", "clock of nats", "streams", "stream TELEMETRY"}
    assert checks >= {"postgresql", "clock of postgresql", "schema", "connections", "partitions", "dead letters"}
    assert checks >= {"audit", "registry", "consumer ingest-workers"}
    assert "sync_interval: always" in of(findings, "nats sync")["text"]


def test_a_person_gets_a_line_each_and_the_failures_named(patient: Patient) -> None:
    well = patient.run()
    assert (well.returncode, well.stderr) == (0, "")
    assert "TELEMETRY" in well.stdout
    sick = patient.run("--role", "127.0.0.1:1")
    assert sick.returncode == 1
    assert sick.stderr.endswith("fail: role 127.0.0.1:1\n")
    assert "start it" in sick.stdout


def test_without_nats_the_rest_is_examined_all_the_same(patient: Patient, nats: NatsServer) -> None:
    nats.kill()
    code, findings = patient.examined()
    assert code == 1
    assert not_well(findings) == {"nats"}
    assert of(findings, "audit")["status"] == of(findings, "streams")["status"] == "not run"
    assert "nats" in of(findings, "audit")["text"]
    assert of(findings, "schema")["status"] == of(findings, "partitions")["status"] == "ok"


def test_without_postgresql_the_rest_is_examined_all_the_same(patient: Patient) -> None:
    patient.database_url = f"postgresql://pulse:x@127.0.0.1:{ports.free_port()}/pulse"
    code, findings = patient.examined()
    assert (code, not_well(findings)) == (1, {"postgresql"})
    assert "connection refused" in of(findings, "postgresql")["text"]
    assert of(findings, "schema")["status"] == of(findings, "registry")["status"] == "not run"
    assert of(findings, "streams")["status"] == "ok"


def test_with_both_away_it_still_says_so(patient: Patient, nats: NatsServer) -> None:
    nats.kill()
    patient.database_url = f"postgresql://pulse:x@127.0.0.1:{ports.free_port()}/pulse"
    code, findings = patient.examined()
    assert (code, not_well(findings)) == (1, {"nats", "postgresql"})


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Where connections are taken and nothing is ever answered."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def test_systems_that_take_connections_and_never_answer_do_not_hang_it(silent_port: int, scratch: Path) -> None:
    patient = Patient(
        nats_url=f"nats://127.0.0.1:{silent_port}",
        monitor_port=silent_port,
        database_url=f"postgresql://pulse:x@127.0.0.1:{silent_port}/pulse?sslmode=disable",
        folder=scratch,
    )
    code, findings = patient.examined("--role", f"127.0.0.1:{silent_port}")
    assert (code, not_well(findings)) == (1, {"nats", "postgresql", f"role 127.0.0.1:{silent_port}"})
    assert "no answer in time" in of(findings, "postgresql")["text"]


def test_servers_that_are_frozen_do_not_hang_it(mortal: Patient, nats: NatsServer, postgres: PostgresServer) -> None:
    assert nats.pid is not None
    assert postgres.pid is not None
    stopped = [nats.pid, postgres.pid]
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        code, findings = mortal.examined()
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert (code, not_well(findings)) == (1, {"nats", "postgresql"})


async def test_a_schema_that_is_behind_fails_and_nothing_asks_its_tables(patient: Patient) -> None:
    await patient.sql("DELETE FROM schema_migrations WHERE number > 2", "DROP TABLE dead_letters")
    code, findings = patient.examined()
    assert (code, not_well(findings)) == (1, {"schema"})
    assert "0003_" in of(findings, "schema")["text"]
    assert of(findings, "dead letters")["status"] == "not run"


async def test_streams_that_are_not_as_declared_fail(patient: Patient) -> None:
    async with connection(patient.nats_url, name="test") as client:
        await client.jetstream().delete_stream("ROUTES")
    code, findings = patient.examined()
    assert (code, not_well(findings)) == (1, {"streams"})
    assert "stream ROUTES (missing)" in of(findings, "streams")["text"]


async def test_a_server_that_does_not_sync_fails(patient: Patient, scratch: Path) -> None:
    text = NATS_CONF.read_text("utf-8")
    assert text.count("sync_interval: always") == 1
    folder = scratch / "unsynced"
    folder.mkdir()
    with compose_nats(folder, text=text.replace("sync_interval: always", "sync_interval: 90s")) as nats:
        patient.nats_url, patient.monitor_port = nats.url("provisioner"), nats.monitor_port
        code, findings = patient.examined()
    assert code == 1
    assert of(findings, "nats sync")["status"] == "failing"
    assert of(findings, "nats sync")["text"] == "sync every 1m 30s"


def test_a_server_whose_monitoring_is_not_there_is_no_failure(patient: Patient) -> None:
    patient.monitor_port = ports.free_port()
    code, findings = patient.examined()
    assert (code, not_well(findings)) == (0, set())
    assert of(findings, "nats disk")["status"] == "not run"


async def test_expired_messages_and_waiting_dead_letters_are_told(patient: Patient) -> None:
    async with connection(patient.nats_url, name="test") as client:
        for _ in range(3):
            await client.jetstream().publish("telemetry.t1", envelope())
        await client.jetstream().purge_stream(TELEMETRY)
    await patient.sql(
        "INSERT INTO dead_letters (stream, position, subject, reason, error, headers, body, attempts, published_at)"
        " VALUES ('TELEMETRY', 1, 's', 'invalid_json', 'e', '', '', 1, now())"
    )
    code, findings = patient.examined()
    assert (code, of(findings, "audit", "failing")["status"]) == (1, "failing")
    assert "3 expired" in of(findings, "audit", "failing")["text"]
    assert of(findings, "dead letters")["status"] == "warning"
    assert "1 wait: invalid_json 1" in of(findings, "dead letters")["text"]


async def test_messages_that_nobody_takes_and_a_message_that_comes_again_are_told(patient: Patient) -> None:
    async with connection(patient.nats_url, name="test") as client:
        stream = client.jetstream()
        await stream.publish("telemetry.t1", envelope())
        subscription = await stream.pull_subscribe_bind("ingest-workers", TELEMETRY)
        (message,) = await subscription.fetch(1)
        await message.nak()
        await subscription.fetch(1)
        _, findings = patient.examined()
    assert of(findings, "consumer ingest-workers")["status"] == "warning"
    assert "lag 1, 1 delivered more than once" in of(findings, "consumer ingest-workers")["text"]


async def test_a_stream_that_will_soon_be_full_is_told(patient: Patient) -> None:
    """At 500 a second on one subject, a subject with room for 1,000 keeps a message two seconds."""
    async with connection(patient.nats_url, name="test") as client:
        config = {"name": "COMMANDS", "subjects": ["commands.>"], "max_msgs_per_subject": 100, "discard": "old"}
        await client.jetstream().delete_stream("COMMANDS")
        await client.request("$JS.API.STREAM.CREATE.COMMANDS", json.dumps(config).encode(), timeout=30)

        async def publish() -> None:
            while True:
                await client.jetstream().publish("commands.t1", b"{}")
                await asyncio.sleep(0.005)

        publishing = asyncio.create_task(publish())
        _, findings = await asyncio.to_thread(patient.examined)
        publishing.cancel()
        await asyncio.wait([publishing])
    lines = [each for each in findings if each["check"] == "stream COMMANDS" and each["status"] == "warning"]
    assert any("a message stays" in each["text"] for each in lines), lines


async def test_partitions_that_are_missing_are_told(patient: Patient) -> None:
    tomorrow = "SELECT to_char(now() AT TIME ZONE 'UTC' + interval '1 day', 'YYYYMMDD')"
    async with open_connection(patient.database_url, timeout_s=10, application_name="test") as database:
        await database.execute(f"DROP TABLE telemetry_{await database.fetchval(tomorrow)}")
    code, findings = patient.examined()
    assert (code, of(findings, "partitions")["status"]) == (0, "warning")
    assert "0 days ahead" in of(findings, "partitions")["text"]


async def test_an_edge_that_is_not_in_step_fails(patient: Patient) -> None:
    await patient.sql("INSERT INTO tenants (tenant_id) VALUES ('acme')")
    code, findings = patient.examined()
    assert (code, not_well(findings)) == (1, {"registry"})
    assert "1 tenants, devices and routes compared, 1 differ" in of(findings, "registry")["text"]


async def test_connections_that_run_out_are_told(mortal: Patient, postgres: PostgresServer) -> None:
    held = [await asyncpg.connect(mortal.database_url) for _ in range(85)]
    code, findings = await asyncio.to_thread(mortal.examined)
    for each in held:
        await each.close()
    assert (code, of(findings, "connections")["status"]) == (0, "warning")


async def test_a_database_that_takes_no_writes_fails(mortal: Patient, postgres: PostgresServer) -> None:
    administrator = await asyncpg.connect(postgres.url_of("pulse", superuser=True))
    await administrator.execute("ALTER ROLE pulse SET default_transaction_read_only = on")
    await administrator.close()
    code, findings = mortal.examined()
    assert (code, not_well(findings)) == (1, {"postgresql"})
    assert "read-only" in of(findings, "postgresql")["text"]


def test_a_role_that_waits_and_one_that_is_gone_are_told(patient: Patient, free_port: int) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG"}},
        "PYTHONPATH": str(SOURCE),
        "NATS_URL": patient.nats_url,
        "DATABASE_URL": f"postgresql://pulse:x@127.0.0.1:{ports.free_port()}/pulse",
        "PULSE_HEALTH_PORT": str(free_port),
    }
    role = subprocess.Popen(
        [sys.executable, "-m", "pulse", "serve", "maintenance"], env=environment, cwd=patient.folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + LIMIT_S
        patient.settings["role_addresses"] = f"127.0.0.1:{free_port} 127.0.0.1:1"
        while True:
            code, findings = patient.examined()
            alive = of(findings, f"role 127.0.0.1:{free_port}")
            if "waits for" in alive["text"]:
                break
            assert time.monotonic() < deadline, findings
    finally:
        role.kill()
        role.wait()
    assert code == 1
    assert "postgresql (" in alive["text"]
    assert "no answer at 127.0.0.1:1" in of(findings, "role 127.0.0.1:1")["text"]
