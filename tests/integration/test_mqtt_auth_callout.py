"""nats-server's own MQTT listener: who comes in, what he may do there, and when he has to go."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
from nats.aio.msg import Msg
from prometheus_client import CollectorRegistry

from conftest import NatsServerFactory
from mqtt_client import WAIT_S_MAX, device
from mqtt_client import Device as Client
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import MqttListener, NatsServer
from pulse.adapters.nats.auth_callout import AuthCallout, Doorkeeper
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.mqtt_queues import cut_queues, cut_route_queues
from pulse.adapters.nats.nkeys import AccountKey
from pulse.adapters.nats.provisioner import Provisioner
from pulse.domain.errors import ConfigurationError
from pulse.domain.identity import Device, Tenant, TokenDigest, digest, make_token
from pulse.domain.mqtt_access import DOWN, UP
from pulse.domain.registry import Change, Complete, Put, Reading, Removed
from pulse.runtime.metrics import MqttAccessMetrics
from pulse.services.mqtt_access import MqttAccess, Revocations
from pulse.services.registry import DeviceRegistry, RegistryMirror
from pulse.topology.declared import load
from pulse.wiring.mqtt_access import decide

SECRET = secrets.token_urlsafe(24)
TOKEN = make_token(secrets.token_bytes(32))
OTHER_TOKEN = make_token(secrets.token_bytes(32))
ACCESS_PASSWORD = secrets.token_urlsafe(24)
BRIDGE_PASSWORD = secrets.token_urlsafe(24)
T1 = "acme/t-1"
T2 = "acme/t-2"
OWN = "tenant/acme/device/t-1/"
SUBSCRIPTIONS_MAX = 1000
"""As nats_mqtt.conf has it."""


def known(tenant_id: str, device_id: str, *tokens: TokenDigest, enabled: bool = True) -> Device:
    return Device(tenant_id, device_id, enabled, tokens or (TokenDigest(digest(TOKEN)),))


async def until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds."""
    async with asyncio.timeout(WAIT_S_MAX):
        while not condition():  # noqa: ASYNC110 - what it waits for happens in another thread or process
            await asyncio.sleep(0.01)


@dataclass(kw_only=True)
class Door:
    """A nats-server with its listener, the service that answers it, and the registry that this looks into."""

    server: NatsServer
    port: int
    client: PulseClient
    registry: DeviceRegistry
    changes: asyncio.Queue[Change]
    open: list[bool] = field(default_factory=lambda: [True])
    metrics: CollectorRegistry = field(default_factory=CollectorRegistry)

    def comes_in(self, user: str = T1, token: str = TOKEN, *, client_id: str = "") -> bool:
        """Whether a client of that name is let in."""
        with device(port=self.port, user=user, token=token, client_id=client_id or user or "somebody") as client:
            return client.connect()

    @contextmanager
    def inside(
        self, user: str = T1, token: str = TOKEN, *, client_id: str = "", clean: bool = True
    ) -> Iterator[Client]:
        """A client that has been let in."""
        with device(port=self.port, user=user, token=token, client_id=client_id, clean=clean) as client:
            assert client.connect()
            yield client

    async def say(self, change: Change) -> None:
        """A change of the registry, taken in."""
        self.changes.put_nowait(change)
        await until(self.changes.empty)

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.get_sample_value(name, labels) or 0.0


class _Feed:
    def __init__(self, changes: asyncio.Queue[Change]) -> None:
        self._changes = changes

    async def watch(self) -> AsyncGenerator[Change, None]:
        while True:
            yield await self._changes.get()


@asynccontextmanager
async def a_door(factory: NatsServerFactory, *, session_s: float = 3600.0) -> AsyncIterator[Door]:
    port = ports.free_port()
    listener = MqttListener(
        port=port,
        bridge_password=BRIDGE_PASSWORD,
        access_password=ACCESS_PASSWORD,
        issuer=AccountKey(SECRET).public,
    )
    server = factory(mqtt=listener)
    server.start()
    changes: asyncio.Queue[Change] = asyncio.Queue()
    for change in (
        Reading(from_scratch=True),
        Put(Tenant("acme", enabled=True)),
        Put(Tenant("beta", enabled=True)),
        Put(Tenant("closed", enabled=False)),
        Put(known("acme", "t-1")),
        Put(known("acme", "t-2", TokenDigest(digest(OTHER_TOKEN)))),
        Put(known("beta", "t-1", TokenDigest(digest(OTHER_TOKEN)))),
        Put(known("closed", "t-1")),
        Put(known("acme", "off", enabled=False)),
        Complete(),
    ):
        changes.put_nowait(change)
    async with (
        connection(server.access_url, name="test mqtt access") as access_client,
        connection(server.url, name="test") as client,
    ):
        registry = DeviceRegistry()
        door = Door(server=server, port=port, client=client, registry=registry, changes=changes)
        metrics = MqttAccessMetrics(door.metrics)
        access = MqttAccess(registry=registry, metrics=metrics, session_s_max=session_s, is_open=lambda: door.open[0])
        revocations = Revocations(
            feed=_Feed(changes), registry=registry, broker=Doorkeeper(access_client), metrics=metrics
        )
        callout = AuthCallout(access_client, key=AccountKey(SECRET), decide=partial(decide, access))
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for service in (RegistryMirror(feed=revocations, registry=registry), revocations, callout):
                group.create_task(service.run(stop), name=service.name)
            await until(lambda: registry.ready)
            yield door
            stop.set()


@pytest.fixture
async def door(nats_server_factory: NatsServerFactory) -> AsyncIterator[Door]:
    async with a_door(nats_server_factory) as made:
        yield made


async def comes_in(door: Door, user: str = T1, token: str = TOKEN, *, client_id: str = "") -> bool:
    return await asyncio.to_thread(door.comes_in, user, token, client_id=client_id)


async def test_a_device_comes_in_with_its_token(door: Door) -> None:
    assert await comes_in(door, client_id=T1)
    assert door.counted("pulse_mqtt_connections_total", outcome="allowed") == 1


@pytest.mark.parametrize(
    ("user", "token"),
    [
        pytest.param("", "", id="anonymous"),
        pytest.param(T1, "", id="no token"),
        pytest.param(T1, OTHER_TOKEN, id="another one's token"),
        pytest.param("acme/t-2", TOKEN, id="another one's name"),
        pytest.param("acme/nobody", TOKEN, id="an unknown device"),
        pytest.param("acme/off", TOKEN, id="a disabled device"),
        pytest.param("closed/t-1", TOKEN, id="a disabled tenant"),
        pytest.param("acme", TOKEN, id="a tenant"),
        pytest.param("acme/t-1/more", TOKEN, id="more than a device"),
    ],
)
async def test_nobody_else_comes_in(door: Door, user: str, token: str) -> None:
    assert not await comes_in(door, user, token)
    assert door.counted("pulse_mqtt_connections_total", outcome="credentials") == 1


@pytest.mark.parametrize("user", ["acme/*", ">", "pulse"])
async def test_nobody_comes_in_by_a_name_that_nats_server_knows_something_by(door: Door, user: str) -> None:
    assert not await comes_in(door, user, TOKEN, client_id=T1)


@pytest.mark.parametrize("client_id", ["pulse-bridge", "acme/t-2", "beta/t-1", "acme/t-11", "x"])
async def test_nobody_takes_over_the_session_of_another(door: Door, client_id: str) -> None:
    """A broker knows a session by its client id alone: its owner would lose what waits there for him."""
    assert not await comes_in(door, client_id=client_id)
    assert door.counted("pulse_mqtt_connections_total", outcome="client_id") == 1


async def test_nobody_comes_in_before_somebody_listens(door: Door) -> None:
    door.open[0] = False
    assert not await comes_in(door)
    assert door.counted("pulse_mqtt_connections_total", outcome="not_ready") == 1
    door.open[0] = True
    assert await comes_in(door)


async def test_a_device_s_token_opens_no_connection_to_nats_itself(door: Door) -> None:
    with pytest.raises(ConfigurationError, match="refuses these credentials"):
        async with connection(f"nats://acme%2Ft-1:{TOKEN}@127.0.0.1:{door.server.port}", name="device"):
            pass
    assert door.counted("pulse_mqtt_connections_total", outcome="protocol") >= 1


async def test_each_of_our_users_has_its_own_entrance(door: Door) -> None:
    """A password that got out by one of them is of no use at the other."""
    password = door.server.url.split(":")[2].split("@")[0]
    assert not await comes_in(door, "pulse", password)
    assert not await comes_in(door, MqttListener.ACCESS_USER, ACCESS_PASSWORD)
    assert await comes_in(door, MqttListener.BRIDGE_USER, BRIDGE_PASSWORD)
    url = f"nats://{MqttListener.BRIDGE_USER}:{BRIDGE_PASSWORD}@127.0.0.1:{door.server.port}"
    with pytest.raises(ConfigurationError, match="refuses these credentials"):
        async with connection(url, name="bridge"):
            pass


async def test_the_questions_with_their_passwords_are_heard_by_nobody_else(door: Door) -> None:
    heard: list[str] = []

    async def note(message: Msg) -> None:
        heard.append(message.subject)

    for subject in (">", "$SYS.>", "$SYS.REQ.USER.AUTH"):
        await door.client.subscribe(subject, cb=note)
    await asyncio.to_thread(_publish_all, door, [OWN + "telemetry"])
    await until(lambda: f"{OWN}telemetry".replace("/", ".") in heard)
    assert not any(subject.startswith("$SYS") for subject in heard)


async def test_the_user_who_asks_may_do_nothing_else(door: Door) -> None:
    async with connection(door.server.access_url, name="test") as client:
        before = time.monotonic()
        for subject in (">", "$SYS.>", "$SYS.REQ.USER.AUTH", "tenant.>"):
            await client.subscribe(subject)
        for subject in ("tenant.acme.device.t-1.telemetry", "$SYS.REQ.SERVER.PING.VARZ", "$JS.API.STREAM.LIST"):
            await client.publish(subject, b"")
            await client.flush()
            await client.flush()
            assert client.denied_since(before).endswith(f'"{subject.lower()}"')


@asynccontextmanager
async def listening(door: Door) -> AsyncIterator[list[tuple[str, bytes]]]:
    """All that arrives anywhere, as a user hears it who may hear everything; without nats-server's own copies."""
    heard: list[tuple[str, bytes]] = []

    async def note(message: Msg) -> None:
        if not message.subject.startswith("$MQTT.msgs.tenant.acme.device.t-1."):
            heard.append((message.subject, message.data))

    await door.client.subscribe(">", cb=note)
    await door.client.flush()
    yield heard


async def test_a_device_is_heard_on_its_own_topics(door: Door) -> None:
    topics = [OWN + name.replace("+", "main") for name in UP]
    async with listening(door) as heard:
        await asyncio.to_thread(_publish_all, door, topics)
        await until(lambda: len([each for each in heard if each[0].startswith("tenant.")]) == len(UP))
    subjects = {subject for subject, _ in heard if subject.startswith("tenant.")}
    assert subjects == {topic.replace("/", ".") for topic in topics}


async def test_a_device_is_not_heard_anywhere_else(door: Door) -> None:
    """nats-server confirms such a message all the same: that is one of its narrower promises."""
    topics = [
        "tenant/acme/device/t-2/telemetry",
        "tenant/acme/device/t-2/commands/ack",
        "tenant/beta/device/t-1/telemetry",
        *(OWN + name for name in ("commands", "shadow/update/accepted", "telemetry/more", "other", "")),
        OWN + "telemetry.x",
        "/" + OWN + "telemetry",
        OWN.rstrip("/") + "//telemetry",
        OWN.upper() + "telemetry",
        "telemetry/acme",
        "telemetry.acme",
        "$JS/API/STREAM/DELETE/TELEMETRY",
        "$KV/registry/device/acme/t-1",
        "$MQTT/sub/x",
        "$SYS/REQ/SERVER/PING",
        "_INBOX/x",
    ]
    async with listening(door) as heard:
        await asyncio.to_thread(_publish_all, door, [*topics, OWN + "telemetry"])
        await until(lambda: any(subject == "tenant.acme.device.t-1.telemetry" for subject, _ in heard))
    assert [subject for subject, data in heard if data == b"hostile"] == ["tenant.acme.device.t-1.telemetry"]


async def test_a_device_has_so_many_filters_and_no_more(door: Door) -> None:
    """Topics of routes are any number, and a session that is kept is written down anew with each of them."""

    def subscribe() -> int:
        with door.inside(clean=False) as client:
            mids = [
                client.client.subscribe(f"tenant/acme/route/a/{number}", qos=0)[1]
                for number in range(SUBSCRIPTIONS_MAX + 100)
            ]
            client.wait(lambda: set(mids) <= client.heard.granted.keys(), "an answer to each")
            assert not client.heard.disconnected
            return sum(code == 0 for code in client.heard.granted.values())

    assert SUBSCRIPTIONS_MAX // 2 <= await asyncio.to_thread(subscribe) <= SUBSCRIPTIONS_MAX


def _publish_all(door: Door, topics: list[str]) -> None:
    with door.inside() as client:
        for topic in topics:
            client.publish(topic, b"hostile")


async def test_what_waits_for_a_device_is_cut_and_what_devices_said_is_not(door: Door) -> None:
    """nats-server keeps either in one stream, without a limit: a device that is away could fill everybody's store."""
    client, delta = door.client, OWN + "shadow/update/delta"
    bridge = {"port": door.port, "user": "mqtt-bridge", "token": BRIDGE_PASSWORD, "clean": False}

    def fill() -> None:
        with device(**bridge) as listening:  # type: ignore[arg-type]
            assert listening.connect()
            assert listening.subscribe("tenant/+/device/+/telemetry")
        with door.inside(clean=False) as heard:
            assert heard.subscribe(delta)
            assert heard.subscribe(OWN + "commands")
        with device(**bridge | {"client_id": "other"}) as speaking:  # type: ignore[arg-type]
            assert speaking.connect()
            for number in range(8):
                speaking.publish(delta, b"%d" % number)
            speaking.publish(OWN + "commands", b"command")
        with door.inside(T2, OTHER_TOKEN) as other:
            for number in range(8):
                other.publish("tenant/acme/device/t-2/telemetry", b"%d" % number)

    def hear(client: Client, count: int) -> list[bytes]:
        assert client.connect()
        client.wait(lambda: len(client.heard.messages) >= count, f"{count} messages")
        return sorted(payload for _, payload in client.heard.messages)

    def drain() -> tuple[list[bytes], list[bytes]]:
        with device(port=door.port, user=T1, token=TOKEN, clean=False) as own, device(**bridge) as ours:  # type: ignore[arg-type]
            return hear(own, 3), hear(ours, 8)

    await asyncio.to_thread(fill)
    assert await cut_queues(client, DOWN) == 0, "there is room"
    assert await cut_queues(client, DOWN, queue_max=3) == 5
    assert await cut_queues(client, DOWN, queue_max=3, queue_max_crowded=2, crowded_bytes=1) == 1
    own, ours = await asyncio.to_thread(drain)
    assert own == [b"6", b"7", b"command"]
    assert ours == [b"%d" % number for number in range(8)]


async def test_where_no_device_ever_came_there_is_nothing_to_cut(nats: NatsServer) -> None:
    async with connection(nats.url, name="test") as client:
        assert await cut_queues(client, DOWN, queue_max=0) == 0


async def test_a_last_will_is_held_to_the_same_topics(door: Door) -> None:
    def die(topic: str) -> None:
        with device(port=door.port, user=T1, token=TOKEN) as client:
            client.client.will_set(topic, b"will", qos=1)
            assert client.connect()
            client.end(abruptly=True)

    async with listening(door) as heard:
        await asyncio.to_thread(die, "tenant/acme/device/t-2/telemetry")
        await asyncio.to_thread(die, OWN + "telemetry")
        await until(lambda: any(data == b"will" for _, data in heard))
    assert [subject for subject, data in heard if data == b"will"] == ["tenant.acme.device.t-1.telemetry"]


async def test_a_device_hears_what_is_for_it_and_nothing_else(door: Door) -> None:
    refused = [
        "#",
        "+/#",
        OWN + "#",
        OWN + "+",
        OWN + "telemetry",
        OWN + "shadow/#",
        "tenant/acme/device/+/commands",
        "tenant/acme/device/t-2/commands",
        "tenant/+/device/t-1/commands",
        "$MQTT/#",
        "$MQTT/sub/#",
        "$SYS/#",
        "$JS/#",
        "_INBOX/#",
    ]
    granted = [*(OWN + name for name in DOWN), OWN + "shadow/update/delta", OWN + "shadow/get/accepted"]

    def ask() -> dict[str, bool]:
        with door.inside() as client:
            return {topic: client.subscribe(topic) for topic in [*refused, *granted]}

    assert await asyncio.to_thread(ask) == {topic: topic in granted for topic in [*refused, *granted]}


async def test_a_device_hears_what_the_routes_of_its_tenant_republish_and_no_others(door: Door) -> None:
    granted = ["tenant/acme/route/#", "tenant/acme/route/alerts/+", "tenant/acme/route/alerts/high"]
    refused = ["tenant/beta/route/#", "tenant/+/route/#", "tenant/acme/+/#", "tenant/acme/#"]

    def hear() -> list[tuple[str, bytes]]:
        with door.inside() as listener:
            answers = {topic: listener.subscribe(topic) for topic in [*granted[1:], *refused]}
            assert answers == {topic: topic in granted for topic in answers}
        with door.inside(clean=False) as listener, door.inside(T2, OTHER_TOKEN) as other:
            assert listener.subscribe(granted[0])
            other.publish("tenant/acme/route/alerts", b"hostile")
            with door.inside(MqttListener.BRIDGE_USER, BRIDGE_PASSWORD) as bridge:
                bridge.publish("tenant/beta/route/alerts", b"another tenant's")
                bridge.publish("tenant/acme/route/alerts/high", b"hot")
            listener.wait(lambda: bool(listener.heard.messages), "what is republished")
            return listener.heard.messages

    assert await asyncio.to_thread(hear) == [("tenant/acme/route/alerts/high", b"hot")]


async def test_what_routes_republish_to_a_device_that_is_away_is_cut_whatever_their_topics(door: Door) -> None:
    def fill() -> None:
        with door.inside(clean=False) as away:
            assert away.subscribe("tenant/acme/route/#")
        with door.inside(MqttListener.BRIDGE_USER, BRIDGE_PASSWORD) as bridge:
            for number in range(8):
                bridge.publish(f"tenant/acme/route/alerts/a{number}", b"%d" % number)

    def back() -> list[bytes]:
        with door.inside(clean=False) as again:
            again.wait(lambda: len(again.heard.messages) >= 3, "what was left")
            return sorted(payload for _, payload in again.heard.messages)

    assert await cut_route_queues(door.client, queue_max=0) == 0, "there is nothing yet"
    await asyncio.to_thread(fill)
    assert await cut_route_queues(door.client) == 0, "there is room"
    assert await cut_route_queues(door.client, queue_max=5) == 3
    assert await cut_route_queues(door.client, queue_max=5, queue_max_crowded=3, crowded_bytes=1) == 2
    assert await asyncio.to_thread(back) == [b"5", b"6", b"7"]


async def test_a_device_gets_what_was_sent_to_it_while_it_was_away(door: Door) -> None:
    def first() -> None:
        with door.inside(clean=False) as client:
            assert client.subscribe(OWN + "commands")

    def again() -> list[tuple[str, bytes]]:
        with door.inside(clean=False) as client:
            client.wait(lambda: bool(client.heard.messages), "the command")
            return client.heard.messages

    def send() -> None:
        with door.inside(MqttListener.BRIDGE_USER, BRIDGE_PASSWORD) as bridge:
            bridge.publish(OWN + "commands", b"go")

    await asyncio.to_thread(first)
    # By the bridge's user: a publish of NATS itself would reach no session that is away.
    await asyncio.to_thread(send)
    assert await asyncio.to_thread(again) == [(OWN + "commands", b"go")]


async def test_a_session_ends_in_time_and_the_device_comes_back(nats_server_factory: NatsServerFactory) -> None:
    async with a_door(nats_server_factory, session_s=3.0) as door:

        def stay() -> int:
            with door.inside() as client:
                client.wait(lambda: client.heard.disconnected > 0, "the end of the session")
                return len(client.heard.connected)

        assert await asyncio.to_thread(stay) == 1
        assert await comes_in(door)


async def test_a_session_ends_with_its_token(door: Door) -> None:
    end_ms = time.time_ns() // 1_000_000 + 4000
    await door.say(Put(known("acme", "t-1", TokenDigest(digest(TOKEN), end_ms), TokenDigest(digest(OTHER_TOKEN)))))

    def stay() -> None:
        with door.inside() as client:
            client.wait(lambda: client.heard.disconnected > 0, "the end of the token")

    await asyncio.to_thread(stay)
    assert not await comes_in(door)
    assert await comes_in(door, token=OTHER_TOKEN)


@pytest.mark.parametrize(
    ("change", "sent_away"),
    [
        (Put(known("acme", "t-1", enabled=False)), True),
        (Put(known("acme", "t-1", TokenDigest(digest(OTHER_TOKEN)))), True),
        (Removed("device.acme.t-1"), True),
        (Put(Tenant("acme", enabled=False)), True),
        (Removed("tenant.acme"), True),
        (Put(known("acme", "t-1", TokenDigest(digest(TOKEN)), TokenDigest(digest(OTHER_TOKEN)))), False),
        (Put(known("acme", "t-2", enabled=False)), False),
        (Put(Tenant("beta", enabled=False)), False),
    ],
)
async def test_a_device_is_sent_away_when_something_is_taken_from_it(
    door: Door, change: Change, sent_away: bool
) -> None:
    """And only then: what is done to another one, or given to it, leaves it alone."""
    loop = asyncio.get_running_loop()

    def stay() -> int:
        with door.inside() as client, door.inside("beta/t-1", OTHER_TOKEN) as witness:
            asyncio.run_coroutine_threadsafe(door.say(change), loop).result(WAIT_S_MAX)
            # Behind it, one that is sent away in any case.
            last = Put(known("beta", "t-1", enabled=False))
            asyncio.run_coroutine_threadsafe(door.say(last), loop).result(WAIT_S_MAX)
            witness.wait(lambda: witness.heard.disconnected > 0, "the end of the witness")
            if sent_away:
                client.wait(lambda: client.heard.disconnected > 0, "being sent away")
            return client.heard.disconnected

    assert await asyncio.to_thread(stay) == int(sent_away)
    assert await comes_in(door) is not sent_away
    assert door.counted("pulse_mqtt_disconnected_total") == 1 + sent_away


async def test_the_listener_s_own_streams_are_no_drift(door: Door) -> None:
    assert await comes_in(door)
    provisioner = Provisioner(door.client)
    await provisioner.apply(load(), await provisioner.plan(load()))
    assert not (await provisioner.plan(load())).changes
