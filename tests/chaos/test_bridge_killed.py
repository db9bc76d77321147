"""kill -9 of the bridge, of nats-server and of PostgreSQL while devices talk to a broker: stored exactly once each."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from brokers import NEEDS_MOSQUITTO, Mosquitto
from chaos.mqtt_load import Said, say
from chaos.system import SEEDS, Role, System
from pulse.adapters.embedded.postgres_server import PostgresServer

pytestmark = [pytest.mark.chaos, pytest.mark.parametrize("seed", SEEDS), NEEDS_MOSQUITTO]

MESSAGES = int(os.environ.get("PULSE_CHAOS_MQTT_MESSAGES", "3000"))
"""`PULSE_CHAOS_MQTT_MESSAGES=20000` for the long run."""
PER_S = 1500


@pytest.fixture
async def mosquitto(mortal: System) -> AsyncIterator[Mosquitto]:
    broker = Mosquitto(folder=mortal.folder / "mosquitto")
    await asyncio.to_thread(broker.start)
    yield broker
    broker.kill()


def bridge_of(system: System, broker: Mosquitto) -> Role:
    return system.role("bridge", PULSE_MQTT_URL=broker.url, PULSE_MQTT_CLIENT_ID="bridge-1")


async def stored_exactly(system: System, said: Said, count: int) -> None:
    """The oracle: as many rows of each reading as the broker acknowledged, and no others."""
    assert sum(said.acknowledged.values()) == count
    await system.drained(accepted=count)
    rows = await system.fetch(
        "SELECT device_id, metrics->>'reading' AS reading, count(*) AS n FROM telemetry GROUP BY 1, 2"
    )
    found = Counter({(row["device_id"], row["reading"]): row["n"] for row in rows})
    assert not (said.acknowledged - found), f"lost: {list((said.acknowledged - found).items())[:10]}"
    assert not (found - said.acknowledged), f"doubled: {list((found - said.acknowledged).items())[:10]}"
    assert await system.dead_letters() == []


async def test_bridge_nats_and_postgresql_are_each_killed_once(
    mortal: System, postgres: PostgresServer, mosquitto: Mosquitto, seed: int
) -> None:
    chance = random.Random(seed)
    bridge = bridge_of(mortal, mosquitto)

    async def kill_bridge() -> None:
        bridge.kill()
        await bridge.died(1)

    async def kill_nats() -> None:
        mortal.nats.kill()
        await asyncio.to_thread(mortal.nats.start)

    async def kill_postgres() -> None:
        await asyncio.to_thread(postgres.kill)
        await asyncio.to_thread(postgres.start)

    victims = [kill_bridge, kill_nats, kill_postgres]
    chance.shuffle(victims)
    print(f"seed {seed}: {[victim.__name__ for victim in victims]}")  # noqa: T201 - shown where it fails
    async with bridge.supervised(), mortal.role("ingest").supervised() as worker, mortal.audited():
        saying = asyncio.create_task(say(mosquitto, MESSAGES, per_s=PER_S), name="devices")
        for victim in victims:
            await asyncio.sleep(chance.uniform(0.1, 0.25) * MESSAGES / PER_S)
            await victim()
        await stored_exactly(mortal, await saying, MESSAGES)
        assert len(bridge.deaths) == 1
    assert worker.deaths == []


async def test_a_bridge_that_dies_between_storing_and_acknowledging_doubles_nothing(
    mortal: System, mosquitto: Mosquitto, seed: int
) -> None:
    """It has JetStream's answer and has not passed it on, again and again."""
    chance = random.Random(seed)
    bridge = bridge_of(mortal, mosquitto)
    crashes = (f"bridge.stored:{chance.randrange(1, 400)}" for _ in range(4))
    async with bridge.supervised(itertools.chain(crashes)), mortal.role("ingest").supervised(), mortal.audited():
        said = await say(mosquitto, MESSAGES, per_s=PER_S)
        await bridge.died(4)
        await stored_exactly(mortal, said, MESSAGES)
