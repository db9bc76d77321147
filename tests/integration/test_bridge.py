"""The bridge behind real brokers: one suite for mosquitto (MQTT 5, shared subscription) and nats-server (3.1.1)."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from bridge_process import Running, bridge_settings, bridging, letters, stored, until
from brokers import NEEDS_MOSQUITTO, Broker, Mosquitto, NatsBroker, Publisher, publish
from gateway_process import prepared
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.mqtt.broker import MqttBroker
from pulse.adapters.mqtt.connection import Connection
from pulse.adapters.nats.connection import PulseClient
from pulse.domain.errors import Outage
from pulse.domain.mqtt import Arrival
from pulse.domain.topics import FILTERS
from pulse.wiring.bridge import account_of

DEVICE = "tenant/acme/device/d0"
LARGE = 2000
READ_BYTES_MAX = 256 * 1024
"""What a transport of asyncio hands over at once, at the most."""
BROKERS = {"mosquitto": Mosquitto, "nats-server": NatsBroker}


def make_broker(kind: str, folder: Path) -> Broker:
    made: Broker = BROKERS[kind](folder=folder / kind)
    return made


@pytest.fixture(params=[pytest.param("mosquitto", marks=NEEDS_MOSQUITTO), "nats-server"])
def broker(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Broker]:
    made = make_broker(request.param, scratch)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def mosquitto(scratch: Path) -> Iterator[Mosquitto]:
    made = Mosquitto(folder=scratch / "mosquitto")
    made.start()
    yield made
    made.kill()


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[PulseClient]:
    async with prepared(nats) as made:
        yield made


def reading(number: int) -> bytes:
    return b'{"metrics":{"n":%d}}' % number


async def say(broker: Broker, *messages: tuple[str, bytes | str]) -> None:
    await asyncio.to_thread(publish, broker, messages)


async def numbers(client: PulseClient) -> list[int]:
    return sorted(msgspec.json.decode(each.payload)["metrics"]["n"] for each in await stored(client))


async def settled(bridge: Running, count: int) -> None:
    await until(lambda: bridge.settled >= count, f"{count} messages are settled")
    assert bridge.settled == count, bridge.counts()


async def test_what_devices_say_is_stored_as_it_came(client: PulseClient, broker: Broker) -> None:
    async with bridging(client, bridge_settings(broker)) as bridge:
        await say(
            broker,
            (f"{DEVICE}/telemetry", b'{"metrics" : {"t":21.50}}'),
            (f"{DEVICE}/heartbeat", b""),
            (f"{DEVICE}/heartbeat", b'{"seq":1}'),
        )
        await settled(bridge, 3)
        found = await stored(client)
    assert {bytes(each.payload) for each in found} == {b'{"metrics" : {"t":21.50}}', b"{}", b'{"seq":1}'}
    assert {(each.tenant_id, each.device_id, each.source) for each in found} == {("acme", "d0", "mqtt")}
    assert bridge.outcomes() == {"stored": 3}


async def test_identical_readings_are_as_many_rows_as_there_were(client: PulseClient, broker: Broker) -> None:
    async with bridging(client, bridge_settings(broker)) as bridge:
        await say(broker, *[(f"{DEVICE}/telemetry", reading(1))] * 50)
        await settled(bridge, 50)
        assert await numbers(client) == [1] * 50


async def test_rubbish_is_accounted_for_and_the_bridge_goes_on(client: PulseClient, broker: Broker) -> None:
    rubbish: list[tuple[str, bytes, str]] = [
        (f"{DEVICE}/telemetry", b"5", "invalid_payload"),
        (f"{DEVICE}/telemetry", b"[]", "invalid_payload"),
        (f"{DEVICE}/telemetry", b"", "invalid_json"),
        (f"{DEVICE}/telemetry", b"\xff\xfe\x00", "invalid_json"),
        (f"{DEVICE}/telemetry", b'{"metrics":{"t":1}}'.ljust(1_000_000), "too_large"),
        (f"{DEVICE}/telemetry", b'{"metrics":{"t":1}}'.ljust(100_000), "too_large"),
        (f"{DEVICE}/commands/ack", b"{}", "invalid_payload"),
        (f"{DEVICE}/shadow/name/x y/update", b"{}", "invalid_identity"),
        ("tenant/acme/device/nobody/telemetry", reading(1), "not_found"),
        ("tenant//device/d0/telemetry", reading(1), "invalid_identity"),
        ("tenant/acme/device//telemetry", reading(1), "invalid_identity"),
        ("tenant/acmé/device/d0/telemetry", reading(1), "invalid_identity"),
    ]
    if broker.version == "3.1.1":
        rubbish = [each for each in rubbish if " " not in each[0]]  # nats-server hangs up on whoever says it
    async with bridging(client, bridge_settings(broker)) as bridge:
        await say(broker, *[(topic, payload) for topic, payload, _ in rubbish], (f"{DEVICE}/telemetry", reading(7)))
        await settled(bridge, len(rubbish) + 1)
        assert bridge.refusals() == Counter(reason for *_, reason in rubbish)
        # A wrong answer to a command is told to its device.
        assert bridge.outcomes() == {"stored": 1, "dead_letter": len(rubbish) - 2, "refused": 1, "rejected": 1}
        kept = Counter(letter.reason.value for letter in await letters(client))
        assert kept == Counter(
            reason for topic, payload, reason in rubbish if len(payload) < 1_000_000 and "/commands/" not in topic
        )
        assert await numbers(client) == [7]
        assert bridge.ready


async def test_what_the_broker_kept_from_before_is_no_news(client: PulseClient, broker: Broker) -> None:
    def retain() -> None:
        with Publisher(broker, "device").connected() as publisher:
            publisher.say(f"{DEVICE}/telemetry", reading(1), retain=True)

    await asyncio.to_thread(retain)
    async with bridging(client, bridge_settings(broker)) as bridge:
        await say(broker, (f"{DEVICE}/telemetry", reading(2)))
        await until(lambda: bridge.outcomes().get("stored") == 1, "the live one is stored")
        await asyncio.to_thread(retain)
        await until(lambda: bridge.outcomes().get("stored") == 2, "said now, it is news, retained or not")
    # A shared subscription and 5 send nothing retained; 3.1.1 does, and it is counted.
    assert bridge.refusals() == ({} if broker.version == "5" else {"retained": 1})
    assert await numbers(client) == [1, 2]


async def test_what_is_said_while_no_bridge_runs_comes_when_it_does(client: PulseClient, broker: Broker) -> None:
    async with bridging(client, bridge_settings(broker)):
        pass
    await say(broker, *((f"{DEVICE}/telemetry", reading(number)) for number in range(100)))
    async with bridging(client, bridge_settings(broker)) as bridge:
        await settled(bridge, 100)
    assert await numbers(client) == list(range(100))


async def test_a_stop_under_load_loses_and_doubles_nothing(client: PulseClient, broker: Broker) -> None:
    async def load() -> None:
        await say(broker, *((f"{DEVICE}/telemetry", reading(number)) for number in range(2000)))

    saying: asyncio.Task[None] | None = None
    for _ in range(4):
        async with bridging(client, bridge_settings(broker)):
            saying = saying or asyncio.create_task(load())
            await asyncio.sleep(0.1)
    assert saying is not None
    await saying
    async with bridging(client, bridge_settings(broker)):
        await until(lambda: _has(client, 2000), "all have come")
    assert await numbers(client) == list(range(2000))


async def test_while_jetstream_is_away_the_broker_keeps_what_comes(
    client: PulseClient, nats: NatsServer, broker: Broker
) -> None:
    async with bridging(client, bridge_settings(broker, mqtt_receive_max=50, publish_timeout_s=1.0)) as bridge:
        await say(broker, (f"{DEVICE}/telemetry", reading(0)))
        await settled(bridge, 1)
        await asyncio.to_thread(nats.kill)
        await say(broker, *((f"{DEVICE}/telemetry", reading(number).ljust(LARGE)) for number in range(1, 1000)))
        await until(lambda: bridge.counts()['waiting{system="nats"}'] == 1, "the bridge waits")
        # Bounded by the broker (5), or by reading no more (3.1.1) than what two reads bring.
        assert 0 < bridge.counts()["in_flight"] <= (50 if broker.version == "5" else 50 + 2 * READ_BYTES_MAX // LARGE)
        await asyncio.sleep(1.5)
        assert bridge.outcomes()["stored"] == 1
        await asyncio.to_thread(nats.start)
        await until(
            lambda: bridge.counts()["in_flight"] == 0 and bridge.outcomes()["stored"] >= 1000, "it goes on by itself"
        )
        await until(lambda: bridge.counts()['waiting{system="nats"}'] == 0, "it waits no more")
    assert await numbers(client) == list(range(1000))


async def test_readyz_names_the_broker_while_it_is_away_and_the_bridge_comes_back(
    client: PulseClient, broker: Broker
) -> None:
    async with bridging(client, bridge_settings(broker)) as bridge:
        # With a `seq`: the broker may end before it has read the PUBACK, and then it sends the message again.
        await say(broker, (f"{DEVICE}/telemetry", b'{"metrics":{"n":1},"seq":1}'))
        await settled(bridge, 1)
        await asyncio.to_thread(broker.stop)
        await until(lambda: not bridge.ready, "not ready")
        assert '"mqtt":{"ok":false,"waiting_for":"' in bridge.told
        await asyncio.sleep(0.3)
        await asyncio.to_thread(broker.start)
        await until(lambda: bridge.ready, "ready again")
        await say(broker, (f"{DEVICE}/telemetry", b'{"metrics":{"n":2},"seq":2}'))
        await until(lambda: _has(client, 2), "both are stored")
    assert await numbers(client) == [1, 2]


async def test_connections_that_break_again_and_again_lose_and_double_nothing(
    client: PulseClient, broker: Broker
) -> None:
    """Somebody else connects as us, so that the broker hangs up in the middle of what it sends."""
    settings = bridge_settings(broker, mqtt_receive_max=20)
    thief = MqttBroker(account_of(settings), filters=FILTERS)
    async with bridging(client, settings) as bridge:
        saying = asyncio.create_task(say(broker, *((f"{DEVICE}/telemetry", reading(number)) for number in range(1500))))
        for _ in range(5):
            await asyncio.sleep(0.05)
            try:
                connection = await thief.connect(_Deaf())
            except Outage:
                continue
            connection.abort("stolen for a moment")
        await saying
        await until(lambda: _has(client, 1500), "all have come")
        await until(lambda: bridge.counts()["in_flight"] == 0, "nothing is in flight")
    assert await numbers(client) == list(range(1500))


async def test_a_broker_that_refuses_us_is_asked_again_and_named(client: PulseClient, scratch: Path) -> None:
    broker = NatsBroker(folder=scratch / "broker")
    await asyncio.to_thread(broker.start)
    try:
        async with bridging(client, bridge_settings(broker, mqtt_password="wrong"), wait=False) as bridge:
            await until(lambda: "refuses us" in bridge.told or "closed the connection" in bridge.told, "it says so")
            assert not bridge.ready
    finally:
        broker.kill()


async def test_the_version_is_found_out(client: PulseClient, broker: Broker) -> None:
    settings = bridge_settings(broker, mqtt_version="auto")
    found = MqttBroker(account_of(settings), filters=FILTERS)
    connection = await found.connect(_Deaf())
    assert connection.version.name == ("V5" if broker.version == "5" else "V3_1_1")
    await connection.close()
    async with bridging(client, settings) as bridge:
        await say(broker, (f"{DEVICE}/telemetry", reading(1)))
        await settled(bridge, 1)


@NEEDS_MOSQUITTO
async def test_a_silent_broker_is_found_out(client: PulseClient, mosquitto: Mosquitto) -> None:
    """It is stopped in its tracks: its socket stays open, and nothing comes."""
    import psutil  # type: ignore[import-untyped]

    async with bridging(client, bridge_settings(mosquitto, mqtt_keep_alive_s=2)) as bridge:
        frozen = psutil.Process(mosquitto.process.pid)
        frozen.suspend()
        try:
            await until(lambda: not bridge.ready, "not ready")
            assert "silent" in bridge.told or "did not answer" in bridge.told
        finally:
            frozen.resume()
        await until(lambda: bridge.ready, "ready again")


@NEEDS_MOSQUITTO
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_by_tls_both_sides_prove_who_they_are(client: PulseClient, scratch: Path) -> None:
    authority, server, bridge_cert = (scratch / name for name in ("ca.pem", "server.pem", "bridge.pem"))
    _openssl("req -x509 -nodes -days 2 -subj /CN=ca", out=authority)
    for certificate in (server, bridge_cert):
        subject = f"-subj /CN={certificate.stem} -addext subjectAltName=IP:127.0.0.1"
        _openssl(f"req -x509 -nodes -days 2 {subject} -CA {authority.name} -CAkey ca.pem.key", out=certificate)
    broker = Mosquitto(
        folder=scratch / "mosquitto",
        extra_conf=f"cafile {authority}\ncertfile {server}\nkeyfile {server}.key\nrequire_certificate true\n",
    )
    await asyncio.to_thread(broker.start)
    tls = {"mqtt_url": broker.url.replace("mqtt:", "mqtts:"), "mqtt_ca_file": str(authority)}
    own = {"mqtt_cert_file": str(bridge_cert), "mqtt_key_file": f"{bridge_cert}.key"}
    try:
        async with bridging(client, bridge_settings(broker, **tls, **own)) as bridge:
            assert bridge.ready
        async with bridging(client, bridge_settings(broker, **tls), wait=False) as bridge:
            await until(lambda: "mqtt" in bridge.told and "first connection" not in bridge.told, "it was refused")
            assert not bridge.ready
        other = MqttBroker(account_of(bridge_settings(broker, **{**tls, "mqtt_ca_file": ""}, **own)), filters=FILTERS)
        with pytest.raises(Outage, match="certificate"):
            await other.connect(_Deaf())
    finally:
        broker.kill()


def _openssl(arguments: str, *, out: Path) -> None:
    key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256"
    command = f"openssl {arguments} {key} -keyout {out.name}.key -out {out.name}"
    subprocess.run(command.split(), check=True, capture_output=True, cwd=out.parent)


@NEEDS_MOSQUITTO
async def test_two_bridges_share_what_comes(client: PulseClient, mosquitto: Mosquitto) -> None:
    async with (
        bridging(client, bridge_settings(mosquitto, client_id="bridge-1")) as one,
        bridging(client, bridge_settings(mosquitto, client_id="bridge-2")) as two,
    ):
        await say(mosquitto, *((f"{DEVICE}/telemetry", reading(number)) for number in range(400)))
        await until(lambda: one.settled + two.settled >= 400, "all are settled")
        assert min(one.settled, two.settled) > 100
    assert await numbers(client) == list(range(400))


async def _has(client: PulseClient, count: int) -> bool:
    return (await client.jetstream().stream_info("TELEMETRY")).state.messages >= count


class _Deaf:
    """Takes messages and acknowledges none."""

    def opened(self, connection: Connection, *, session_present: bool) -> None: ...

    def received(self, arrivals: list[Arrival]) -> None: ...
