"""What is said to devices, from DOWN to their MQTT client: mosquitto (MQTT 5) and nats-server (3.1.1)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from bridge_process import Running, bridge_settings, bridging, until
from brokers import NEEDS_MOSQUITTO, Broker, Mosquitto, NatsBroker
from gateway_process import prepared
from mqtt_client import Device
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.streams import consumer_state
from pulse.domain.downward import Downward, downward_subject
from pulse.domain.envelope import Envelope, unwrap

BROKERS = {"mosquitto": Mosquitto, "nats-server": NatsBroker}
DELTA = "shadow/update/delta"


@pytest.fixture(params=[pytest.param("mosquitto", marks=NEEDS_MOSQUITTO), "nats-server"])
def broker(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Broker]:
    made: Broker = BROKERS[request.param](folder=scratch / request.param)
    made.start()
    yield made
    made.kill()


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[PulseClient]:
    async with prepared(nats) as made:
        yield made


async def say(client: PulseClient, *said: Downward) -> None:
    context = client.jetstream()
    for each in said:
        await context.publish(downward_subject(each), each.body)


def number(value: int, *, device_id: str = "d0", topic: str = DELTA) -> Downward:
    return Downward("acme", device_id, topic, b'{"n":%d}' % value)


def command(command_id: str, *, device_id: str = "d0") -> Downward:
    return Downward("acme", device_id, "commands", msgspec.json.encode({"commandId": command_id, "name": "reboot"}))


def heard(device: Device) -> list[int]:
    return [msgspec.json.decode(body)["n"] for _, body in list(device.heard.messages)]


def commands_heard(device: Device) -> set[str]:
    return {msgspec.json.decode(body)["commandId"] for _, body in list(device.heard.messages)}


class Listening:
    """A device that hears all that is said to it, with a session that outlives its connections."""

    def __init__(self, broker: Broker, device_id: str = "d0") -> None:
        self._broker = broker
        self.topics = [f"tenant/acme/device/{device_id}/{name}" for name in ("commands", DELTA)]
        self._device_id = device_id
        self.device: Device

    def connect(self, *, subscribe: bool = True) -> Device:
        made = Device(
            port=self._broker.port,
            user=self._broker.username,
            token=self._broker.password,
            client_id=f"acme-{self._device_id}",
            clean=False,
        )
        assert made.connect()
        self.device = made
        if subscribe:
            for topic in self.topics:
                assert made.subscribe(topic)
        return made


@pytest.fixture
async def device(broker: Broker) -> AsyncIterator[Listening]:
    made = Listening(broker)
    await asyncio.to_thread(made.connect)
    yield made
    await asyncio.to_thread(made.device.end)


async def settled(client: PulseClient) -> bool:
    state = await consumer_state(client, "DOWN", "bridge-down")
    return state.pending == state.ack_pending == 0


async def reports(client: PulseClient) -> list[Envelope]:
    context = client.jetstream()
    state = (await context.stream_info("COMMANDS")).state
    found = [await context.get_msg("COMMANDS", seq) for seq in range(state.first_seq, state.last_seq + 1) if seq]
    return [unwrap(each.subject or "", each.data or b"") for each in found]


def reported(envelopes: list[Envelope]) -> list[str]:
    return [msgspec.json.decode(each.payload)["commandId"] for each in envelopes]


def outcomes(bridge: Running) -> dict[str, int]:
    found = bridge.registry.get_sample_value
    names = ("delivered", "no_subscriber", "refused", "too_large", "foreign")
    values = {name: found("pulse_downlink_messages_total", {"outcome": name}) for name in names}
    return {name: int(value) for name, value in values.items() if value}


async def all_heard(holds: Callable[[], bool]) -> None:
    await until(holds, "the device hears it")


async def test_each_message_is_heard_once_and_in_its_order(
    client: PulseClient, broker: Broker, device: Listening
) -> None:
    await say(client, *(number(value) for value in range(300)))
    async with bridging(client, bridge_settings(broker)) as bridge:
        await say(client, *(number(value) for value in range(300, 600)))
        await all_heard(lambda: len(device.device.heard.messages) >= 600)
        await until(lambda: settled(client), "all is acked")
        assert outcomes(bridge) == {"delivered": 600}
        assert bridge.registry.get_sample_value("pulse_downlink_in_flight") == 0
    assert heard(device.device) == list(range(600))


async def test_a_device_that_is_away_hears_it_when_it_comes_back(
    client: PulseClient, broker: Broker, device: Listening
) -> None:
    await asyncio.to_thread(device.device.end)
    async with bridging(client, bridge_settings(broker)):
        await say(client, *(number(value) for value in range(20)), command("c1"))
        await until(lambda: settled(client), "the broker has it")
        again = await asyncio.to_thread(device.connect, subscribe=False)
        await all_heard(lambda: len(again.heard.messages) >= 21)
        assert reported(await reports(client)) == ["c1"]
    told = [(topic.rpartition("/")[2], msgspec.json.decode(body)) for topic, body in again.heard.messages]
    # In the order of each topic: nats-server queues for each subscription of a session by itself.
    assert [body["n"] for name, body in told if name == "delta"] == list(range(20))
    assert [body["commandId"] for name, body in told if name == "commands"] == ["c1"]


async def test_a_command_is_reported_once_as_sent(client: PulseClient, broker: Broker, device: Listening) -> None:
    async with bridging(client, bridge_settings(broker)):
        await say(client, *(command(f"c{value}") for value in range(50)))
        await all_heard(lambda: len(device.device.heard.messages) >= 50)
        await until(lambda: settled(client), "all is acked")
        found = await reports(client)
    assert sorted(reported(found)) == sorted(f"c{value}" for value in range(50))
    assert {(each.tenant_id, each.device_id, each.msg_type, each.source) for each in found} == {
        ("acme", "d0", "commands-sent", "mqtt")
    }


async def test_a_command_that_nobody_listens_to_was_not_sent_where_the_broker_says_so(
    client: PulseClient, broker: Broker
) -> None:
    async with bridging(client, bridge_settings(broker)) as bridge:
        await say(client, command("c1", device_id="d2"), number(1, device_id="d2"))
        await until(lambda: settled(client), "both are acked")
        knows = broker.version == "5"
        assert outcomes(bridge) == ({"no_subscriber": 2} if knows else {"delivered": 2})
        assert reported(await reports(client)) == ([] if knows else ["c1"])


async def test_what_no_device_listens_to_is_counted_and_holds_nobody_up(
    client: PulseClient, broker: Broker, device: Listening
) -> None:
    context = client.jetstream()
    async with bridging(client, bridge_settings(broker)) as bridge:
        await context.publish("down.acme.d0.elsewhere", b"{}")
        await context.publish("down.acme", b"{}")
        await context.publish("down.acme.d0.commands", b'{"no":"id"}')
        await say(client, number(7))
        await all_heard(lambda: heard(device.device) == [7])
        await until(lambda: settled(client), "all is acked")
        assert outcomes(bridge) == {"foreign": 3, "delivered": 1}
        assert bridge.ready


async def test_while_the_broker_is_away_nothing_is_taken_and_then_all_is_told(
    client: PulseClient, broker: Broker, device: Listening
) -> None:
    await _wait_for_acks(client, seconds=5.0)
    async with bridging(client, bridge_settings(broker)) as bridge:
        await say(client, number(0))
        await all_heard(lambda: 0 in heard(device.device))
        await until(lambda: settled(client), "it is acked")
        await asyncio.to_thread(broker.stop)
        await until(lambda: not bridge.ready, "not ready")
        await until(lambda: _pulls_ended(client), "nobody pulls")
        await say(client, *(number(value) for value in range(1, 50)))
        assert (await consumer_state(client, "DOWN", "bridge-down")).ack_pending == 0
        await asyncio.to_thread(broker.start)
        again = await asyncio.to_thread(device.connect, subscribe=True)
        await all_heard(lambda: set(heard(again)) >= set(range(1, 50)))
        await until(lambda: settled(client), "all is acked")


async def test_a_broker_that_is_killed_under_load_loses_nothing_that_was_not_confirmed(
    client: PulseClient, broker: Broker
) -> None:
    """What it had confirmed it may forget, as mosquitto does; so this counts what it has confirmed."""
    await _wait_for_acks(client, seconds=5.0)
    async with bridging(client, bridge_settings(broker)) as bridge:
        await say(client, *(number(value) for value in range(200)))
        await asyncio.to_thread(broker.kill)
        await say(client, *(number(value) for value in range(200, 400)))
        await asyncio.to_thread(broker.start)
        await until(lambda: settled(client), "all is acked")
        assert sum(outcomes(bridge).values()) >= 400


@NEEDS_MOSQUITTO
async def test_two_bridges_share_what_is_said_and_one_that_stops_leaves_it_to_the_other(
    client: PulseClient, scratch: Path
) -> None:
    broker = Mosquitto(folder=scratch / "mosquitto")
    broker.start()
    device = Listening(broker)
    await asyncio.to_thread(device.connect)
    await _wait_for_acks(client, seconds=5.0)
    try:
        async with bridging(client, bridge_settings(broker, client_id="bridge-2")) as second:
            async with bridging(client, bridge_settings(broker, client_id="bridge-1")):
                await say(client, *(number(value) for value in range(200)))
            await say(client, *(number(value) for value in range(200, 400)))
            await all_heard(lambda: set(heard(device.device)) == set(range(400)))
            await until(lambda: settled(client), "all is acked")
            assert outcomes(second)["delivered"] > 0
    finally:
        await asyncio.to_thread(device.device.end)
        broker.kill()


async def _pulls_ended(client: PulseClient) -> bool:
    return (await consumer_state(client, "DOWN", "bridge-down")).waiting_pulls == 0


async def test_an_outage_of_jetstream_between_puback_and_ack_is_waited_out(
    client: PulseClient, nats: NatsServer, broker: Broker, device: Listening
) -> None:
    await _wait_for_acks(client, seconds=2.0)
    async with bridging(client, bridge_settings(broker, publish_timeout_s=5.0)):
        await say(client, *(command(f"c{value}") for value in range(100)))
        await asyncio.to_thread(nats.kill)
        await asyncio.to_thread(nats.start)
        await until(lambda: settled(client), "all is acked")
        wanted = {f"c{value}" for value in range(100)}
        await all_heard(lambda: commands_heard(device.device) == wanted)
        assert set(reported(await reports(client))) == wanted


async def _wait_for_acks(client: PulseClient, *, seconds: float) -> None:
    """What was on its way to us when the server died comes again after this long; shipped, it is 30 s."""
    context = client.jetstream()
    config = (await context.consumer_info("DOWN", "bridge-down")).config
    config.ack_wait = seconds
    await context.add_consumer("DOWN", config)
