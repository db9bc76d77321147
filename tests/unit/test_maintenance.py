"""Chores have their turns, and one that has more to do does not keep the others from theirs."""

from __future__ import annotations

import asyncio

from pulse.domain.errors import Outage
from pulse.services.maintenance import Chore, Maintenance, Turn


async def test_a_chore_that_has_more_to_do_goes_on_at_once_behind_the_others() -> None:
    turns: list[str] = []
    stop = asyncio.Event()

    async def long() -> Turn | None:
        turns.append("long")
        return Turn.MORE if turns.count("long") < 3 else None

    async def short() -> None:
        turns.append("short")

    async def last() -> None:
        if turns.count("long") == 3:
            stop.set()

    chores = [
        Chore(name="long", run=long, interval_s=1000),
        Chore(name="short", run=short, interval_s=1000),
        Chore(name="last", run=last, interval_s=0.001),
    ]
    async with asyncio.timeout(30):
        await Maintenance(chores=chores).run(stop)
    assert turns == ["long", "short", "long", "long"]


async def test_a_chore_that_meets_an_outage_waits_for_its_next_turn() -> None:
    stop = asyncio.Event()
    tried = 0

    async def away() -> None:
        nonlocal tried
        tried += 1
        if tried == 3:
            stop.set()
        raise Outage("postgresql", "is away")

    async with asyncio.timeout(30):
        await Maintenance(chores=[Chore(name="away", run=away, interval_s=0.001)]).run(stop)
    assert tried == 3
