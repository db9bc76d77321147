"""The loop of all workers on fakes: what is acked after what, what is halved, what is waited out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.ledger import sequence_of
from pulse.domain.settlement import Message
from pulse.services.batches import BatchLoop, Positioned
from pulse.services.waiting import KEEP_ALIVE_S, Batch, KeptAlive, Waits

AWAY = Outage("postgresql", "away")


def message(sequence: int, *, attempts: int = 1) -> Message:
    return Message("shadow.t1", b"body", b"", f"reply-{sequence}", sequence, 1, attempts)


@dataclass(eq=False)
class Fetched:
    """A batch."""

    messages: Sequence[Message]
    created_ns: int = 1


def batch_of(*sequences: int, attempts: int = 1) -> Batch:
    return Fetched([message(sequence, attempts=attempts) for sequence in sequences])


@dataclass
class World:
    """Source, store, settler and metrics at once; `done` is what was done, in order."""

    batches: list[Batch]
    poison: frozenset[int] = frozenset()
    outages: list[str] = field(default_factory=list)
    """Of the calls that are named here, each meets an outage once."""
    stop_at_outage: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    done: list[str] = field(default_factory=list)

    async def check(self) -> None:
        self._do("check")

    async def epoch(self, created_ns: int) -> int:
        return 1

    async def fetch(self) -> Batch | None:
        if self.batches:
            return self.batches.pop(0)
        await self.stop.wait()
        return None

    async def settle(self, batch: Batch, positioned: Positioned) -> None:
        sequences = [sequence_of(at) for at, _ in positioned]
        if self.poison & set(sequences):
            raise Refusal(Reason.REFUSED_BY_DATABASE, "no")
        self._do(f"settle {sequences}")

    async def condemn(self, batch: Batch, position: int, message: Message, refusal: Refusal) -> None:
        self._do(f"condemn {sequence_of(position)} {refusal.reason}")

    async def ack(self, batch: Batch) -> None:
        self._do(f"ack {[each.sequence for each in batch.messages]}")
        if not self.batches:
            self.stop.set()

    async def give_back(self, batch: Batch) -> None:
        self._do(f"give back {[each.sequence for each in batch.messages]}")

    async def keep_alive(self, messages: Sequence[Message]) -> None:
        self._do("keep alive")

    def waiting(self, system: str, waiting: bool) -> None:
        if waiting and self.stop_at_outage:
            self.stop.set()

    def redelivered(self, count: int) -> None:
        self.done.append(f"redelivered {count}")

    def _do(self, what: str) -> None:
        self.done.append(what)
        if what.partition(" ")[0] in self.outages:
            self.outages.remove(what.partition(" ")[0])
            self.done[-1] += ": away"
            raise AWAY


async def run(world: World, *, spare: frozenset[int] = frozenset()) -> list[str]:
    """What was done behind the first look; messages of `spare` are not acked with their batch."""

    def done_with(batch: Batch, positioned: Positioned) -> Batch:
        return Fetched([each for _, each in positioned if each.sequence not in spare])

    loop = BatchLoop(
        name="test",
        source=world,
        store=world,
        settler=world,
        kept_alive=KeptAlive(world, keep_alive_s=KEEP_ALIVE_S),
        waits=Waits(world, delay_s_min=0.001, delay_s_max=0.001),
        metrics=world,
        writers=1,
        probe=world.done.append,
        done_with=done_with if spare else None,
    )
    async with asyncio.timeout(30):
        await loop.run(world.stop)
    return [each for each in world.done[1:] if each != "test.fetched"]


async def test_the_ack_comes_after_the_commit() -> None:
    assert await run(World([batch_of(1, 2)])) == [
        "settle [1, 2]",
        "test.committed",
        "ack [1, 2]",
        "test.acked",
    ]


async def test_a_worker_may_spare_messages_from_the_ack_of_their_batch() -> None:
    assert "ack [1, 3]" in await run(World([batch_of(1, 2, 3)]), spare=frozenset({2}))


@pytest.mark.parametrize("poison", [{1}, {5}, {8}, {3, 4}, {1, 8}, set(range(1, 9))])
async def test_poison_is_halved_down_to_the_messages_at_fault_and_all_is_settled_once(poison: set[int]) -> None:
    done = await run(World([batch_of(*range(1, 9))], poison=frozenset(poison)))
    condemned = [each for each in done if each.startswith("condemn")]
    assert condemned == [f"condemn {sequence} refused_by_database" for sequence in sorted(poison)]
    settled = [int(number) for each in done if each.startswith("settle") for number in each[8:-1].split(", ")]
    assert sorted(settled) == [sequence for sequence in range(1, 9) if sequence not in poison]
    assert done[-2] == "ack [1, 2, 3, 4, 5, 6, 7, 8]"


@pytest.mark.parametrize("call", ["settle", "ack"])
async def test_an_outage_is_waited_out_and_the_batch_is_settled_again(call: str) -> None:
    done = await run(World([batch_of(1)], outages=[call, call]))
    assert done.count(f"{call} [1]: away") == 2
    assert done[-3:] == ["test.committed", "ack [1]", "test.acked"]
    assert not any(each.startswith("give back") for each in done)


async def test_an_outage_in_the_midst_of_halving_settles_nothing_half() -> None:
    done = await run(World([batch_of(1, 2)], poison=frozenset({2}), outages=["condemn"]))
    assert done[:2] == ["settle [1]", "condemn 2 refused_by_database: away"]
    assert done[2:] == ["settle [1]", "condemn 2 refused_by_database", "test.committed", "ack [1, 2]", "test.acked"]


async def test_a_stop_during_an_outage_gives_the_batch_back_unacked() -> None:
    done = await run(World([batch_of(1, 2)], outages=["settle"] * 5, stop_at_outage=True))
    assert done[-1] == "give back [1, 2]"
    assert not any(each.startswith("ack") for each in done)


async def test_nothing_is_fetched_before_the_database_was_seen() -> None:
    world = World([batch_of(1)], outages=["check", "check"])
    await run(world)
    assert world.done[:4] == ["check: away", "check: away", "check", "test.fetched"]


async def test_a_redelivery_beside_its_original_is_one_message() -> None:
    assert "settle [1, 2]" in await run(World([Fetched([message(1), message(2), message(1, attempts=2)])]))


async def test_redeliveries_are_counted() -> None:
    assert (await run(World([batch_of(1, 2, attempts=2)])))[0] == "redelivered 2"
