"""PostgreSQL away for long, under load: every valid request is still 202, and on its return the backlog drains (P5).

Short by default; `PULSE_CHAOS_OUTAGE_S=120 pytest tests/chaos/test_long_outage.py` for the two minutes that a failover
takes which somebody has to help along.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chaos.steady import steady_load
from chaos.system import System, freeze
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.topology.declared import load

OUTAGE_S = float(os.environ.get("PULSE_CHAOS_OUTAGE_S", "8"))

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(OUTAGE_S + 300)]

DEVICES = 200
PER_S = 300.0
"""Two minutes of it are 36,000 messages: more than the 20,000 that a consumer may have on its hands, and fewer than the
100,000 that the stream keeps for a tenant."""
DATABASE_TIMEOUT_S = min(15.0, OUTAGE_S / 8)
"""As shipped where the outage is long; else so that it passes several times within it."""
Back = Callable[[], Awaitable[None]]


async def killed(postgres: PostgresServer) -> Back:
    await asyncio.to_thread(postgres.kill)

    async def back() -> None:
        await asyncio.to_thread(postgres.start)

    return back


async def frozen(postgres: PostgresServer) -> Back:
    """Connections stand and are taken, and nothing answers."""
    assert postgres.pid is not None
    thaw = freeze(postgres.pid)

    async def back() -> None:
        thaw()

    return back


@pytest.fixture
async def crowded(nats: NatsServer, postgres: PostgresServer, scratch: Path) -> System:
    """A system of many devices, with the topology as it is shipped, on a PostgreSQL that may be killed."""
    made = System(nats=nats, database_url=postgres.url, folder=scratch, topology=load(), devices=DEVICES)
    await made.prepare()
    return made


@pytest.mark.parametrize("outage", [killed, frozen])
async def test_every_request_of_a_long_outage_is_accepted_and_stored_once_it_is_over(
    crowded: System, postgres: PostgresServer, outage: Callable[[PostgresServer], Awaitable[Back]]
) -> None:
    names = ("gateway", "ingest-1", "ingest-2", "maintenance", "rescue")
    roles = [crowded.role(name, PULSE_DATABASE_TIMEOUT_S=f"{DATABASE_TIMEOUT_S:g}") for name in names]
    gateway, one, two, maintenance, rescue = roles
    async with (
        gateway.supervised(),
        one.supervised(),
        two.supervised(),
        maintenance.supervised(),
        rescue.supervised(),
        crowded.audited(),
    ):
        async with steady_load(crowded.gateway_url, crowded.tokens, per_s=PER_S) as sent:
            await asyncio.sleep(1.0)
            back = await outage(postgres)
            before = len(sent.acknowledged)
            await asyncio.sleep(OUTAGE_S)
            during = len(sent.acknowledged) - before
            await back()
            returned = time.monotonic()
            await asyncio.sleep(1.0)
        await crowded.stored_exactly(sent)
        drained_s = time.monotonic() - returned
    sys.stdout.write(
        f"\n{OUTAGE_S:g} s {outage.__name__}: {during} accepted meanwhile, drained {drained_s:.1f} s after\n"
    )
    assert set(sent.statuses) == {202}, (sent.statuses, sent.refused[:5])
    assert during > DEVICES, "the gateway stood still with PostgreSQL"
    assert [role.deaths for role in roles] == [[]] * len(roles)
    delivered, deliveries = await crowded.deliveries()
    assert delivered == deliveries, "an attempt was spent on an outage"
