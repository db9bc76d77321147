"""What the tests of `compose/` ask the services and the database, and how they run `nats-init`."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from typing import Any

import asyncpg

from compose_files import INIT_STREAMS, LAYERS, TOPOLOGY, filled_in, services, variables_of
from compose_server import Finished, container_environment, made_password, nats_cli, run
from compose_stack import Stack

WAIT_S_MAX = 60.0
STOP_S_MAX = 30.0
"""A role drains in seconds; how many a busy machine makes of them is not what is asked here."""


def passwords() -> dict[str, str]:
    """As `make-env.sh` would make them, for every variable of the files."""
    text = json.dumps([services(*paths) for paths in LAYERS.values()])
    return {name: made_password() for name in variables_of(text)}


def ask(url: str, *, body: object = None, token: str = "") -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = None if body is None else json.dumps(body).encode()
    if data is not None:
        headers["Content-Type"] = "application/json"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=60) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def url_of(stack: Stack, service: str, port: str, path: str) -> str:
    return f"http://127.0.0.1:{stack.ports[service][port]}{path}"


async def rows(stack: Stack, statement: str) -> list[dict[str, Any]]:
    """What the role of Pulse sees, through PgBouncer."""
    connection = await asyncpg.connect(stack.environment("ingest")["DATABASE_URL"], statement_cache_size=0)
    try:
        async with connection.transaction():
            return [dict(each) for each in await connection.fetch(statement)]
    finally:
        await connection.close()


async def execute(stack: Stack, statement: str) -> None:
    connection = await asyncpg.connect(stack.environment("migrate")["DATABASE_URL"], statement_cache_size=0)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def rows_once_there(stack: Stack, statement: str) -> list[dict[str, Any]]:
    """As `rows`, waited for."""
    async with asyncio.timeout(WAIT_S_MAX):
        while not (found := await rows(stack, statement)):  # noqa: ASYNC110 - another process writes them
            await asyncio.sleep(0.05)
    return found


def audit(stack: Stack) -> dict[str, Any]:
    done = stack.run_once("pulse", "audit", "--json")
    assert done.code == 0, done.output + done.errors
    found: dict[str, Any] = json.loads(done.output)
    return found


def init_environment(stack: Stack) -> dict[str, str]:
    """Of nats-init, with the real `nats` on its PATH."""
    told = filled_in(stack.services["nats-init"]["environment"], stack.passwords)
    here = {key: stack.here(value) for key, value in told.items()}
    return container_environment(stack.folder, nats_cli(), TOPOLOGY_DIR=str(TOPOLOGY), **here)


def run_init(stack: Stack, **variables: str) -> Finished:
    """nats-init as it stands in the file."""
    assert stack.services["nats-init"]["entrypoint"] == ["/bin/sh", "/scripts/init-streams.sh"]
    return run(["/bin/sh", str(INIT_STREAMS)], {**init_environment(stack), **variables}, folder=stack.folder)
