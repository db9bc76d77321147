"""`pulse streams` in a real process: what it prints, what it changes, how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats import jetstream
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.topology.declared import load

DECLARED = load()

SOURCE = Path(__file__).parents[2] / "src"


def pulse(url: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PULSE_", "NATS_"))}
    return subprocess.run(
        [sys.executable, "-m", "pulse", "--set", f"nats_url={url}", "streams", *arguments],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(SOURCE), "COLUMNS": "160"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[PulseClient]:
    async with connection(nats.url, name="test") as client:
        yield client


async def ask(client: PulseClient, subject: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    return await jetstream.request(client, subject, body or {}, dict[str, Any], doing=subject)


async def messages_in(client: PulseClient, name: str) -> int:
    found = (await ask(client, f"STREAM.INFO.{name}"))["state"]["messages"]
    assert isinstance(found, int)
    return found


def test_from_empty_to_in_step(nats: NatsServer, tmp_path: Path) -> None:
    empty = pulse(nats.url, "status", cwd=tmp_path)
    assert empty.returncode == 0
    assert "Missing: COMMANDS, DEAD_LETTERS, DOWN, KV_registry, LATER, ROUTES, SHADOW, TELEMETRY" in empty.stdout

    drift = pulse(nats.url, "plan", cwd=tmp_path)
    assert drift.returncode == 1
    changes = len(DECLARED.streams) + len(DECLARED.consumers)
    assert drift.stderr == f"pulse: {changes} changes to make (`pulse streams apply` makes them)\n"

    done = pulse(nats.url, "apply", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")

    again = pulse(nats.url, "apply", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert "Nothing to do" in again.stdout


def test_json_is_one_document_on_stdout(nats: NatsServer, tmp_path: Path) -> None:
    planned = json.loads(pulse(nats.url, "plan", "--json", cwd=tmp_path).stdout)
    assert {change["action"] for change in planned["changes"]} == {"create"}
    json.loads(pulse(nats.url, "apply", "--json", cwd=tmp_path).stdout)
    assert json.loads(pulse(nats.url, "plan", "--json", cwd=tmp_path).stdout) == {"changes": [], "not_ours": []}
    status = json.loads(pulse(nats.url, "status", "--json", cwd=tmp_path).stdout)
    assert status["missing"] == []
    [telemetry] = [stream for stream in status["streams"] if stream["name"] == "TELEMETRY"]
    assert [consumer["name"] for consumer in telemetry["consumers"]] == ["ingest-workers"]


async def test_messages_are_evicted_only_with_yes(nats: NatsServer, client: PulseClient, tmp_path: Path) -> None:
    pulse(nats.url, "apply", cwd=tmp_path)
    config = (await ask(client, "STREAM.INFO.KV_registry"))["config"]
    await ask(client, "STREAM.UPDATE.KV_registry", config | {"max_msgs_per_subject": 10})
    for _ in range(10):
        await client.request("$KV.registry.device", b"x", timeout=30)

    planned = pulse(nats.url, "plan", cwd=tmp_path)
    assert planned.returncode == 1
    assert "evicts 9 messages" in planned.stdout

    refused = pulse(nats.url, "apply", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr == "pulse: not applied: stream KV_registry evicts 9 messages (--yes accepts that)\n"
    assert await messages_in(client, "KV_registry") == 10

    assert pulse(nats.url, "apply", "--yes", cwd=tmp_path).returncode == 0
    assert await messages_in(client, "KV_registry") == 1


async def test_a_blocked_change_prints_its_commands_and_changes_nothing(
    nats: NatsServer, client: PulseClient, tmp_path: Path
) -> None:
    await ask(client, "STREAM.CREATE.ROUTES", {"name": "ROUTES", "subjects": ["routes.>"], "retention": "limits"})
    for command in ("plan", "apply"):
        blocked = pulse(nats.url, command, cwd=tmp_path)
        assert blocked.returncode == 1
        assert "  nats stream rm ROUTES --force\n  pulse streams apply\n" in blocked.stdout
        assert blocked.stderr.startswith("pulse: 1 change cannot be made in place")
    assert (await ask(client, "STREAM.NAMES"))["streams"] == ["ROUTES"]


async def test_status_warns_of_what_expired_before_it_was_delivered(
    nats: NatsServer, client: PulseClient, tmp_path: Path
) -> None:
    pulse(nats.url, "apply", cwd=tmp_path)
    for _ in range(10):
        await client.request("telemetry.t1", b"x", timeout=30)
    await ask(client, "STREAM.PURGE.TELEMETRY", {"seq": 7})
    status = pulse(nats.url, "status", cwd=tmp_path)
    assert status.returncode == 0
    assert "! TELEMETRY: nobody pulls from ingest-workers, and 4 messages wait" in status.stdout


def test_a_server_that_is_away_is_one_line_and_exit_1(free_port: int, tmp_path: Path) -> None:
    for command in ("plan", "status"):
        away = pulse(f"nats://pulse:hidden@127.0.0.1:{free_port}", command, cwd=tmp_path)
        assert (away.returncode, away.stdout) == (1, "")
        assert away.stderr == (
            f"pulse: cannot connect to NATS at 127.0.0.1:{free_port}: connection refused"
            " (is it running? `pulse up` starts one)\n"
        )


def test_a_wrong_password_is_one_line_and_never_shown(nats: NatsServer, tmp_path: Path) -> None:
    wrong = pulse(f"nats://pulse:hidden@127.0.0.1:{nats.port}", "plan", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        f"pulse: NATS at 127.0.0.1:{nats.port} refuses these credentials (check the user and password in nats_url)\n"
    )


def test_a_server_without_jetstream_is_one_line_and_exit_1(nats_server_factory: Any, tmp_path: Path) -> None:
    server = nats_server_factory(extra_conf="jetstream: disabled")
    server.start()
    without = pulse(server.url, "plan", cwd=tmp_path)
    assert (without.returncode, without.stdout) == (1, "")
    assert without.stderr.count("\n") == 1
    assert "JetStream" in without.stderr
