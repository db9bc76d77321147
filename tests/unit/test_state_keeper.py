"""What is held back, what is freed, and that nothing is acked before its word is written."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest

from pulse.domain.device_state import Device, DeviceState, Value, Words, state_of
from pulse.domain.errors import Outage
from pulse.domain.ledger import position
from pulse.domain.settlement import Message, Row
from pulse.services import device_state as module
from pulse.services.device_state import StateKeeper
from pulse.services.waiting import Batch, KeptAlive, Waits

MADE_NS = 1


@dataclass
class World:
    """Source, store and metrics at once; `done` is what was done, in order, each with positions or devices."""

    done: list[tuple[str, Sequence[object]]] = field(default_factory=list)
    outages: list[str] = field(default_factory=list)
    written: dict[Device, DeviceState] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def fetch(self) -> Batch | None:
        raise AssertionError

    async def ack(self, batch: Batch) -> None:
        self._maybe_away("nats")
        self._note("ack", [message.sequence for message in batch.messages])

    async def keep_alive(self, messages: Sequence[Message]) -> None:
        self._note("keep alive", [message.sequence for message in messages])

    async def give_back(self, batch: Batch) -> None:
        self._note("give back", [message.sequence for message in batch.messages])

    async def write_states(self, states: Mapping[Device, DeviceState]) -> None:
        self._maybe_away("postgresql")
        for device, state in states.items():
            self.written[device] = joined([state, self.written.get(device, state)])
        self._note("write", sorted(device_id for _, device_id in states))

    def waiting(self, system: str, waiting: bool) -> None:
        self._note("wait" if waiting else "back", [system])

    def _note(self, what: str, of: Sequence[object]) -> None:
        self.done.append((what, of))
        self.changed.set()

    def _maybe_away(self, system: str) -> None:
        if system in self.outages:
            self.outages.remove(system)
            raise Outage(system, "away")

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                self.changed.clear()
                await self.changed.wait()


def joined(states: Sequence[DeviceState]) -> DeviceState:
    """What several states say together."""
    latest: dict[str, Value] = {}
    for state in states:
        for name, value in state.latest.items():
            if name not in latest or (value.ts_us, value.position) > (latest[name].ts_us, latest[name].position):
                latest[name] = value
    return DeviceState(max(state.seen_us for state in states), latest)


@dataclass
class Bench:
    """A keeper that runs."""

    world: World
    keeper: StateKeeper
    stop: asyncio.Event
    task: asyncio.Task[None]

    def hear(self, *rows: Row, made_ns: int = MADE_NS) -> None:
        words = Words({}, [])
        for row in rows:
            if words.last.setdefault(device := (row.tenant_id, row.device_id), row) is not row:
                words.others.append((device, row))
        self.keeper.hear(made_ns, words, {row.position: message(row.position) for row in rows})

    def freed(self, made_ns: int = MADE_NS) -> list[int]:
        return [message.sequence for message in self.keeper.take_freed(made_ns)]


def message(at: int) -> Message:
    return Message("telemetry.t", b"body", b"", "reply", at, 0, 1)


def row(position: int, device_id: str = "d", *, ts_us: int | None = None, **metrics: int) -> Row:
    said = metrics or {"n": position}
    at = position if ts_us is None else ts_us
    return Row(position, at, "t", device_id, None, None, msgspec.json.encode(said), position, tuple(said))


@asynccontextmanager
async def running(*, stop_set: bool = False) -> AsyncIterator[Bench]:
    world, stop = World(), asyncio.Event()
    kept_alive = KeptAlive(world, keep_alive_s=0.01)
    waits = Waits(world, delay_s_min=0.001, delay_s_max=0.01)
    keeper = StateKeeper(source=world, store=world, kept_alive=kept_alive, waits=waits, probe=lambda _: None)
    async with asyncio.TaskGroup() as group:
        alive = group.create_task(kept_alive.keep_alive())
        bench = Bench(world, keeper, stop, group.create_task(keeper.run(stop)))
        yield bench
        keeper.finish()
        async with asyncio.timeout(30):
            await bench.task
        alive.cancel()
    assert not list(keeper), "something is held for ever"


async def test_the_first_word_of_a_device_is_written_at_once_and_acked_after_that() -> None:
    async with running() as bench:
        bench.hear(row(1))
        assert 1 in bench.keeper.held
        await bench.world.until(lambda: len(bench.world.done) == 2)
        assert bench.world.done == [("write", ["d"]), ("ack", [1])]
        assert 1 not in bench.keeper.held


async def test_what_comes_within_the_second_waits_and_is_written_when_the_worker_finishes() -> None:
    async with running() as bench:
        bench.hear(row(1))
        await bench.world.until(lambda: len(bench.world.done) == 2)
        bench.hear(row(2), row(3, "e"))
        await asyncio.sleep(0)
        assert len([what for what, _ in bench.world.done if what == "write"]) == 1
    assert [each for each in bench.world.done if each[0] != "keep alive"][2:] == [
        ("write", ["d", "e"]),
        ("ack", [2, 3]),
    ]
    assert bench.world.written["t", "d"] == state_of([row(2)])


async def test_a_word_that_is_outdated_frees_its_message() -> None:
    async with running() as bench:
        bench.hear(row(1))
        bench.hear(row(2))
        assert (1 in bench.keeper.held, 2 in bench.keeper.held) == (True, True), "until it is asked for"
        assert bench.freed() == [1]
        bench.hear(row(3, other=1))
        assert bench.freed() == [], "n was said by the second alone"
        bench.hear(row(2), row(3, other=1))
        assert bench.freed() == [], "delivered again is no later word"
        bench.hear(row(4, n=1, other=2))
        assert sorted(bench.freed()) == [2, 3]
    assert bench.world.written["t", "d"] == state_of([row(4, n=1, other=2)])


async def test_a_freed_message_of_a_former_making_is_not_acked_in_the_new_one() -> None:
    async with running() as bench:
        bench.hear(row(1))
        bench.hear(row(position(1, 1)), made_ns=MADE_NS + 1)
        assert bench.freed(MADE_NS + 1) == []


@pytest.mark.parametrize("outages", [["postgresql"], ["nats"], ["postgresql", "nats", "postgresql"]])
async def test_an_outage_is_waited_out_and_what_is_held_kept_alive(outages: list[str]) -> None:
    async with running() as bench:
        bench.world.outages += outages
        bench.hear(row(1))
        await bench.world.until(lambda: ("ack", [1]) in bench.world.done)
        done = [what for what, _ in bench.world.done]
        assert done.index("write") < done.index("ack")
        assert "wait" in done
    assert bench.world.written["t", "d"] == state_of([row(1)])


async def test_a_stop_during_an_outage_gives_back_what_is_held() -> None:
    async with running() as bench:
        bench.world.outages += ["postgresql"] * 1000
        bench.hear(row(1))
        await bench.world.until(lambda: ("keep alive", [1]) in bench.world.done)
        bench.stop.set()
        await bench.world.until(lambda: ("give back", [1]) in bench.world.done)
    assert ("ack", [1]) not in bench.world.done
    assert bench.world.written == {}


async def test_more_than_may_be_held_is_written_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_MAX", 3)
    monkeypatch.setattr(module, "INTERVAL_S", 3600.0)
    async with running() as bench:
        bench.hear(*(row(at, f"d{at}") for at in range(1, 4)))
        async with asyncio.timeout(30):
            await bench.keeper.room()
        bench.hear(*(row(at, f"d{at}") for at in range(4, 7)))
        async with asyncio.timeout(30):
            await bench.keeper.room()
        assert len(bench.world.written) >= 3


async def test_what_is_being_written_or_about_to_be_acked_makes_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each write would make the next one follow at once, as long as batches come: a write a batch."""
    monkeypatch.setattr(module, "HELD_MAX", 3)
    monkeypatch.setattr(module, "INTERVAL_S", 3600.0)
    began, gate = asyncio.Event(), asyncio.Event()
    async with running() as bench:
        write = bench.world.write_states

        async def slow(states: Mapping[Device, DeviceState]) -> None:
            began.set()
            await gate.wait()
            await write(states)

        def writes() -> list[Sequence[object]]:
            return [of for what, of in bench.world.done if what == "write"]

        monkeypatch.setattr(bench.world, "write_states", slow)
        bench.hear(row(1, "a"), row(2, "b"))
        async with asyncio.timeout(30):
            await began.wait()
        bench.hear(row(3, "c"))
        gate.set()
        await bench.world.until(lambda: ("ack", [1, 2]) in bench.world.done)
        bench.hear(row(4, "c"), row(5, "d"))
        for _ in range(50):
            await asyncio.sleep(0)
        assert writes() == [["a", "b"]], "two messages are held, and one is about to be acked"
        assert bench.freed() == [3]
        bench.hear(row(6, "e"))
        await bench.world.until(lambda: len(writes()) == 2)
        assert writes()[1] == ["c", "d", "e"]


@pytest.mark.parametrize("seed", range(5))
async def test_at_no_moment_is_a_word_neither_written_nor_held(seed: int) -> None:
    """The promise, on random histories: whoever dies now, what is written and what comes again say all."""
    chance = random.Random(seed)
    heard: dict[int, Row] = {}
    acked: set[int] = set()
    async with running() as bench:

        def check() -> None:
            acked.update(sequence for what, of in bench.world.done if what == "ack" for sequence in of)  # type: ignore[misc]
            acked.update(bench.freed())
            for device_id in {word.device_id for word in heard.values()}:
                said = [word for word in heard.values() if word.device_id == device_id]
                again = [state_of([word]) for word in said if word.position not in acked]
                written = bench.world.written.get(("t", device_id))
                assert joined([*again, *([written] if written else [])]) == state_of(said)

        for position in range(1, 200):
            names = chance.sample("abc", k=chance.randint(1, 3))
            metrics = dict.fromkeys(names, position)
            heard[position] = row(position, f"d{chance.randrange(4)}", ts_us=chance.randrange(100), **metrics)
            bench.world.outages += chance.choices(["postgresql", "nats"], k=chance.choice([0, 0, 0, 1]))
            bench.hear(heard[position])
            check()
            if chance.random() < 0.2:
                await asyncio.sleep(0)
                check()
    check()
    assert acked == set(heard), "something is never acked"
