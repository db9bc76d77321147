"""What becomes of a message to a device: when it is acked, when it comes again, and what is said of a command."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from edge import Published, Publisher
from pulse.domain.downward import Downward, downward_subject
from pulse.domain.envelope import unwrap
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.settlement import Message
from pulse.runtime.metrics import DownlinkMetrics
from pulse.services.downlink import BATCHES_MAX, Downlink
from pulse.services.waiting import Batch

LOST = Outage("mqtt", "the connection broke")
AWAY = Outage("nats", "away")


@dataclass(eq=False)
class Pulled:
    created_ns: int
    messages: Sequence[Message]


class Source:
    """A consumer whose batches the test makes; a new one for each connection."""

    def __init__(self, batches: deque[Pulled]) -> None:
        self._batches = batches
        self.fetched = 0
        self.acked: list[int] = []
        self.given_back: list[int] = []
        self.ack_fails = 0

    async def fetch(self) -> Pulled | None:
        await asyncio.sleep(0)
        if not self._batches:
            return None
        self.fetched += 1
        return self._batches.popleft()

    async def ack(self, batch: Batch) -> None:
        if self.ack_fails:
            self.ack_fails -= 1
            raise AWAY
        self.acked += [message.sequence for message in batch.messages]

    async def keep_alive(self, messages: Sequence[Message]) -> None:
        pass

    async def give_back(self, batch: Batch) -> None:
        self.given_back += [message.sequence for message in batch.messages]


@dataclass
class Line:
    """Confirms with `code`, or keeps what it is told until the test confirms."""

    code: int | None = None
    said: list[tuple[str, bytes]] = field(default_factory=list)
    futures: list[asyncio.Future[int]] = field(default_factory=list)
    raises: Refusal | Outage | None = None

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[int]:
        if self.raises is not None:
            raise self.raises
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.said.append((topic, payload))
        self.futures.append(future)
        if self.code is not None:
            future.set_result(self.code)
        return future

    def lose(self) -> None:
        self.raises = LOST
        for future in self.futures:
            if not future.done():
                future.set_exception(LOST)


class World:
    """A downlink that runs."""

    def __init__(self) -> None:
        self.batches: deque[Pulled] = deque()
        self.sources: list[Source] = []
        self.publisher = Publisher()
        self.registry = CollectorRegistry()
        self.ack_fails = 0
        self.stop = asyncio.Event()
        self._sequence = 0
        self.downlink = Downlink(
            open_source=self._open,
            publisher=self.publisher,
            metrics=DownlinkMetrics(self.registry),
            retry_delay_s_min=0.0001,
            retry_delay_s_max=0.0002,
            probe=lambda _: None,
        )

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Source]:
        source = Source(self.batches)
        source.ack_fails = self.ack_fails
        self.sources.append(source)
        yield source

    def come(self, *said: Downward | tuple[str, bytes]) -> list[int]:
        """One batch; the sequences of its messages."""
        messages = []
        for each in said:
            subject, body = (downward_subject(each), each.body) if isinstance(each, Downward) else each
            self._sequence += 1
            messages.append(Message(subject, body, b"", f"reply.{self._sequence}", self._sequence, 0, 1))
        self.batches.append(Pulled(7, messages))
        return [message.sequence for message in messages]

    @property
    def acked(self) -> list[int]:
        return [sequence for source in self.sources for sequence in source.acked]

    @property
    def given_back(self) -> list[int]:
        return [sequence for source in self.sources for sequence in source.given_back]

    def outcomes(self) -> dict[str, int]:
        names = ("delivered", "no_subscriber", "refused", "too_large", "foreign")
        found = {
            name: self.registry.get_sample_value("pulse_downlink_messages_total", {"outcome": name}) for name in names
        }
        return {name: int(value) for name, value in found.items() if value}

    def reported(self) -> list[Published]:
        return [each for each in self.publisher.published if each.subject == "commands.acme"]

    async def until(self, *, acked: Sequence[int] = (), given_back: Sequence[int] = ()) -> None:
        async with asyncio.timeout(30):
            while (sorted(self.acked), sorted(self.given_back)) != (sorted(acked), sorted(given_back)):  # noqa: ASYNC110
                await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    running = asyncio.create_task(made.downlink.run(made.stop))
    yield made
    made.stop.set()
    await asyncio.wait_for(running, 10)


def delta(number: int = 0) -> Downward:
    return Downward("acme", "t-1", "shadow/update/delta", b'{"n":%d}' % number)


def command(command_id: str) -> Downward:
    return Downward("acme", "t-1", "commands", msgspec.json.encode({"commandId": command_id, "payload": {}}))


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_nothing_is_pulled_before_there_is_a_connection(world: World) -> None:
    world.come(delta())
    await turns()
    assert world.sources == []
    world.downlink.opened(Line(code=0))
    await world.until(acked=[1])


async def test_a_message_is_acked_after_its_puback(world: World) -> None:
    line = Line()
    world.downlink.opened(line)
    world.come(delta(1), delta(2))
    await turns()
    assert line.said == [(delta().full_topic, b'{"n":1}'), (delta().full_topic, b'{"n":2}')]
    assert (world.acked, world.downlink.in_flight) == ([], 2)
    for future in line.futures:
        future.set_result(0)
    await world.until(acked=[1, 2])
    assert (world.outcomes(), world.downlink.in_flight, world.reported()) == ({"delivered": 2}, 0, [])


async def test_a_command_is_reported_as_sent_before_its_ack_and_after_its_puback(world: World) -> None:
    line = Line()
    world.downlink.opened(line)
    world.come(command("c1"))
    await turns()
    assert world.reported() == []
    world.publisher.raises = lambda: AWAY
    line.futures[0].set_result(0)
    await turns()
    assert world.acked == []
    world.publisher.raises = None
    await world.until(acked=[1])
    [report] = world.reported()
    envelope = unwrap(report.subject, report.body)
    assert (envelope.msg_type, envelope.device_id, envelope.source) == ("commands-sent", "t-1", "mqtt")
    assert (bytes(envelope.payload), report.message_id) == (b'{"commandId":"c1"}', "sent/7/1")


async def test_a_report_that_is_made_again_has_the_same_id(world: World) -> None:
    world.ack_fails = 2
    world.downlink.opened(Line(code=0))
    world.come(command("c1"))
    await world.until(acked=[1])
    assert {each.message_id for each in world.reported()} == {"sent/7/1"}


@pytest.mark.parametrize(
    ("code", "outcome"), [(0x10, "no_subscriber"), (0x80, "refused"), (0x87, "refused"), (0x97, "refused")]
)
async def test_what_nobody_hears_is_acked_and_not_reported(world: World, code: int, outcome: str) -> None:
    world.downlink.opened(Line(code=code))
    world.come(command("c1"), delta())
    await world.until(acked=[1, 2])
    assert (world.outcomes(), world.reported()) == ({outcome: 2}, [])


async def test_what_is_too_large_for_the_broker_is_counted_and_the_rest_goes_on(world: World) -> None:
    line = Line(code=0, raises=Refusal(Reason.TOO_LARGE, "too large"))
    world.downlink.opened(line)
    world.come(delta())
    await world.until(acked=[1])
    line.raises = None
    world.come(delta())
    await world.until(acked=[1, 2])
    assert world.outcomes() == {"too_large": 1, "delivered": 1}


@pytest.mark.parametrize(
    ("subject", "body"),
    [
        ("down.acme", b"{}"),
        ("down.acme.t-1.telemetry", b"{}"),
        ("down.acme.t-1.shadow.update", b"{}"),
        ("down.acme.t-1.commands", b"{}"),
        ("down.acme.t-1.commands", b"\xff"),
        ("down.a\udcffb.t-1.commands", b"{}"),
        ("other.acme.t-1.commands", b'{"commandId":"c"}'),
    ],
)
async def test_what_no_device_listens_to_is_not_said(world: World, subject: str, body: bytes) -> None:
    line = Line(code=0)
    world.downlink.opened(line)
    world.come((subject, body), delta())
    await world.until(acked=[1, 2])
    assert world.outcomes() == {"foreign": 1, "delivered": 1}
    assert [topic for topic, _ in line.said] == [delta().full_topic]


async def test_what_was_not_confirmed_on_a_lost_connection_is_given_back_and_the_rest_acked(world: World) -> None:
    line = Line()
    world.downlink.opened(line)
    world.come(command("c1"), command("c2"), delta())
    await turns()
    line.futures[1].set_result(0)
    line.lose()
    world.downlink.lost()
    await world.until(acked=[2], given_back=[1, 3])
    assert [msgspec.json.decode(each.body)["payload"] for each in world.reported()] == [{"commandId": "c2"}]
    assert world.outcomes() == {"delivered": 1}
    await turns(50)
    world.downlink.opened(Line(code=0))
    world.come(command("c1"), delta())
    await world.until(acked=[2, 4, 5], given_back=[1, 3])
    assert len(world.sources) == 2


async def test_a_broker_that_confirms_nothing_is_told_so_much_and_no_more(world: World) -> None:
    line = Line()
    world.downlink.opened(line)
    for _ in range(10):
        world.come(delta())
    await turns(200)
    in_hand = BATCHES_MAX + 2  # waited for, behind it, and published but not handed on
    assert (len(line.said), world.downlink.in_flight) == (in_hand, in_hand)
    line.lose()
    world.downlink.lost()
    await world.until(given_back=list(range(1, in_hand + 1)))
    assert world.downlink.in_flight == 0


async def test_a_stop_waits_for_what_is_in_flight(world: World) -> None:
    line = Line()
    world.downlink.opened(line)
    world.come(delta())
    await turns()
    world.stop.set()
    await turns()
    world.come(delta())
    await turns(50)
    assert world.acked == []
    line.futures[0].set_result(0)
    await world.until(acked=[1])
    assert len(line.said) == 1


async def test_a_stop_during_an_outage_gives_back_what_is_confirmed_and_cannot_be_acked() -> None:
    world = World()
    world.ack_fails = 10**9
    world.downlink.opened(Line(code=0))
    running = asyncio.create_task(world.downlink.run(world.stop))
    world.come(command("c1"))
    await turns(50)
    world.stop.set()
    async with asyncio.timeout(30):
        await running
    assert (world.acked, world.given_back) == ([], [1])
