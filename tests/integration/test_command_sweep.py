"""What time does to commands, on a clock that stands until it is told to go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from command_bench import PAUSE_MS, START_MS, TENANT, TIMEOUT_MS, TTL_MS, CommandBench, Told, new, open_bench
from pulse.adapters.postgres.command_sweep import CommandSweep, drop_commands
from pulse.adapters.postgres.shadow_settling import ShadowSettlements
from pulse.domain.errors import Refusal
from pulse.domain.fleet import Filter, NewFleet
from pulse.domain.ledger import position
from pulse.domain.shadow import ShadowBounds
from pulse.domain.shadow_requests import Request, read_request
from pulse.domain.subjects import MessageType

DAY_MS = 86_400_000
LONG_MS = 30 * DAY_MS


@pytest.fixture
async def bench(database: str) -> AsyncIterator[CommandBench]:
    async with open_bench(database) as bench:
        yield bench


async def test_a_command_expires_at_the_end_of_its_ttl_whether_it_was_sent_or_not(bench: CommandBench) -> None:
    queued, sent, heard = [await bench.create() for _ in range(3)]
    await bench.sent(sent)
    bench.now_ms += TTL_MS - 1
    await bench.say("d1", heard.command_id, "acknowledged")
    await bench.sweep()
    assert [await bench.state(each) for each in (queued, sent, heard)] == ["queued", "sent", "acknowledged"]
    bench.now_ms += 1
    await bench.sweep()
    assert [await bench.state(each) for each in (queued, sent, heard)] == ["expired", "expired", "acknowledged"]
    assert (await bench.moves(sent))[-1] == ("expired", TTL_MS, "pulse")
    assert (await bench.say("d1", queued.command_id, "succeeded")).late == 1
    assert await bench.state(queued) == "expired"


async def test_who_acknowledges_and_never_finishes_is_timed_out(bench: CommandBench) -> None:
    command = await bench.create()
    await bench.say("d1", command.command_id, "acknowledged")
    bench.now_ms += TIMEOUT_MS - 1
    await bench.sweep()
    assert await bench.state(command) == "acknowledged"
    bench.now_ms += 1
    await bench.sweep()
    assert await bench.state(command) == "timed_out"
    assert (await bench.say("d1", command.command_id, "succeeded")).late == 1


async def test_a_device_that_was_away_is_told_again_when_it_is_heard_of(bench: CommandBench) -> None:
    command = await bench.create(ttl_ms=LONG_MS)
    await bench.post()
    await bench.sent(command)
    await bench.seen("d1")
    assert await bench.sweep() == 0, "it was heard of before"
    bench.now_ms += PAUSE_MS
    assert await bench.sweep() == 0, "it has been silent since"
    bench.now_ms += 1
    await bench.seen("d1")
    assert await bench.sweep() == 1
    assert await bench.post() == [Told("d1", command.command_id)]
    assert await bench.sweep() == 0


@pytest.mark.parametrize("how", ["a get", "an update that is rejected", "an answer", "an answer to nothing"])
async def test_a_device_that_never_sends_telemetry_is_heard_of_all_the_same(bench: CommandBench, how: str) -> None:
    """By what it says of its shadow, and by its answers to other commands."""
    command = await bench.create(ttl_ms=LONG_MS)
    answered = (await bench.create(name="blink")).command_id if how == "an answer" else "none"
    await bench.post()
    await bench.sent(command)
    bench.now_ms += PAUSE_MS + 1
    assert await bench.sweep() == 0, "that we have sent it is no sign of the device"
    if how.startswith("an answer"):
        await bench.say("d1", answered, "succeeded")
    else:
        payload = b"{}" if how == "a get" else b'{"state":{"reported":{}},"version":9}'
        kind = MessageType.SHADOW_GET if how == "a get" else MessageType.SHADOW
        request = read_request(position(1, 10**6), bench.message("d1", payload, kind=kind))
        assert isinstance(request, Request)
        shadows = ShadowSettlements(
            bench.pool, stream="SHADOW", bounds=ShadowBounds(shadow_bytes_max=99, shadow_depth_max=8), names_max=1
        )
        await shadows.settle([request], [])
    await bench.pool.execute("DELETE FROM outbox")
    assert await bench.sweep() == 1
    assert await bench.post() == [Told("d1", command.command_id)]


async def test_what_is_heard_of_late_moves_nothing_back(bench: CommandBench) -> None:
    async def last_seen_ms() -> int:
        seen = await bench.pool.fetchval("SELECT extract(epoch FROM last_seen) * 1000 FROM device_state")
        return int(seen)

    late = bench.answer("d1", "none", "succeeded")
    bench.now_ms += 5
    await bench.settle(bench.answer("d1", "none", "failed"), late)
    assert await last_seen_ms() == bench.now_ms
    bench.now_ms -= 1000
    await bench.say("d1", "none", "failed")
    assert await last_seen_ms() == bench.now_ms + 1000


async def test_one_that_was_never_noted_as_sent_is_told_again_too(bench: CommandBench) -> None:
    """Its message may have been lost on the way down."""
    command = await bench.create(ttl_ms=LONG_MS)
    bench.now_ms += PAUSE_MS + 1
    await bench.seen("d1")
    assert await bench.sweep() == 1
    assert await bench.state(command) == "queued"


async def test_who_never_answers_is_told_ever_less_often(bench: CommandBench) -> None:
    await bench.create(ttl_ms=LONG_MS)
    told_at = []
    for second in range(0, 4 * 3600, 5):
        bench.now_ms = START_MS + second * 1000
        await bench.seen("d1")
        if await bench.sweep():
            told_at.append(second)
    pauses = [later - earlier for earlier, later in zip([0, *told_at], told_at, strict=False)]
    assert pauses[:4] == [35, 65, 125, 245], "doubled, and the next look"
    assert max(pauses) <= 3605
    assert len(told_at) == 9


@pytest.mark.parametrize("how", ["acknowledged", "succeeded", "cancelled", "held", "expired"])
async def test_what_is_answered_or_over_or_waits_its_turn_is_not_told_again(bench: CommandBench, how: str) -> None:
    command = await bench.create(ordered=True, timeout_ms=LONG_MS)
    if how == "held":
        await bench.say("d1", command.command_id, "acknowledged")
        await bench.create(ordered=True, ttl_ms=LONG_MS)
    elif how == "cancelled":
        await bench.store.cancel(TENANT, command.command_id, who="key", at_ms=START_MS)
    elif how != "expired":
        await bench.say("d1", command.command_id, how)
    bench.now_ms += PAUSE_MS + 1 if how != "expired" else TTL_MS
    await bench.seen("d1")
    await bench.post()
    count, _ = await bench.sweeping.say_again(pause_ms=PAUSE_MS, at_ms=bench.now_ms)
    assert (count, await bench.post()) == (0, [])


async def test_all_open_commands_have_their_turn_window_by_window(bench: CommandBench) -> None:
    await bench.register([f"w{number}" for number in range(7)])
    commands = [await bench.create(f"w{number}", ttl_ms=LONG_MS) for number in range(7) for _ in range(3)]
    await bench.post()
    bench.now_ms += PAUSE_MS + 1
    for number in range(7):
        await bench.seen(f"w{number}")
    bench.sweeping = CommandSweep(bench.pool, window=4)
    assert await bench.sweep() == 21
    assert sorted(each.command_id for each in await bench.post()) == sorted(each.command_id for each in commands)
    assert await bench.sweep() == 0


async def test_two_sweeps_at_once_end_and_tell_each_command_once(bench: CommandBench) -> None:
    dying = [await bench.create(ttl_ms=1) for _ in range(60)]
    silent = [await bench.create("d2", ttl_ms=LONG_MS) for _ in range(60)]
    await bench.post()
    bench.now_ms += PAUSE_MS + 1
    await bench.seen("d2")

    async def sweep() -> tuple[int, int]:
        sweeping = CommandSweep(bench.pool, lot=7)
        ended = again = 0
        for _ in range(20):
            ended += sum((await sweeping.end(due_ms=bench.now_ms, at_ms=bench.now_ms)).values())
            again += (await sweeping.say_again(pause_ms=PAUSE_MS, at_ms=bench.now_ms))[0]
        return ended, again

    both = await asyncio.gather(sweep(), sweep())
    assert [sum(counts) for counts in zip(*both, strict=True)] == [60, 60]
    assert {await bench.state(command) for command in dying} == {"expired"}
    assert sorted(each.command_id for each in await bench.post()) == sorted(each.command_id for each in silent)


async def test_what_another_sweep_has_told_in_between_is_not_told_twice(bench: CommandBench) -> None:
    for _ in range(40):
        await bench.create(ttl_ms=LONG_MS)
    for number in range(5):
        bench.now_ms += (PAUSE_MS << number) + 1
        await bench.seen("d1")
        await bench.post()
        told = await asyncio.gather(
            *[CommandSweep(bench.pool).say_again(pause_ms=PAUSE_MS, at_ms=bench.now_ms) for _ in range(6)]
        )
        assert sum(count for count, _ in told) == len(await bench.post()) == 40


async def test_what_ended_long_ago_goes_with_its_record_and_then_its_fleet(bench: CommandBench) -> None:
    asked = new()
    fleet, _ = await bench.store.create_fleet(
        NewFleet(
            tenant_id=TENANT,
            name="blink",
            payload=asked.payload,
            ttl_ms=TTL_MS,
            timeout_ms=TIMEOUT_MS,
            filter=Filter(devices=("d1",)),
        ),
        who="key",
        at_ms=START_MS,
    )
    await bench.pool.execute("UPDATE fleet_commands SET stage = 'expanded'")
    old = [await bench.create() for _ in range(5)]
    for command in old:
        await bench.say("d1", command.command_id, "succeeded")
    await bench.pool.execute("UPDATE commands SET fleet_id = $1", fleet.fleet_id)
    bench.now_ms += DAY_MS
    young, still_open = await bench.create(), await bench.create(ttl_ms=LONG_MS)
    await bench.say("d1", young.command_id, "succeeded")
    before = datetime.fromtimestamp(bench.now_ms / 1000, UTC).date()
    dropped = []
    while lot := await drop_commands(bench.pool, before, lot=2):
        dropped.append(lot.rows)
    assert dropped == [2, 2, 1]
    left = await bench.store.commands(TENANT)
    assert {each.command_id for each in left} == {young.command_id, still_open.command_id}
    moves = await bench.pool.fetch("SELECT DISTINCT command_id FROM command_moves")
    assert {row["command_id"] for row in moves} == {young.command_id, still_open.command_id}
    with pytest.raises(Refusal):
        await bench.store.fleet(TENANT, fleet.fleet_id)
