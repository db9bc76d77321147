"""schemathesis against the role `ui`, on a real PostgreSQL and nats-server: what the OpenAPI document promises is kept.

`PULSE_OPENAPI_EXAMPLES=200 PULSE_OPENAPI_SEED=7` for a longer run from another seed.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from chaos.system import System
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.postgres.access import KeyStore
from pulse.adapters.postgres.pool import open_pool, transaction
from pulse.topology.declared import load

EXAMPLES = int(os.environ.get("PULSE_OPENAPI_EXAMPLES", "8"))
"""Of each operation, besides those that cover every constraint of its schema."""
SEED = int(os.environ.get("PULSE_OPENAPI_SEED", "1"))
LIMIT_S = 100 + 20 * EXAMPLES


DAY = timedelta(days=1)
CONFIGURATION = """
[warnings]
fail-on = ["missing_auth", "missing_test_data"]

[dictionaries]
tenants = { values = ["t1"] }
devices = { values = ["d0", "d1"] }
begins = { values = ["%(begin)s"] }
ends = { values = ["%(end)s"] }

[parameters]
"path.tenant_id" = { dictionary = "tenants", probability = 0.7 }
"path.device_id" = { dictionary = "devices", probability = 0.7 }
"query.from" = { dictionary = "begins", probability = 0.8 }
"query.to" = { dictionary = "ends", probability = 0.8 }

[[operations]]
include-path-regex = "/(telemetry|import)$"
checks = { positive_data_acceptance = { enabled = false } }
"""
"""Most requests are about something that is there. What a schema cannot say: that `from` is before `to`, and what a
table must have in it."""
ROWS = """
    INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position)
    SELECT now() - make_interval(secs => 10 * row), 't1', 'd0', '{"temp":21.5,"on":true,"name":"x"}', row
    FROM generate_series(1, 500) AS row
"""


async def prepare(database: str) -> str:
    """Telemetry to ask for; returns an operator's key, whose id is so far away that no request comes to revoke it."""
    async with open_pool(database, size_max=1, timeout_s=10, application_name="test") as pool:
        store = KeyStore(pool)
        await store.add(name="to be revoked", tenant_id="t1")
        async with transaction(pool) as connection:
            for ahead in (-1, 0):
                await connection.execute("SELECT ensure_telemetry_day(current_date + $1::int)", ahead)
            await connection.execute(ROWS)
            await connection.execute("ALTER TABLE api_keys ALTER COLUMN key_id RESTART WITH 77123456789")
        return (await store.add(name="schemathesis", tenant_id=None))[1]


@pytest.mark.timeout(LIMIT_S + 30)
async def test_no_request_that_the_openapi_document_leads_to_is_answered_against_it(
    nats: NatsServer, database: str, scratch: Path
) -> None:
    system = System(nats=nats, database_url=database, folder=scratch, topology=load())
    await system.prepare()
    port = ports.free_port()
    role = system.role("ui", PULSE_UI_PORT=str(port), PULSE_LOG_LEVEL="warning")
    now = datetime.now(UTC).replace(microsecond=0)
    (scratch / "schemathesis.toml").write_text(
        CONFIGURATION % {"begin": (now - DAY).isoformat(), "end": (now + DAY).isoformat()}, "utf-8"
    )
    arguments = [
        "run", f"http://127.0.0.1:{port}/api/v1/openapi.json",
        "--header", f"Authorization: Bearer {await prepare(database)}",
        "--max-examples", str(EXAMPLES), "--seed", str(SEED), "--phases", "examples,coverage,fuzzing,stateful",
        "--continue-on-failure", "--no-color",
    ]  # fmt: skip
    async with role.supervised():
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
