"""kill -9 of nats-server, PostgreSQL and the gateway, several times, under load: P1, P2 and P3 hold (P6)."""

from __future__ import annotations

import asyncio
import random

import pytest

from chaos.load import load
from chaos.system import SEEDS, System, declared
from pulse.adapters.embedded.postgres_server import PostgresServer

pytestmark = [pytest.mark.chaos, pytest.mark.parametrize("seed", SEEDS)]

KILLS = 3


async def test_nats_killed_again_and_again(system: System, gateway: str, seed: int) -> None:
    chance = random.Random(seed)
    async with system.role("ingest").supervised() as worker, system.audited():
        async with load(gateway, system.tokens, seed=seed) as sent:
            for _ in range(KILLS):
                await asyncio.sleep(chance.uniform(0.1, 0.8))
                system.nats.kill()
                await asyncio.to_thread(system.nats.start)
            await asyncio.sleep(0.3)
        await system.stored_exactly(sent)
    assert worker.deaths == []


async def test_postgresql_killed_again_and_again(mortal: System, postgres: PostgresServer, seed: int) -> None:
    chance = random.Random(seed)
    async with (
        mortal.role("gateway").supervised() as gateway,
        mortal.role("ingest").supervised() as worker,
        mortal.audited(),
    ):
        async with load(mortal.gateway_url, mortal.tokens, seed=seed) as sent:
            for _ in range(KILLS):
                await asyncio.sleep(chance.uniform(0.1, 0.8))
                await asyncio.to_thread(postgres.kill)
                await asyncio.to_thread(postgres.start)
            await asyncio.sleep(0.3)
        await mortal.stored_exactly(sent)
    assert (worker.deaths, gateway.deaths) == ([], [])
    assert sent.retries == 0, "accepting a message needs no PostgreSQL"
    delivered, deliveries = await mortal.deliveries()
    assert delivered == deliveries, "an outage of PostgreSQL is no reason for a redelivery"


async def test_gateway_killed_again_and_again(system: System, seed: int) -> None:
    chance = random.Random(seed)
    gateway = system.role("gateway")
    async with gateway.supervised(), system.role("ingest").supervised(), system.audited():
        async with load(system.gateway_url, system.tokens, seed=seed) as sent:
            for kill in range(1, KILLS + 1):
                await asyncio.sleep(chance.uniform(0.1, 0.8))
                gateway.kill()
                await gateway.died(kill)
            await asyncio.sleep(0.5)
        await system.stored_exactly(sent)
    assert sent.retries > 0, "no request was cut off"


async def test_everything_killed_at_random(mortal: System, postgres: PostgresServer, seed: int) -> None:
    chance = random.Random(seed)
    mortal.topology = declared()
    await mortal.apply_topology()
    gateway, worker = mortal.role("gateway"), mortal.role("ingest")

    async def restart_nats() -> None:
        mortal.nats.kill()
        await asyncio.to_thread(mortal.nats.start)

    async def restart_postgres() -> None:
        await asyncio.to_thread(postgres.kill)
        await asyncio.to_thread(postgres.start)

    async def kill_gateway() -> None:
        gateway.kill()

    async def kill_worker() -> None:
        worker.kill()

    victims = [restart_nats, restart_postgres, kill_gateway, kill_worker]
    chance.shuffle(victims)
    print(f"seed {seed}: {[victim.__name__ for victim in victims]}")  # noqa: T201 - shown where it fails
    async with gateway.supervised(), worker.supervised(), mortal.audited():
        async with load(mortal.gateway_url, mortal.tokens, seed=seed) as sent:
            for victim in victims:
                await asyncio.sleep(chance.uniform(0.2, 0.6))
                await victim()
            await asyncio.sleep(0.5)
        await mortal.stored_exactly(sent)
