"""kill -9 of the bridge and of a postman on the way to devices: each hears everything, each sending is told once.

The device here hears it all at once: what a broker has confirmed is the broker's to keep.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest

from brokers import NEEDS_MOSQUITTO, Mosquitto
from chaos.load import TENANT
from chaos.system import SEEDS, System, eventually
from mqtt_client import Device
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.streams import consumer_state
from pulse.adapters.postgres.outbox import put_into_outbox
from pulse.adapters.postgres.pool import open_connection
from pulse.domain.downward import Downward, downward_subject
from pulse.domain.envelope import unwrap

pytestmark = [pytest.mark.chaos, pytest.mark.parametrize("seed", SEEDS)]

MESSAGES = 1000
TOLD = [f"tenant/{TENANT}/device/d0/{topic}" for topic in ("commands", "shadow/update/delta")]


@pytest.fixture
async def mosquitto(system: System) -> AsyncIterator[Mosquitto]:
    broker = Mosquitto(folder=system.folder / "mosquitto")
    await asyncio.to_thread(broker.start)
    yield broker
    broker.kill()


@pytest.fixture
async def device(mosquitto: Mosquitto) -> AsyncIterator[Device]:
    made = Device(port=mosquitto.port, client_id=f"{TENANT}/d0", clean=False)

    def come() -> None:
        assert made.connect()
        assert all(made.subscribe(topic) for topic in TOLD)

    await asyncio.to_thread(come)
    yield made
    await asyncio.to_thread(made.end)


def messages() -> list[Downward]:
    """Commands and deltas in turns, each with its number."""
    return [
        Downward(TENANT, "d0", "commands", msgspec.json.encode({"commandId": f"{number}"}))
        if number % 2
        else Downward(TENANT, "d0", "shadow/update/delta", b'{"commandId":"%d"}' % number)
        for number in range(MESSAGES)
    ]


def heard(device: Device) -> Counter[int]:
    return Counter(int(msgspec.json.decode(body)["commandId"]) for _, body in list(device.heard.messages))


async def settled(client: PulseClient, last: int) -> bool:
    state = await consumer_state(client, "DOWN", "bridge-down")
    return state.ack_floor_stream_seq >= last


async def reported(client: PulseClient) -> Counter[int]:
    context = client.jetstream()
    last = (await context.stream_info("COMMANDS")).state.last_seq
    found: Counter[int] = Counter()
    for sequence in range(1, last + 1):
        message = await context.get_msg("COMMANDS", sequence)
        envelope = unwrap(message.subject or "", message.data or b"")
        found[int(msgspec.json.decode(envelope.payload)["commandId"])] += 1
    return found


def crashes(chance: random.Random, steps: list[str], *, most: int) -> Iterator[str]:
    return (f"{step}:{chance.randrange(1, most)}" for step in steps)


@NEEDS_MOSQUITTO
async def test_a_bridge_that_dies_at_every_step_keeps_nothing_from_a_device(
    system: System, mosquitto: Mosquitto, device: Device, seed: int
) -> None:
    steps = ["downlink.fetched", "downlink.confirmed", "downlink.reported", "downlink.acked"]
    chance = random.Random(seed)
    chance.shuffle(steps)
    bridge = system.role("bridge", PULSE_MQTT_URL=mosquitto.url, PULSE_MQTT_CLIENT_ID="bridge-1")
    async with (
        connection(system.nats.url, name="test") as client,
        bridge.supervised(itertools.chain(crashes(chance, steps, most=4))),
    ):
        context = client.jetstream()
        for number, each in enumerate(messages()):
            await context.publish(downward_subject(each), each.body)
            if number % 50 == 0:
                await asyncio.sleep(0.02)  # so that it comes in batches of all sizes
        await eventually(lambda: settled(client, MESSAGES), "all is acked")

        async def all_heard() -> bool:
            return len(heard(device)) == MESSAGES

        await eventually(all_heard, "the device has heard everything")
        assert bridge.deaths
        assert await reported(client) == Counter(range(1, MESSAGES, 2))


async def test_a_postman_that_dies_between_publishing_and_deleting_loses_and_doubles_nothing(
    system: System, seed: int
) -> None:
    chance = random.Random(seed)
    role = system.role("shadow")
    said = [Downward(TENANT, "d0", "shadow/update/delta", b"%d" % number) for number in range(MESSAGES)]
    deaths = 3
    async with (
        connection(system.nats.url, name="test") as client,
        open_connection(system.database_url, timeout_s=10, application_name="test") as database,
        role.supervised(crashes(chance, ["postman.published"] * deaths, most=3)),
    ):
        for start in range(0, MESSAGES, 50):
            await put_into_outbox(database, said[start : start + 50])
            await asyncio.sleep(0.02)

        async def is_empty() -> bool:
            return bool(await database.fetchval("SELECT count(*) = 0 FROM outbox"))

        await eventually(is_empty, "the outbox is empty")
        context = client.jetstream()
        last = (await context.stream_info("DOWN")).state.last_seq
        found = [int((await context.get_msg("DOWN", sequence)).data or b"") for sequence in range(1, last + 1)]
        assert found == list(range(MESSAGES))
        assert role.deaths
