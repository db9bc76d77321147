"""Workers that race, and a stream that is deleted under them: a position is settled once, whoever comes first."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from chaos.load import load
from chaos.system import SEEDS, System, declared, eventually
from pulse.adapters.nats.connection import connection
from pulse.wiring.streams import TELEMETRY

pytestmark = [pytest.mark.chaos, pytest.mark.parametrize("seed", SEEDS)]

BLOCKED_S = 1.0


async def test_two_workers_that_hold_the_same_redelivered_messages_store_them_once(
    system: System, gateway: str, seed: int
) -> None:
    system.topology = declared(ack_wait_s=0.4)
    await system.apply_topology()
    blocker = await asyncpg.connect(system.database_url)
    async with system.role("ingest").supervised() as one, system.role("ingest-2").supervised() as other:
        async with load(gateway, system.tokens, seed=seed) as sent:
            async with blocker.transaction():
                # Whoever writes now waits with its batch in hand, until the other one has been given the same.
                await blocker.execute("LOCK TABLE telemetry IN EXCLUSIVE MODE")
                await asyncio.sleep(BLOCKED_S)
            await asyncio.sleep(0.3)
        await blocker.close()
        await system.stored_exactly(sent)
    delivered, deliveries = await system.deliveries()
    assert deliveries > delivered, "nothing was delivered twice: there was no race"
    assert (one.deaths, other.deaths) == ([], [])


async def test_of_a_stream_that_is_made_anew_under_a_running_worker_nothing_is_lost(
    system: System, gateway: str, seed: int
) -> None:
    """What the old stream still held went with it, by the operator's own hand; the new one starts from 1 again."""
    async with system.role("ingest").supervised() as worker, system.role("maintenance").supervised() as maintenance:
        async with load(gateway, system.tokens, seed=seed, name="old") as old:
            await eventually(lambda: _is_stored(system), "something of the old stream is stored")
        async with connection(system.nats.url, name="test") as client:
            await client.jetstream().delete_stream(TELEMETRY)
        async with load(gateway, system.tokens, seed=seed, name="new") as new:
            await asyncio.sleep(0.5)
            assert not new.acknowledged, "there is no stream"
            await system.apply_topology()
            await asyncio.sleep(0.5)
        await system.drained(accepted=len(await _positions(system)))
        rows = await system.fetch("SELECT metrics->>'reading' AS reading FROM telemetry")
    stored = [row["reading"] for row in rows]
    assert len(stored) == len(set(stored))
    assert new.acknowledged, "nothing was sent to the new stream"
    assert new.acknowledged.keys() <= set(stored), sorted(new.acknowledged.keys() - set(stored))[:10]
    assert set(stored) <= old.acknowledged.keys() | new.acknowledged.keys()
    epochs = await system.epochs()
    assert len(epochs) == 2
    audits = await system.audit()
    assert [each.epoch for each in audits] == epochs
    assert all(each.balanced for each in audits)
    assert (worker.deaths, maintenance.deaths) == ([], [])


async def _is_stored(system: System) -> bool:
    return bool(await system.fetch("SELECT FROM telemetry LIMIT 1"))


async def _positions(system: System) -> set[int]:
    """The sequences that the new stream has given out."""
    async with connection(system.nats.url, name="test") as client:
        info = await client.jetstream().stream_info(TELEMETRY)
    return set(range(1, info.state.last_seq + 1))
