"""Whose turn it is."""

from __future__ import annotations

import asyncio

from pulse.domain.delivery import Attempted, Failure
from pulse.domain.gate import GatePolicy, Standing
from pulse.domain.limits import Rate
from pulse.domain.webhook_url import Destination
from pulse.services.turns import RouteRates, Turn, Turns, Where

WELL = Attempted(status=200, elapsed_s=0.01)
UNWELL = Attempted(failure=Failure.TIMEOUT, elapsed_s=10.0)


def at(number: int, *, tenant_id: str = "acme") -> Where:
    return tenant_id, Destination("https", f"h{number}.example.com", 443)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def turns(clock: Clock, *, new_max: int = 3, poor_max: int = 2, wait_s_max: float = 0.25) -> Turns:
    return Turns(GatePolicy(wait_s_max=wait_s_max), new_max=new_max, poor_max=poor_max, clock=clock)


async def taken(made: Turns, where: Where) -> Turn:
    turn = await made.take(where)
    assert isinstance(turn, Turn)
    return turn


async def test_new_destinations_share_so_many_places_and_the_next_is_told_when_to_come_again() -> None:
    clock = Clock()
    made = turns(clock)
    for number in range(3):
        await taken(made, at(number))
    again = await made.take(at(3))
    assert isinstance(again, float)
    assert again > clock.now_s


async def test_a_new_destination_that_does_not_answer_counts_with_the_poor_ones() -> None:
    clock = Clock()
    made = turns(clock)
    held = [await taken(made, at(number)) for number in range(3)]
    clock.now_s += 1.5
    await taken(made, at(3))
    assert [turn.standing for turn in held] == [Standing.POOR] * 3


async def test_those_that_fail_never_take_the_place_of_one_that_is_well() -> None:
    clock = Clock()
    made = turns(clock)
    well = await taken(made, at(0))
    made.ended(well, WELL)
    for number in (1, 2, 3):
        made.ended(await taken(made, at(number)), UNWELL)
    assert all([isinstance(await made.take(at(number)), Turn) for number in (1, 2)])
    assert isinstance(await made.take(at(3)), float)
    await taken(made, at(0))


async def test_one_that_waits_gets_the_next_turn_and_is_told_to_come_again_where_that_fails() -> None:
    made = turns(Clock())
    first = await taken(made, at(0))
    waiting = [asyncio.create_task(made.take(at(0))) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(each.done() for each in waiting)
    made.ended(first, UNWELL)
    assert [type(await each) for each in waiting] == [Turn, float]


async def test_where_all_places_for_new_ones_are_taken_another_waits_for_the_next_that_is_free() -> None:
    made = turns(Clock(), wait_s_max=60.0)
    running = [await taken(made, at(number)) for number in range(3)]
    waiting = [asyncio.create_task(made.take(at(number))) for number in (3, 4)]
    await asyncio.sleep(0)
    assert not any(each.done() for each in waiting)
    made.ended(running[0], WELL)
    assert isinstance(await waiting[0], Turn)
    assert not waiting[1].done()
    made.withdrawn(running[1])
    assert isinstance(await waiting[1], Turn)


async def test_no_more_wait_for_such_a_place_than_there_are_places() -> None:
    made = turns(Clock(), wait_s_max=60.0)
    for number in range(3):
        await taken(made, at(number))
    waiting = [asyncio.create_task(made.take(at(number))) for number in (3, 4, 5)]
    await asyncio.sleep(0)
    assert isinstance(await made.take(at(6)), float)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    again = asyncio.create_task(made.take(at(7)))
    await asyncio.sleep(0)
    assert not again.done()  # who was cancelled holds nobody up
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)


async def test_one_that_waited_in_vain_never_waits_before_a_door_where_nobody_runs() -> None:
    clock = Clock()
    made = turns(clock, wait_s_max=0.2)
    running = [await taken(made, at(number)) for number in range(3)]
    waiting = asyncio.create_task(made.take(at(3)))
    await asyncio.sleep(0)
    made._crowd.clear()  # as if the place were free in the moment in which its time is up
    made.ended(running[0], WELL)
    async with asyncio.timeout(20):
        assert isinstance(await waiting, Turn)


async def test_what_one_tenant_does_to_a_destination_is_nothing_to_another() -> None:
    made = turns(Clock(), poor_max=100)
    for _ in range(5):
        made.ended(await taken(made, at(0)), UNWELL)
    assert isinstance(await made.take(at(0)), float)
    await taken(made, at(0, tenant_id="umbrella"))


def test_a_route_sends_as_often_as_it_may_and_the_others_come_each_at_a_time_of_its_own() -> None:
    clock = Clock()
    rates = RouteRates(clock=clock)
    rate = Rate(10.0, 2)
    for _ in range(2):
        assert rates.come_again_s("r", rate) is None
        rates.count("r", rate)
    times = [rates.come_again_s("r", rate) for _ in range(3)]
    assert [round(each - clock.now_s, 6) for each in times if each is not None] == [0.1, 0.2, 0.3]
    clock.now_s += 0.1
    assert rates.come_again_s("r", rate) is None
    assert rates.come_again_s("other", rate) is None
    assert rates.come_again_s("r", None) is None
