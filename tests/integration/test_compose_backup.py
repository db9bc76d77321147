"""Backup and restore, by the commands of docs/operations.md: real dumps, real servers, volumes that are empty again."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.system import eventually
from compose_client import STOP_S_MAX, ask, audit, init_environment, passwords, rows, run_init, url_of
from compose_server import Finished, container_environment, nats_cli, program, run
from compose_stack import Stack, start_database, start_nats
from pulse.adapters.embedded.postgres_binaries import find_binaries
from repository import ROOT

HANDBOOK = (ROOT / "docs" / "operations.md").read_text("utf-8")
ROLES = ["gateway", "ingest", "maintenance"]
LIMIT_S = 60.0

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A system on one machine that has stored a reading, with its tenant `t1` and device `d1`."""
    program("pgbouncer", install="apt install pgbouncer")
    nats_cli()
    made = Stack(folder=tmp_path, passwords=passwords())
    with made.cleanup:
        start_database(made)
        assert made.run_once("migrate").code == 0
        start_nats(made)
        assert run_init(made).code == 0
        start_roles(made)
        assert made.run_once("pulse", "tenant", "add", "t1").code == 0
        yield made


@pytest.fixture
def token(stack: Stack) -> str:
    added = stack.run_once("pulse", "device", "add", "t1", "d1", "--json")
    return str(json.loads(added.output)["devices"][0]["token"])


def start_roles(stack: Stack) -> None:
    for role in ROLES:
        stack.start(role)


def stop(stack: Stack, *names: str) -> None:
    for name in names:
        stack.running[name].stop(STOP_S_MAX)


async def accepted(stack: Stack, token: str, name: str) -> None:
    """Send a reading of that name until it is; then until it is stored."""
    url = url_of(stack, "gateway", "gateway", "/ingest/v1/tenant/t1/device/d1/telemetry")

    async def is_accepted() -> bool:
        status, _ = await asyncio.to_thread(ask, url, body={"metrics": {name: 1}}, token=token)
        return status == 202

    await eventually(is_accepted, "the gateway knows the device", limit_s=LIMIT_S)


async def names(stack: Stack) -> list[str]:
    found = await rows(stack, "SELECT jsonb_object_keys(metrics) AS name FROM telemetry ORDER BY name")
    return [row["name"] for row in found]


async def settled(stack: Stack) -> None:
    async def is_settled() -> bool:
        done = await asyncio.to_thread(audit, stack)
        return all(each["in_flight"] == 0 for each in done["audits"])

    await eventually(is_settled, "everything is settled", limit_s=LIMIT_S)


def in_postgres(stack: Stack, program_name: str, dump: Path) -> None:
    """Run what the handbook says, with `dc exec -T postgres` taken away and the dump in a place of ours."""
    commands = re.findall(rf"^    dc exec -T postgres ({program_name} .*?)(?:\s+#.*)?$", HANDBOOK, re.MULTILINE)
    assert commands
    assert len(set(commands)) == 1
    command = commands[0].replace("pulse.dump", shlex.quote(str(dump)))
    there = find_binaries("", run_as=None).program(program_name)
    environment = {**container_environment(stack.folder, there), **stack.administrator}
    done = run(["sh", "-c", command.replace(program_name, shlex.quote(there), 1)], environment, folder=stack.folder)
    assert (done.code, done.errors) == (0, "")


async def test_a_dump_in_an_empty_volume_is_filled_up_from_the_stream(stack: Stack, token: str) -> None:
    """PostgreSQL is lost, NATS is not: what was stored after the dump comes once more, what was in it does not."""
    await accepted(stack, token, "before")
    await settled(stack)
    dump = stack.folder / "pulse.dump"
    in_postgres(stack, "pg_dump", dump)
    await accepted(stack, token, "after")
    await settled(stack)
    stop(stack, *ROLES, "pgbouncer", "postgres")

    start_database(stack)
    in_postgres(stack, "pg_restore", dump)
    assert await names(stack) == ["before"]
    assert stack.run_once("migrate").code == 0
    commands = re.findall(r"--entrypoint nats nats-init (consumer rm .*)$", HANDBOOK, re.MULTILINE)
    assert len(commands) == 1
    assert run(["nats", *commands[0].split()], init_environment(stack), folder=stack.folder).code == 0
    assert "Consumer ingest-workers ready (created)" in run_init(stack).output
    start_roles(stack)

    async def is_filled_up() -> bool:
        return await names(stack) == ["after", "before"]

    await eventually(is_filled_up, "what the dump has not", limit_s=LIMIT_S)
    await settled(stack)
    await accepted(stack, token, "later")
    await settled(stack)
    assert await names(stack) == ["after", "before", "later"]
    assert stack.run_once("pulse", "audit", "--rows").code == 0


async def test_streams_that_are_lost_are_made_anew_and_what_was_stored_stays(stack: Stack, token: str) -> None:
    """NATS is lost, PostgreSQL is not: the new stream counts from 1 again, and is another one to the ledger."""
    await accepted(stack, token, "before")
    await settled(stack)
    stop(stack, *ROLES, "nats")
    start_nats(stack)
    assert run_init(stack).code == 0
    start_roles(stack)
    await accepted(stack, token, "after")
    await settled(stack)
    assert await names(stack) == ["after", "before"]
    done = audit(stack)
    assert (done["ok"], [each["stored"] for each in done["audits"] if each["stored"]]) == (True, [1, 1])


async def test_a_stream_can_be_backed_up_and_nobody_may_restore_it(stack: Stack, token: str) -> None:
    """It would have a new time of making, so to the ledger be another stream: what it holds would be stored again."""
    await accepted(stack, token, "before")
    await settled(stack)
    folder = str(stack.folder / "telemetry.backup")
    assert nats(stack, "stream", "backup", "TELEMETRY", folder).code == 0
    stop(stack, *ROLES)
    assert nats(stack, "stream", "rm", "TELEMETRY", "-f").code == 0
    done = nats(stack, "--timeout", "1s", "stream", "restore", folder)
    assert done.code != 0
    assert "Permissions Violation" in done.errors


def nats(stack: Stack, *arguments: str) -> Finished:
    return run(["nats", *arguments], init_environment(stack), folder=stack.folder)
