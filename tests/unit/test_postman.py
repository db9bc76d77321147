"""The postman: publish first, delete then; in order, a page at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from prometheus_client import CollectorRegistry

from edge import Publisher
from pulse.domain.downward import Downward
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.receipt import Receipt
from pulse.runtime.metrics import PostmanMetrics
from pulse.services.postman import AT_ONCE, Postman

NATS_AWAY = Outage("nats", "away")


class Outbox:
    def __init__(self) -> None:
        self.letters: dict[int, Downward] = {}
        self.raises: Outage | None = None
        self.delete_raises: Outage | None = None
        self.looks = 0

    def put(self, count: int, *, device_id: str = "t-1") -> None:
        for number in range(len(self.letters) + 1, len(self.letters) + count + 1):
            self.letters[number] = Downward("acme", device_id, "shadow/update/delta", b"%d" % number)

    async def oldest(self, limit: int) -> Sequence[tuple[int, float, Downward]]:
        self.looks += 1
        if self.raises is not None:
            raise self.raises
        return [(number, 1.5, self.letters[number]) for number in sorted(self.letters)[:limit]]

    async def delete(self, ids: Sequence[int]) -> None:
        if self.delete_raises is not None:
            raise self.delete_raises
        for number in ids:
            self.letters.pop(number, None)


class World:
    def __init__(self) -> None:
        self.outbox = Outbox()
        self.publisher = Publisher()
        self.registry = CollectorRegistry()
        self.stop = asyncio.Event()
        self.steps: list[tuple[str, int]] = []
        self.postman = Postman(
            kind="shadow",
            outbox=self.outbox,
            publisher=self.publisher,
            metrics=PostmanMetrics(self.registry, kind="shadow"),
            retry_delay_s_min=0.0001,
            retry_delay_s_max=0.0002,
            probe=lambda step: self.steps.append((step, len(self.outbox.letters))),
        )

    def posted(self) -> list[bytes]:
        return [each.body for each in self.publisher.published]

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"pulse_outbox_{name}", {"kind": "shadow", **labels})

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():  # noqa: ASYNC110 - a turn of the loop, not a wait
                await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    running = asyncio.create_task(made.postman.run(made.stop))
    yield made
    made.stop.set()
    await asyncio.wait_for(running, 10)


async def test_it_is_published_in_order_and_deleted_then(world: World) -> None:
    world.outbox.put(3)
    world.postman.tell()
    await world.until(lambda: not world.outbox.letters)
    assert world.posted() == [b"1", b"2", b"3"]
    assert {each.message_id for each in world.publisher.published} == {"o/1", "o/2", "o/3"}
    assert world.steps == [("postman.published", 3)]
    assert world.value("messages_total", outcome="posted") == 3


async def test_a_long_outbox_is_emptied_page_by_page_without_a_pause(world: World) -> None:
    world.outbox.put(3 * AT_ONCE + 1)
    world.postman.tell()
    await world.until(lambda: not world.outbox.letters)
    assert [int(body) for body in world.posted()] == list(range(1, 3 * AT_ONCE + 2))
    assert [left for _, left in world.steps] == [3 * AT_ONCE + 1, 2 * AT_ONCE + 1, AT_ONCE + 1, 1]


async def test_while_jetstream_is_away_nothing_is_deleted(world: World) -> None:
    world.publisher.raises = lambda: NATS_AWAY
    world.outbox.put(2)
    world.postman.tell()
    await world.until(lambda: world.value("waiting", system="nats") == 1)
    looks = world.outbox.looks
    await world.until(lambda: world.outbox.looks > looks + 2)
    assert len(world.outbox.letters) == 2
    oldest_s = world.value("oldest_seconds")
    assert oldest_s is not None
    assert oldest_s >= 1.5
    world.publisher.raises = None
    await world.until(lambda: not world.outbox.letters)
    assert world.posted() == [b"1", b"2"]
    assert world.value("waiting", system="nats") == 0


async def test_one_receipt_that_fails_keeps_the_whole_page(world: World) -> None:
    submit = world.publisher.submit

    def failing(subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        future = submit(subject, body, message_id=message_id)
        if body == b"2" and len(world.publisher.published) < 3:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(NATS_AWAY)
        return future

    world.publisher.submit = failing  # type: ignore[method-assign]
    world.outbox.put(3)
    world.postman.tell()
    await world.until(lambda: not world.outbox.letters)
    assert world.posted() == [b"1", b"2", b"1", b"2", b"3"]
    assert len(world.steps) == 1


async def test_a_message_of_a_device_waits_for_the_one_in_front_of_it_and_for_no_other_devices(world: World) -> None:
    world.outbox.put(2, device_id="t-1")
    world.outbox.put(1, device_id="t-2")
    world.outbox.put(1, device_id="t-1")
    submit, waiting = world.publisher.submit, []

    def slow(subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        receipt = submit(subject, body, message_id=message_id).result()
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        waiting.append((future, receipt))
        return future

    world.publisher.submit = slow  # type: ignore[method-assign]
    world.postman.tell()
    for expected in ([b"1", b"3"], [b"1", b"3", b"2"], [b"1", b"3", b"2", b"4"]):
        await world.until(lambda expected=expected: world.posted() == expected)  # type: ignore[misc]
        for future, receipt in waiting:
            future.set_result(receipt)
        waiting.clear()
    await world.until(lambda: not world.outbox.letters)


async def test_what_could_not_be_deleted_is_published_under_the_same_id(world: World) -> None:
    world.outbox.delete_raises = Outage("postgresql", "away")
    world.outbox.put(1)
    world.postman.tell()
    await world.until(lambda: world.value("waiting", system="postgresql") == 1)
    world.outbox.delete_raises = None
    await world.until(lambda: not world.outbox.letters)
    assert {each.message_id for each in world.publisher.published} == {"o/1"}


async def test_what_jetstream_never_takes_leaves_too_and_is_counted(world: World) -> None:
    submit = world.publisher.submit

    def refusing(subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        if body == b"2":
            raise Refusal(Reason.TOO_LARGE, "too large")
        return submit(subject, body, message_id=message_id)

    world.publisher.submit = refusing  # type: ignore[method-assign]
    world.outbox.put(3)
    world.postman.tell()
    await world.until(lambda: not world.outbox.letters)
    assert world.posted() == [b"1", b"3"]
    assert world.value("messages_total", outcome="refused") == 1
    assert world.value("messages_total", outcome="posted") == 2


async def test_who_finds_that_somebody_else_posts_looks_away() -> None:
    world = World()
    world.outbox.put(2 * AT_ONCE)
    for number, letter in world.outbox.letters.items():
        world.publisher.submit("down.acme.t-1.x", letter.body, message_id=f"o/{number}")
    running = asyncio.create_task(world.postman.run(world.stop))
    await world.until(lambda: bool(world.steps))
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(world.steps) == 1
    world.stop.set()
    await running


async def test_an_empty_outbox_has_nothing_that_waits(world: World) -> None:
    await world.until(lambda: world.outbox.looks > 0)
    assert world.value("oldest_seconds") == 0
