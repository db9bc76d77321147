"""Outages are no failures (P5): PostgreSQL stopped or frozen, with every reading still accepted and none dead."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable

import pytest

from chaos.load import load
from chaos.system import SEEDS, System, freeze
from pulse.adapters.embedded.postgres_server import PostgresServer

pytestmark = [pytest.mark.chaos, pytest.mark.parametrize("seed", SEEDS)]

AWAY_S = 3.0
STOP_S_MAX = 8.0
"""Its drain of 4 s, 1 s to be cancelled, 2 s for the connections, and room."""
Back = Callable[[], Awaitable[None]]


async def stopped(postgres: PostgresServer) -> Back:
    await asyncio.to_thread(postgres.stop)

    async def back() -> None:
        await asyncio.to_thread(postgres.start)

    return back


async def frozen(postgres: PostgresServer) -> Back:
    """Connections stand and are taken, and nothing answers: what a full disk or a dead network looks like."""
    assert postgres.pid is not None
    thaw = freeze(postgres.pid)

    async def back() -> None:
        thaw()

    return back


@pytest.mark.parametrize("outage", [stopped, frozen])
async def test_while_postgresql_is_away_all_is_accepted_and_on_its_return_all_is_stored(
    mortal: System, postgres: PostgresServer, outage: Callable[[PostgresServer], Awaitable[Back]], seed: int
) -> None:
    worker = mortal.role("ingest", PULSE_DATABASE_TIMEOUT_S="1")
    async with mortal.role("gateway").supervised(), worker.supervised(), mortal.audited():
        async with load(mortal.gateway_url, mortal.tokens, seed=seed) as sent:
            await asyncio.sleep(0.5)
            back = await outage(postgres)
            before = len(sent.acknowledged)
            await asyncio.sleep(AWAY_S)
            accepted = len(sent.acknowledged) - before
            await back()
            await asyncio.sleep(0.3)
        await mortal.stored_exactly(sent)
    assert accepted > 100, "the gateway stood still with PostgreSQL"
    assert sent.retries == 0, sent.refused
    assert worker.deaths == []
    delivered, deliveries = await mortal.deliveries()
    assert delivered == deliveries, "an attempt was spent on an outage"


async def test_a_worker_that_is_stopped_while_postgresql_is_frozen_ends_in_time(
    mortal: System, postgres: PostgresServer, seed: int
) -> None:
    worker = mortal.role("ingest")
    await worker.start()
    assert postgres.pid is not None
    async with mortal.role("gateway").supervised():
        async with load(mortal.gateway_url, mortal.tokens, seed=seed):
            await asyncio.sleep(0.3)
            thaw = freeze(postgres.pid)
            await asyncio.sleep(0.3)
        try:
            before = time.monotonic()
            exit_code = await worker.stop(limit_s=STOP_S_MAX * 2)
            took_s = time.monotonic() - before
        finally:
            thaw()
            worker.kill()
    assert exit_code in (0, -signal.SIGKILL), "drained, or cut off by itself"
    assert took_s < STOP_S_MAX, "whoever stops it would have killed it"
