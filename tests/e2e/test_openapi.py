"""schemathesis against the role `ui`, on a real PostgreSQL and nats-server: what the OpenAPI document promises is kept.

`PULSE_OPENAPI_EXAMPLES=200 PULSE_OPENAPI_SEED=7` for a longer run from another seed.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from chaos.system import System
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.ask import Answerer
from pulse.adapters.nats.connection import connection
from pulse.adapters.postgres.access import KeyStore
from pulse.adapters.postgres.commands import CommandStore
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.pool import Pool, open_pool, transaction
from pulse.adapters.postgres.routes import RouteStore
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.domain.command_requests import Asked, CommandBounds, new_command, new_fleet
from pulse.domain.fleet import Filter
from pulse.domain.identity import NewDevice
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.route import Republish, Route
from pulse.domain.route_trial import Trial
from pulse.domain.shadow import Sections, ShadowBounds, ShadowKey, Update
from pulse.domain.shadow_requests import change
from pulse.runtime.settings import Settings
from pulse.topology.declared import load

EXAMPLES = int(os.environ.get("PULSE_OPENAPI_EXAMPLES", "8"))
"""Of each operation, besides those that cover every constraint of its schema."""
SEED = int(os.environ.get("PULSE_OPENAPI_SEED", "1"))
LIMIT_S = 200 + 40 * EXAMPLES


DAY = timedelta(days=1)
CONFIGURATION = """
[warnings]
fail-on = ["missing_auth", "missing_test_data"]

[dictionaries]
tenants = { values = ["t1"] }
devices = { values = ["d0", "d1"] }
begins = { values = ["%(begin)s"] }
ends = { values = ["%(end)s"] }
commands = { values = ["%(command)s"] }
fleets = { values = ["%(fleet)s"] }
routes = { values = ["hot"] }
letters = { values = [2] }

[parameters]
"path.tenant_id" = { dictionary = "tenants", probability = 0.7 }
"path.device_id" = { dictionary = "devices", probability = 0.7 }
"path.command_id" = { dictionary = "commands", probability = 0.7 }
"path.fleet_id" = { dictionary = "fleets", probability = 0.7 }
"path.route_id" = { dictionary = "routes", probability = 0.7 }
"path.letter_id" = { dictionary = "letters", probability = 0.7 }
"query.from" = { dictionary = "begins", probability = 0.8 }
"query.to" = { dictionary = "ends", probability = 0.8 }

[[operations]]
include-path-regex = "/(telemetry|import|shadow|commands|fleet-commands|dead-letters.*|routes.*)$"
checks = { positive_data_acceptance = { enabled = false } }

[[operations]]
include-path-regex = "/(routes|dead-letters)/"
checks = { use_after_free = { enabled = false } }
"""
"""Most requests are about something that is there. What a schema cannot say: that `from` is before `to`, what a table
must have in it, how large and deep a shadow or a payload may be, that a filter names all or something, what is CEL, a
template or a URL, and when a time is one. What is deleted is there again: see KEEP."""
ROWS = """
    INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position)
    SELECT now() - make_interval(secs => 10 * row), 't1', 'd0', '{"temp":21.5,"on":true,"name":"x"}', row
    FROM generate_series(1, 500) AS row
"""


LEAST = "0"
"""The id that the shortest of all requests are about."""
LEAST_COMMAND = """
    INSERT INTO commands (tenant_id, command_id, device_id, name, payload, created_ms, expires_ms, timeout_ms, due_ms,
                          created_by)
    VALUES ($1, $1, $1, 'reboot', '{}', 1, 4102444800000, 1, 4102444800000, 'test')
"""
LEAST_FLEET = """
    INSERT INTO fleet_commands (tenant_id, fleet_id, name, payload, filter, created_ms, expires_ms, timeout_ms,
                                created_by)
    VALUES ($1, $1, 'reboot', '{}', '{"all":true}', 1, 4102444800000, 1, 'test')
"""


LEAST_LETTER = """
    INSERT INTO dead_letters
        (stream, position, subject, tenant_id, reason, error, headers, body, attempts, published_at)
    SELECT 'TELEMETRY', n, 'telemetry.' || tenant, tenant, 'invalid_payload', '', '', 'bad', 1, now()
    FROM unnest(ARRAY['0', 't1']) WITH ORDINALITY AS made (tenant, n)
"""
KEEP = """
    CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER keep BEFORE DELETE ON routes FOR EACH ROW EXECUTE FUNCTION keep();
    CREATE TRIGGER keep BEFORE DELETE ON dead_letters FOR EACH ROW EXECUTE FUNCTION keep();
"""
"""Else the first request that deletes all would leave the others nothing to be about."""


async def prepare(database: str) -> dict[str, str]:
    """Telemetry, shadows and commands to ask for, and an operator's key that is so far away that no request revokes it.

    Returns the ids that were made up, and the key.
    """
    async with open_pool(database, size_max=1, timeout_s=10, application_name="test") as pool:
        store, identities = KeyStore(pool), IdentityStore(pool, presence_after=PRESENCE_AFTER)
        await store.add(name="to be revoked", tenant_id="t1")
        await identities.add_tenant(LEAST)
        await identities.add_devices(LEAST, [NewDevice(device_id=LEAST)])
        async with transaction(pool) as connection:
            for ahead in (-1, 0):
                await connection.execute("SELECT ensure_telemetry_day(current_date + $1::int)", ahead)
            await connection.execute(ROWS)
            await connection.execute("ALTER TABLE api_keys ALTER COLUMN key_id RESTART WITH 77123456789")
            await connection.execute(LEAST_COMMAND, LEAST)
            await connection.execute(LEAST_FLEET, LEAST)
            await connection.execute(LEAST_LETTER)
            await connection.execute(KEEP)
        routes = RouteStore(pool, seals=None)
        for tenant_id, route_id in (("t1", "hot"), (LEAST, LEAST)):
            await routes.add(Route(tenant_id=tenant_id, route_id=route_id, destination=Republish(topic="a")))
        for key in (ShadowKey("t1", "d0"), ShadowKey("t1", "d1"), ShadowKey(LEAST, LEAST)):
            await desire(pool, key)
        asked = Asked("reboot", {})
        bounds = msgspec.convert(Settings(), CommandBounds, from_attributes=True)
        one = new_command(asked, tenant_id="t1", device_id="d0", ordered=False, bounds=bounds)
        many = new_fleet(asked, tenant_id="t1", wanted=Filter(all=True), bounds=bounds)
        commands = CommandStore(pool)
        command, _ = await commands.create(one, who="test", at_ms=1)
        fleet, _ = await commands.create_fleet(many, who="test", at_ms=1)
        _, secret = await store.add(name="schemathesis", tenant_id=None)
    return {"command": command.command_id, "fleet": fleet.fleet_id, "secret": secret}


@asynccontextmanager
async def delivering(nats: NatsServer) -> AsyncIterator[None]:
    """Stands for the role `delivery`, which is asked to test routes."""

    async def answer(_tenant_id: str, route_id: str, _question: bytes) -> bytes:
        return msgspec.json.encode(
            Trial(delivered=True, to="tenant/t1/route/a", message_id=f"test-1:{route_id}", device_id="d0", status=200)
        )

    stop = asyncio.Event()
    async with connection(nats.url, name="test") as client, asyncio.TaskGroup() as group:
        group.create_task(Answerer(client, kind="delivery", answer=answer).run(stop))
        try:
            yield
        finally:
            stop.set()


async def desire(pool: Pool, key: ShadowKey) -> None:
    bounds = ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8)
    update = Update(Sections(desired={"power": "on"}))
    store = ShadowStore(pool, names_max=16)
    await store.change(key, lambda shadow: change(key, shadow, update, at_ms=1, who="test", bounds=bounds))


@pytest.mark.timeout(LIMIT_S + 30)
async def test_no_request_that_the_openapi_document_leads_to_is_answered_against_it(
    nats: NatsServer, database: str, scratch: Path
) -> None:
    system = System(nats=nats, database_url=database, folder=scratch, topology=load())
    await system.prepare()
    port = ports.free_port()
    role = system.role("ui", PULSE_UI_PORT=str(port), PULSE_LOG_LEVEL="warning", PULSE_SECRET_KEYS="k" * 32)
    now = datetime.now(UTC).replace(microsecond=0)
    made = await prepare(database)
    times = {"begin": (now - DAY).isoformat(), "end": (now + DAY).isoformat()}
    (scratch / "schemathesis.toml").write_text(CONFIGURATION % (times | made), "utf-8")
    arguments = [
        "run", f"http://127.0.0.1:{port}/api/v1/openapi.json",
        "--header", f"Authorization: Bearer {made['secret']}",
        "--max-examples", str(EXAMPLES), "--seed", str(SEED), "--phases", "examples,coverage,fuzzing,stateful",
        "--continue-on-failure", "--no-color",
    ]  # fmt: skip
    async with delivering(nats), role.supervised():
        done = await asyncio.to_thread(
            subprocess.run,
            [str(Path(sys.executable).with_name("schemathesis")), *arguments],
            cwd=scratch,
            env={"PATH": os.environ["PATH"], "HOME": str(scratch), "COLUMNS": "160"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    sys.stdout.write(f"seed {SEED}\n{done.stdout}\n{done.stderr}")
    assert role.deaths == []
    assert done.returncode == 0, f"seed {SEED}: the report is above"
