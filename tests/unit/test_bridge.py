"""What the bridge has in flight: when a PUBACK goes out, and which message one is that comes again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from edge import NO_LIMITS, make_gateway
from edge import Publisher as NoPublisher
from pulse.domain.dead_letter import Condemned, unpack
from pulse.domain.envelope import unwrap
from pulse.domain.errors import Outage, Reason, Refusal, StreamFull
from pulse.domain.limits import Rate, RateLimits
from pulse.domain.mqtt import Arrival
from pulse.domain.receipt import Receipt, Waiting
from pulse.runtime.metrics import BridgeMetrics
from pulse.services.bridge_admission import Admission
from pulse.services.in_flight import InFlight
from pulse.services.waiting import Waits

NO_LIMIT = Rate(0, 1)
TOPIC = b"tenant/acme/device/t-1/telemetry"
PAYLOAD = b'{"metrics":{"t":1}}'


class Devices:
    ready = True

    def may_speak(self, tenant_id: str, device_id: str) -> bool:
        return tenant_id == "acme" and device_id.startswith("t-")


class Connection:
    def __init__(self) -> None:
        self.acknowledged: list[int] = []
        self.paused = False

    def acknowledge(self, packet_id: int) -> None:
        self.acknowledged.append(packet_id)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


@dataclass
class JetStream:
    """Keeps what is submitted until the test answers; knows ids as a stream does."""

    waiting: list[tuple[str, bytes, str, Waiting]] = field(default_factory=list)
    stored: list[tuple[str, bytes, str]] = field(default_factory=list)
    by_id: dict[str, int] = field(default_factory=dict)
    away: Callable[[], Outage] | None = None

    def send(self, subject: str, body: bytes, *, message_id: str, waiting: Waiting) -> None:
        if self.away is not None:
            raise self.away()
        self.waiting.append((subject, body, message_id, waiting))

    def answer(self, error: Outage | Refusal | None = None, *, but_store: bool = False) -> None:
        """Answer all that waits, until nothing does."""
        while self.waiting:
            waiting, self.waiting = self.waiting, []
            for subject, body, message_id, future in waiting:
                duplicate = message_id in self.by_id
                if (error is None or but_store) and not duplicate:
                    self.stored.append((subject, body, message_id))
                    self.by_id[message_id] = len(self.stored)
                if error is None:
                    future.set_result(Receipt("TELEMETRY", self.by_id[message_id], duplicate))
                else:
                    future.set_exception(error)
            if error is not None:
                return

    async def asked(self, count: int = 1) -> None:
        """Returns once so many wait for an answer."""
        while len(self.waiting) < count:  # noqa: ASYNC110 - a turn of the loop, not a wait
            await asyncio.sleep(0)

    def say(self) -> list[bytes]:
        return [bytes(unwrap(subject, body).payload) for subject, body, _ in self.stored]


class World:
    """A in_flight, its JetStream and its first connection."""

    def __init__(self, *, letters: Rate = NO_LIMIT, limits: RateLimits = NO_LIMITS, receive_max: int = 100) -> None:
        self.jetstream = JetStream()
        self.registry = CollectorRegistry()
        self.metrics = metrics = BridgeMetrics(self.registry)
        self.letters, self.limits, self.receive_max = letters, limits, receive_max
        self.in_flight = self.new_in_flight(metrics)
        metrics.watch(lambda: self.in_flight.count)
        self.connection = self.connect(session_present=False)

    def new_in_flight(self, metrics: BridgeMetrics) -> InFlight:
        return InFlight(
            publisher=self.jetstream,
            admission=Admission(
                gateway=make_gateway(NoPublisher(), limits=self.limits),
                devices=Devices(),
                letters=RateLimits(device=Rate(0, 1), tenant=self.letters),
                session="s",
                body_bytes_max=1000,
            ),
            metrics=metrics,
            receive_max=self.receive_max,
            retry_delay_s_min=0.0,
            retry_delay_s_max=0.0,
            probe=lambda _: None,
        )

    def connect(self, *, session_present: bool = True) -> Connection:
        self.connection = Connection()
        self.in_flight.opened(self.connection, session_present=session_present)
        return self.connection

    def killed(self) -> None:
        """Another process takes the place of this one, with the session of its broker."""
        metrics = BridgeMetrics(CollectorRegistry())
        self.in_flight = self.new_in_flight(metrics)
        self.in_flight.begin_above({"TELEMETRY": len(self.jetstream.stored)})
        self.connect()

    def come(self, packet_id: int = 1, payload: bytes = PAYLOAD, *, topic: bytes = TOPIC, again: bool = False) -> None:
        self.in_flight.take([Arrival(topic, payload, len(payload), packet_id, again)])

    def count(self, outcome: str) -> float:
        return self.registry.get_sample_value("pulse_bridge_messages_total", {"outcome": outcome}) or 0.0

    def refused(self, reason: Reason | str, outcome: str) -> float:
        labels = {"reason": str(reason), "outcome": outcome}
        return self.registry.get_sample_value("pulse_bridge_refused_total", labels) or 0.0

    def letter(self) -> Condemned:
        ((subject, body, _),) = self.jetstream.stored
        found = unpack(subject, body)
        assert isinstance(found, Condemned)
        return found


async def test_a_puback_goes_out_after_the_answer_of_jetstream_and_not_before() -> None:
    world = World()
    world.come(7)
    assert world.connection.acknowledged == []
    assert not world.in_flight.empty.is_set()
    world.jetstream.answer()
    assert world.connection.acknowledged == [7]
    assert world.in_flight.empty.is_set()
    assert world.count("stored") == 1


async def test_an_outage_costs_no_puback_and_the_message_keeps_its_id() -> None:
    world = World()
    retries = asyncio.create_task(world.in_flight.retry())
    world.come(7)
    ((_, body, message_id, _),) = world.jetstream.waiting
    for _ in range(3):
        world.jetstream.answer(Outage("nats", "no answer"))
        assert world.connection.acknowledged == []
        await world.jetstream.asked()
        ((_, again, id_again, _),) = world.jetstream.waiting
        assert (again, id_again) == (body, message_id)
    world.jetstream.away = lambda: Outage("nats", "away")
    world.come(8)
    world.jetstream.away = None
    await world.jetstream.asked(2)
    world.jetstream.answer()
    assert world.connection.acknowledged == [7, 8]
    retries.cancel()


async def test_a_new_connection_does_not_end_the_wait_of_what_is_in_flight() -> None:
    world = World()
    waits = Waits(world.metrics, delay_s_min=0.0, delay_s_max=0.0)
    retries = asyncio.create_task(world.in_flight.retry())

    def waiting() -> float | None:
        return world.registry.get_sample_value("pulse_bridge_waiting", {"system": "nats"})

    world.come(7)
    world.jetstream.answer(Outage("nats", "no answer"))
    await waits.out(Outage("nats", "no streams"), 1, asyncio.Event())
    waits.over()
    assert waiting() == 1
    await world.jetstream.asked()
    world.jetstream.answer()
    assert waiting() == 0
    retries.cancel()


async def test_our_own_lost_answer_makes_no_second_message() -> None:
    """The stream has it, the answer was lost: the duplicate is our own try, above what was there before."""
    world = World()
    world.come(1, b'{"metrics":{"first":1}}')
    world.jetstream.answer()
    retries = asyncio.create_task(world.in_flight.retry())
    world.come(7)
    world.jetstream.answer(Outage("nats", "no answer"), but_store=True)
    await world.jetstream.asked()
    world.jetstream.answer()
    assert len(world.jetstream.stored) == 2
    assert world.connection.acknowledged == [1, 7]
    assert world.count("duplicate") == 1
    retries.cancel()


async def test_two_honest_messages_of_the_same_bytes_under_one_packet_id_are_two() -> None:
    world = World()
    for _ in range(3):
        world.come(7)
        world.jetstream.answer()
    assert world.jetstream.say() == [PAYLOAD] * 3
    assert world.connection.acknowledged == [7, 7, 7]
    assert world.count("stored") == 3


async def test_they_are_two_even_where_the_first_was_acknowledged_by_a_bridge_that_was_killed() -> None:
    world = World()
    world.come(7)
    world.jetstream.answer()
    world.killed()
    world.come(7)
    world.jetstream.answer()
    assert world.jetstream.say() == [PAYLOAD] * 2


@pytest.mark.parametrize("is_stored", [False, True])
async def test_what_a_killed_bridge_had_in_hand_is_stored_once(is_stored: bool) -> None:
    world = World()
    world.come(7)
    world.jetstream.answer(Outage("nats", "killed here"), but_store=is_stored)
    world.killed()
    world.come(7, again=True)
    world.jetstream.answer()
    assert world.jetstream.say() == [PAYLOAD]
    assert world.connection.acknowledged == [7]


async def test_a_seq_names_a_message_whatever_its_packet_id() -> None:
    world = World()
    for packet_id in (7, 8):
        world.come(packet_id, b'{"metrics":{"t":1},"seq":5}')
        world.jetstream.answer()
    assert len(world.jetstream.stored) == 1
    assert world.connection.acknowledged == [7, 8]


async def test_what_is_in_hand_when_the_connection_is_lost_is_stored_once_and_acknowledged_when_it_comes_again() -> (
    None
):
    world = World()
    world.come(7)
    first = world.connection
    world.in_flight.lost()
    world.connect()
    world.come(7, again=True)
    assert len(world.jetstream.waiting) == 1
    world.jetstream.answer()
    assert (first.acknowledged, world.connection.acknowledged) == ([], [7])
    assert (world.count("stored"), world.count("repeated")) == (1, 1)


async def test_what_was_stored_while_no_broker_was_there_is_acknowledged_at_once_when_it_comes_again() -> None:
    world = World()
    world.come(7)
    world.in_flight.lost()
    world.jetstream.answer()
    world.connect()
    assert world.connection.acknowledged == [], "before it has come again, the broker need not know the packet id"
    world.come(7, again=True)
    assert world.connection.acknowledged == [7]
    assert len(world.jetstream.stored) == 1


async def test_what_is_stored_before_it_has_come_again_is_acknowledged_when_it_has() -> None:
    """The new connection's broker need not have sent it yet, and a PUBACK for what was not sent is an error."""
    world = World()
    world.come(7)
    world.in_flight.lost()
    world.connect()
    world.jetstream.answer()
    assert world.connection.acknowledged == []
    world.come(7, again=True)
    assert world.connection.acknowledged == [7]


async def test_in_a_new_session_the_same_bytes_under_the_same_packet_id_are_another_message() -> None:
    world = World()
    world.come(7)
    world.in_flight.lost()
    world.jetstream.answer()
    world.connect(session_present=False)
    world.come(7)
    world.jetstream.answer()
    assert world.jetstream.say() == [PAYLOAD] * 2
    assert world.connection.acknowledged == [7]


async def test_another_message_under_a_packet_id_in_hand_is_another_message() -> None:
    """A broker that numbers anew after a crash of its own."""
    world = World()
    world.come(7)
    world.in_flight.lost()
    world.jetstream.answer()
    world.connect()
    world.come(7, b'{"metrics":{"t":2}}', again=True)
    assert world.connection.acknowledged == []
    world.jetstream.answer()
    assert len(world.jetstream.stored) == 2
    assert world.connection.acknowledged == [7]


async def test_no_packet_id_of_a_lost_session_is_ever_acknowledged() -> None:
    """The broker has forgotten us: the same number is another message's."""
    world = World()
    world.come(7)
    world.in_flight.lost()
    world.connect(session_present=False)
    world.jetstream.answer()
    assert world.connection.acknowledged == []
    world.come(7, b'{"metrics":{"t":2}}')
    assert world.connection.acknowledged == []
    world.jetstream.answer()
    assert world.connection.acknowledged == [7]
    assert world.in_flight.empty.is_set()


async def test_reading_stops_at_twice_the_receive_maximum_and_goes_on() -> None:
    world = World(receive_max=5)
    for number in range(1, 11):
        assert not world.connection.paused
        world.come(number, b'{"metrics":{"t":%d}}' % number)
    assert world.connection.paused
    world.jetstream.answer()
    assert not world.connection.paused


async def test_qos_0_is_stored_and_needs_no_puback() -> None:
    world = World()
    for _ in range(2):
        world.come(0)
    world.jetstream.answer()
    assert len(world.jetstream.stored) == 2
    assert world.connection.acknowledged == []
    assert world.in_flight.empty.is_set()


@pytest.mark.parametrize(
    ("topic", "payload", "reason"),
    [
        (TOPIC, b"5", Reason.INVALID_PAYLOAD),
        (TOPIC, b"[]", Reason.INVALID_PAYLOAD),
        (TOPIC, b"", Reason.INVALID_JSON),
        (TOPIC, b'{"metrics":{"t":"\xff"}}', Reason.INVALID_JSON),
        (TOPIC, b'{"metrics":{"t":1},"ts":1}', Reason.TIMESTAMP_OUT_OF_RANGE),
        (TOPIC, b'{"metrics":{"t":"%b"}}' % (b"x" * 2000), Reason.TOO_LARGE),
        (b"tenant/acme/device/nobody/telemetry", PAYLOAD, Reason.NOT_FOUND),
        (b"tenant//device/t-1/telemetry", PAYLOAD, Reason.INVALID_IDENTITY),
        (b"tenant/acme/device/+/telemetry", PAYLOAD, Reason.INVALID_IDENTITY),
        (b"tenant/acme/device/t-1/\xff", PAYLOAD, Reason.INVALID_TOPIC),
        (b"tenant/acme/device/nobody/commands/ack", b"{}", Reason.NOT_FOUND),
    ],
)
async def test_rubbish_is_a_dead_letter_and_then_acknowledged(topic: bytes, payload: bytes, reason: Reason) -> None:
    world = World()
    world.come(7, payload, topic=topic)
    assert world.connection.acknowledged == []
    world.jetstream.answer()
    assert world.connection.acknowledged == [7]
    assert (world.count("dead_letter"), world.refused(reason, "dead_letter")) == (1, 1)
    letter = world.letter()
    assert letter.reason is reason
    assert letter.body.endswith(payload + b"}") or letter.body == payload
    assert letter.headers.startswith(b"NATS/1.0\r\nPulse-Mqtt-Topic: tenant/")


async def test_what_can_be_no_update_is_acknowledged_once_the_answer_is_on_its_way() -> None:
    world = World()
    world.come(7, b"{", topic=b"tenant/acme/device/t-1/shadow/update")
    assert world.connection.acknowledged == []
    world.jetstream.answer()
    assert world.connection.acknowledged == [7]
    ((subject, body, _),) = world.jetstream.stored
    assert subject == "down.acme.t-1.shadow.update.rejected"
    assert msgspec.json.decode(body)["code"] == 400
    assert (world.count("rejected"), world.refused(Reason.INVALID_JSON, "rejected")) == (1, 1)


async def test_the_dead_letter_of_a_known_device_can_be_mended_and_replayed() -> None:
    """Its body is the envelope, on the subject of its stream."""
    world = World()
    world.come(7, b'{"metrics":{"t":nan}}')
    world.jetstream.answer()
    letter = world.letter()
    assert (letter.stream, letter.subject, letter.tenant_id, letter.device_id) == (
        "TELEMETRY",
        "telemetry.acme",
        "acme",
        "t-1",
    )
    envelope = unwrap(letter.subject, letter.body.replace(b":nan", b":1"))
    assert (envelope.device_id, bytes(envelope.payload)) == ("t-1", PAYLOAD)


async def test_what_is_over_the_rate_or_retained_or_not_kept_is_counted_and_acknowledged() -> None:
    world = World(limits=RateLimits(device=Rate(0.001, 1), tenant=Rate(0, 1)))
    world.come(1)
    world.come(2)
    world.in_flight.take([Arrival(TOPIC, PAYLOAD, len(PAYLOAD), 3, retained=True)])
    world.in_flight.take([Arrival(b"tenant/acme/device/nobody/telemetry", b"", 2_000_000, 4)])
    assert world.connection.acknowledged == [2, 3, 4]
    assert world.refused(Reason.RATE_LIMITED, "refused") == 1
    assert world.refused("retained", "refused") == 1
    assert world.refused(Reason.NOT_FOUND, "refused") == 1
    assert world.count("refused") == 3


async def test_what_waited_for_us_is_not_too_much_at_once() -> None:
    """The broker kept it while no bridge was there: a device that sent in its time loses none of it."""
    world = World(limits=RateLimits(device=Rate(0.001, 1), tenant=Rate(0, 1)))
    world.in_flight.lost()
    world.connect(session_present=True)
    for number in range(1, 6):
        world.come(number, b'{"metrics":{"t":%d}}' % number)
    world.jetstream.answer()
    assert world.count("stored") == 5
    for number in range(6, 9):
        world.come(number, b'{"metrics":{"t":%d}}' % number)
    world.jetstream.answer()
    assert (world.count("stored"), world.refused(Reason.RATE_LIMITED, "refused")) == (6, 2)


async def test_dead_letters_are_bounded_for_each_tenant() -> None:
    world = World(letters=Rate(0.001, 2))
    for number in range(1, 6):
        world.come(number, b"%d" % number)
    world.come(6, PAYLOAD, topic=b"tenant//device/t-1/telemetry")
    assert world.connection.acknowledged == [3, 4, 5]
    world.jetstream.answer()
    assert (world.count("dead_letter"), world.count("refused")) == (3, 3)


async def test_rubbish_does_not_wait_for_room_among_the_dead_letters() -> None:
    world = World()
    world.come(1, b"5")
    world.come(2)
    world.jetstream.answer(StreamFull("nats", "DEAD_LETTERS is full"))
    assert world.connection.acknowledged == [1], "a message does wait"
    assert world.refused(Reason.INVALID_PAYLOAD, "refused") == 1


async def test_a_bug_ends_the_bridge_and_acknowledges_nothing() -> None:
    world = World()
    world.come(1)
    ((*_, waiting),) = world.jetstream.waiting
    world.connection.acknowledge = _bug  # type: ignore[method-assign]
    waiting.set_result(Receipt("TELEMETRY", 1))
    with pytest.raises(KeyError):
        await world.in_flight.failed()
    assert world.connection.acknowledged == []


def _bug(packet_id: int) -> None:
    raise KeyError("a bug")


ANY_TOPIC = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(["tenant", "acme", "device", "t-1", "telemetry", "", "+", "#", "\x00"]), max_size=8).map(
        lambda levels: "/".join(levels).encode()
    ),
    st.just(TOPIC),
    st.just(b"tenant/acme/device/t-1/heartbeat"),
)
ANY_PAYLOAD = st.one_of(
    st.binary(max_size=100),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["metrics", "ts", "seq", "site_id", "x"]), inner, max_size=4)
        ),
    ).map(msgspec.json.encode),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(ANY_TOPIC, ANY_PAYLOAD, st.booleans(), st.booleans()), max_size=6))
@example([(TOPIC, b'{"metrics":' + b"[" * 900, False, False)])
def test_whatever_comes_gets_one_outcome_and_its_puback(messages: list[tuple[bytes, bytes, bool, bool]]) -> None:
    async def run() -> None:
        world = World()
        bugs = asyncio.create_task(world.in_flight.failed())
        for number, (topic, payload, again, retained) in enumerate(messages, 1):
            world.in_flight.take([Arrival(topic, payload, len(payload), number, again, retained)])
        world.jetstream.answer()
        await asyncio.sleep(0)
        assert not bugs.done()
        assert sorted(world.connection.acknowledged) == list(range(1, len(messages) + 1))
        assert sum(map(world.count, ("stored", "duplicate", "dead_letter", "refused", "repeated"))) == len(messages)
        bugs.cancel()

    asyncio.run(run())


async def test_one_log_line_tells_of_many_refusals(caplog: pytest.LogCaptureFixture) -> None:
    from structlog.testing import capture_logs

    world = World()
    with capture_logs() as lines:
        for number in range(1, 51):
            world.in_flight.take([Arrival(TOPIC, PAYLOAD, len(PAYLOAD), number, retained=True)])
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:  # noqa: ASYNC110 - the log has no event
            await asyncio.sleep(0.01)
    assert [line["counts"] for line in lines] == [{"retained": 50}]
    assert lines[0]["first_topic"] == TOPIC.decode()
