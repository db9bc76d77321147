"""The rescue's decisions on fakes: what is tried, what is buried, and what is acked only after what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from pulse.domain.dead_letter import ADVISORY_PREFIX
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.ledger import PositionSet, position
from pulse.domain.settlement import DeadLetter, Message
from pulse.services.batches import Positioned
from pulse.services.rescue import DEAD_LETTERS, TRIES_MAX, Rescue, Stream
from pulse.services.waiting import KEEP_ALIVE_S, Batch
from pulse.topology.declared import load

CREATED_NS = 1_790_000_000_000_000_000
AFTER = "2026-11-23T10:00:00.123456789Z"
BEFORE = "2000-01-01T00:00:00Z"
HELD = Message("telemetry.t1", b"body", b"", "", 5, CREATED_NS, 0)


def advisory(*, attempts: int = 1, stream: str = "TELEMETRY", consumer: str = "workers", at: str = AFTER) -> Message:
    body = {"stream": stream, "consumer": consumer, "stream_seq": 5, "deliveries": 3, "timestamp": at, "id": "x"}
    return Message(
        f"{ADVISORY_PREFIX}{stream}.{consumer}", msgspec.json.encode(body), b"", "r", 9, CREATED_NS, attempts
    )


@dataclass(eq=False)
class One:
    """A batch of one."""

    messages: Sequence[Message]
    created_ns: int = CREATED_NS


@dataclass
class World:
    """Source, origin, store, worker and metrics at once; `done` is what was done, in order."""

    items: list[Message]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    held: tuple[int, Message | None] | None = (CREATED_NS, HELD)
    settled: PositionSet = field(default_factory=PositionSet)
    outages: list[Exception] = field(default_factory=list)
    refuse: bool = False
    done: list[str] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    buried: list[DeadLetter] = field(default_factory=list)

    async def check(self) -> None:
        self.done.append("check")
        self._maybe_away()

    async def fetch(self) -> Batch | None:
        if not self.items:
            self.stop.set()
            return None
        return One([self.items.pop(0)])

    async def ack(self, batch: Batch) -> None:
        self.done.append("ack")

    async def keep_alive(self, messages: Sequence[Message]) -> None:
        self.done.append("keep alive")

    async def give_back(self, batch: Batch) -> None:
        self.done.append("give back")

    async def read(self, stream: str, sequence: int) -> tuple[int, Message | None] | None:
        self.done.append("read")
        return self.held

    async def delete(self, stream: str, sequence: int) -> None:
        self.done.append("delete")

    async def epoch(self, stream: str, created_ns: int) -> int:
        return 1

    async def is_settled(self, at: int) -> bool:
        return at in self.settled

    async def is_dead(self, at: int) -> bool:
        return at in {letter.position for letter in self.buried}

    async def settle(self, batch: Batch, positioned: Positioned) -> None:
        self._maybe_away()
        if self.refuse:
            raise Refusal(Reason.REFUSED_BY_DATABASE, "no")
        self.done.append("settle")
        self.stored += [position for position, _ in positioned if position not in self.settled]

    async def condemn(self, batch: Batch, position: int, message: Message, refusal: Refusal) -> None:
        await self.bury("", DeadLetter(position, message, refusal.reason, refusal.message))

    async def bury(self, stream: str, letter: DeadLetter) -> bool:
        self._maybe_away()
        self.done.append("bury")
        if letter.position in self.settled:
            return False
        self.buried.append(letter)
        return True

    def rescued(self, outcome: str) -> None:
        self.done.append(f"count {outcome}")

    def waiting(self, system: str, waiting: bool) -> None:
        self.done.append(f"wait {system}" if waiting else f"back {system}")

    def _maybe_away(self) -> None:
        if self.outages:
            raise self.outages.pop(0)


async def rescue(world: World, *, work_queue: bool = False, chance: bool = True) -> list[str]:
    """Run it over all items; returns what was done but for the first look at the database."""
    stream = Stream("workers", work_queue, world if chance else None)
    service = Rescue(
        source=world,
        origin=world,
        store=world,
        streams={"TELEMETRY": stream},
        metrics=world,
        retry_delay_s_min=0.001,
        retry_delay_s_max=0.001,
        probe=lambda _: None,
    )
    async with asyncio.timeout(30):
        await service.run(world.stop)
    return world.done[1:]


async def test_the_ack_comes_after_the_commit() -> None:
    world = World([advisory()])
    assert await rescue(world) == ["read", "settle", "ack", "count stored"]
    assert world.stored == [position(1, 5)]


async def test_a_work_queue_forgets_its_message_after_the_commit_and_before_the_ack() -> None:
    world = World([advisory()])
    assert await rescue(world, work_queue=True, chance=False) == ["read", "bury", "delete", "ack", "count dead"]


@pytest.mark.parametrize("attempts", range(1, TRIES_MAX + 3))
async def test_a_message_is_tried_as_often_as_allowed_and_then_buried_unread(attempts: int) -> None:
    world = World([advisory(attempts=attempts)])
    await rescue(world)
    if attempts <= TRIES_MAX:
        assert (world.stored, world.buried) == ([position(1, 5)], [])
    else:
        assert world.stored == []
        (letter,) = world.buried
        assert (letter.reason, letter.message.body, letter.message.attempts) == (Reason.MAX_DELIVERIES, b"body", 3)
        assert (letter.tenant_id, letter.device_id) == ("t1", None)


async def test_what_the_database_refuses_is_condemned_for_that() -> None:
    world = World([advisory()], refuse=True)
    assert (await rescue(world))[-1] == "count dead"
    (letter,) = world.buried
    assert letter.reason is Reason.REFUSED_BY_DATABASE


@pytest.mark.parametrize(
    ("item", "held", "settled", "outcome"),
    [
        (advisory(), (CREATED_NS, HELD), True, "already_settled"),
        (advisory(), (CREATED_NS, None), True, "already_settled"),
        (advisory(), (CREATED_NS, None), False, "gone"),
        (advisory(), None, False, "gone"),
        (advisory(at=BEFORE), (CREATED_NS, HELD), False, "gone"),
        (advisory(consumer="stranger"), (CREATED_NS, HELD), False, "foreign"),
        (advisory(stream="OTHER"), (CREATED_NS, HELD), False, "foreign"),
    ],
)
async def test_what_needs_no_rescue_is_acked_and_counted(
    item: Message, held: tuple[int, Message | None] | None, settled: bool, outcome: str
) -> None:
    world = World([item], held=held, settled=PositionSet.of([position(1, 5)] if settled else []))
    assert (await rescue(world))[-2:] == ["ack", f"count {outcome}"]
    assert (world.stored, world.buried) == ([], [])


async def test_an_outage_is_waited_out_with_the_item_in_hand() -> None:
    world = World([advisory()], outages=[])
    world.outages = []
    original = world.read

    async def read(stream: str, sequence: int) -> tuple[int, Message | None] | None:
        if "wait postgresql" not in world.done:
            world.outages = [Outage("postgresql", "away")] * 3
        return await original(stream, sequence)

    world.read = read  # type: ignore[method-assign]
    done = await rescue(world)
    assert done.count("ack") == done.count("settle") == 1
    assert done[-3:] == ["ack", "back postgresql", "count stored"]


async def test_nothing_is_fetched_before_the_database_was_seen() -> None:
    world = World([advisory()], outages=[Outage("postgresql", "away")])
    done = await rescue(world)
    assert done[:4] == ["wait postgresql", "check", "back postgresql", "read"]


async def test_a_stop_during_an_outage_gives_the_item_back() -> None:
    world = World([advisory()])

    async def settle(batch: Batch, positioned: Positioned) -> None:
        world.stop.set()
        raise Outage("postgresql", "away")

    world.settle = settle  # type: ignore[method-assign]
    assert (await rescue(world))[-1] == "give back"
    assert "ack" not in world.done


def test_nobody_rescues_the_rescue_so_its_consumer_never_gives_up() -> None:
    (consumer,) = (each for each in load().consumers if each.stream == DEAD_LETTERS)
    assert consumer.config.max_deliver == -1
    assert consumer.config.filter_subject == ""
    assert consumer.config.ack_wait >= 3 * KEEP_ALIVE_S * 1e9
