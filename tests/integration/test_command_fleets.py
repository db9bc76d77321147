"""A fleet command makes one command a device, lot by lot, whoever dies in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress

import pytest

from command_bench import START_MS, TENANT, TIMEOUT_MS, TTL_MS, CommandBench, open_bench
from pulse.adapters.postgres.command_fleets import FleetLots
from pulse.adapters.postgres.commands import CommandStore
from pulse.adapters.postgres.pool import Scoped
from pulse.domain.command import State
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.fleet import Filter, Fleet, NewFleet, Stage


class Died(Exception):
    """As kill -9 has it: between the last statement and the commit."""


@pytest.fixture
async def bench(database: str) -> AsyncIterator[CommandBench]:
    async with open_bench(database, devices=()) as bench:
        yield bench


def asked(**given: object) -> NewFleet:
    filled: dict[str, object] = {
        "tenant_id": TENANT,
        "name": "update",
        "payload": b'{"to":"2.1"}',
        "ttl_ms": TTL_MS,
        "timeout_ms": TIMEOUT_MS,
        "filter": Filter(all=True),
        **given,
    }
    return NewFleet(**filled)  # type: ignore[arg-type]


async def make(bench: CommandBench, **given: object) -> Fleet:
    return (await bench.store.create_fleet(asked(**given), who="key", at_ms=bench.now_ms))[0]


async def expand(bench: CommandBench, lots: FleetLots) -> int:
    made = 0
    while lot := await lots.advance(bench.now_ms):
        made += lot.made + lot.cancelled
    return made


def names(count: int, prefix: str = "d") -> list[str]:
    return [f"{prefix}{number:04}" for number in range(count)]


async def test_five_thousand_devices_get_one_each_though_the_expander_dies_on_its_way(bench: CommandBench) -> None:
    devices = names(5000)
    await bench.register(devices)
    await bench.register(names(10), tenant_id="other")
    fleet = await make(bench)
    lots_committed = 0

    def die(step: str) -> None:
        if step == "fleets.before_commit" and lots_committed in (0, 2, 4):
            raise Died

    for _ in range(3):
        doomed = FleetLots(bench.pool, probe=die)
        with suppress(Died):
            while await doomed.advance(START_MS):
                lots_committed += 1
        assert lots_committed < 5, "it has died"
        assert await FleetLots(bench.pool).advance(START_MS)
        lots_committed += 1
    await expand(bench, FleetLots(bench.pool))
    told = await bench.post()
    assert sorted(each.device_id for each in told) == devices
    assert len({each.command_id for each in told}) == 5000
    fleet = await bench.store.fleet(TENANT, fleet.fleet_id)
    assert (fleet.stage, fleet.devices, fleet.counts) == (Stage.EXPANDED, 5000, {State.QUEUED: 5000})
    rows = await bench.pool.fetchval("SELECT count(*) FROM command_moves WHERE state = 'queued' AND who = 'key'")
    assert rows == 5000


async def test_a_tenant_has_no_more_open_fleet_commands_than_it_may(bench: CommandBench) -> None:
    """Each has one command a device: without a bound they would fill what `command_open_max` bounds."""
    await bench.register(names(3))
    await bench.register(names(3), tenant_id="other")
    store = CommandStore(bench.pool, open_max=2)

    async def ask(**given: object) -> Fleet:
        return (await store.create_fleet(asked(**given), who="key", at_ms=bench.now_ms))[0]

    first, second = await ask(idempotency_key="k"), await ask(filter=Filter(devices=("d0001",)))
    for _ in range(2):
        with pytest.raises(LimitExceeded) as raised:
            await ask()
        assert (raised.value.limit, raised.value.value) == ("command_open_max", 2)
        await expand(bench, FleetLots(bench.pool))
    assert (await ask(idempotency_key="k")).fleet_id == first.fleet_id, "a repetition makes none"
    await ask(tenant_id="other")
    await store.cancel_fleet(TENANT, second.fleet_id, who="key", at_ms=bench.now_ms)
    await expand(bench, FleetLots(bench.pool))
    await ask()


async def test_three_expanders_at_once_make_one_a_device(bench: CommandBench) -> None:
    await bench.register(names(300))
    fleets = [await make(bench, name=name) for name in ("a", "b", "c", "d")]
    made = await asyncio.gather(*[expand(bench, FleetLots(bench.pool, lot_max=20)) for _ in range(3)])
    while await expand(bench, FleetLots(bench.pool, lot_max=20)):
        pass
    assert sum(made) <= 1200
    for fleet in fleets:
        assert (await bench.store.fleet(TENANT, fleet.fleet_id)).counts == {State.QUEUED: 300}
    told = await bench.post()
    assert len(told) == len(set(told)) == 1200


async def test_fleets_take_turns(bench: CommandBench) -> None:
    await bench.register(names(100))
    large = await make(bench)
    lots = FleetLots(bench.pool, lot_max=10)
    await lots.advance(bench.now_ms)
    bench.now_ms += 1
    small = await make(bench, filter=Filter(devices=("d0007",)))
    await lots.advance(bench.now_ms)
    assert (await bench.store.fleet(TENANT, small.fleet_id)).stage is Stage.EXPANDED
    assert (await bench.store.fleet(TENANT, large.fleet_id)).stage is Stage.EXPANDING


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"all": True}, ["a1", "a2", "b1", "b2"]),
        ({"prefix": "a"}, ["a1", "a2"]),
        ({"attributes": {"model": "x"}}, ["a2", "b2"]),
        ({"attributes": {"model": "x", "floor": 3}}, ["b2"]),
        ({"prefix": "a", "attributes": {"model": "x"}}, ["a2"]),
        ({"devices": ("b1", "a1")}, ["a1", "b1"]),
        ({"devices": ("b1", "a2"), "attributes": {"model": "x"}}, ["a2"]),
        ({"prefix": "_"}, []),
    ],
    ids=str,
)
async def test_a_filter_chooses_the_devices_that_all_of_it_holds_for(
    bench: CommandBench, given: Mapping[str, object], expected: list[str]
) -> None:
    await bench.register(["a1", "b1"])
    await bench.register(["a2"], attributes='{"model":"x","floor":2}')
    await bench.register(["b2"], attributes='{"model":"x","floor":3}')
    await make(bench, filter=Filter(**given))  # type: ignore[arg-type]
    await expand(bench, FleetLots(bench.pool, lot_max=1))
    assert {each.device_id for each in await bench.post()} == set(expected)


async def test_progress_is_told_by_state_as_devices_answer(bench: CommandBench) -> None:
    await bench.register(names(6))
    fleet = await make(bench)
    await expand(bench, FleetLots(bench.pool))
    told = await bench.post()
    for each, state in zip(told, ("acknowledged", "succeeded", "failed", "rejected"), strict=False):
        await bench.say(each.device_id, each.command_id, state)
    counts = (await bench.store.fleet(TENANT, fleet.fleet_id)).counts
    assert {state.value: n for state, n in counts.items()} == {
        "queued": 2, "acknowledged": 1, "succeeded": 1, "failed": 1, "rejected": 1,
    }  # fmt: skip
    bench.now_ms += TTL_MS
    await bench.sweep()
    ended = (await bench.store.fleet(TENANT, fleet.fleet_id)).counts
    assert sum(ended.values()) == 6
    assert all(state.final for state in ended), "none is stuck"


async def test_a_fleet_that_is_cancelled_makes_no_more_and_ends_what_is_open(bench: CommandBench) -> None:
    await bench.register(names(30))
    fleet = await make(bench)
    lots = FleetLots(bench.pool, lot_max=10)
    await lots.advance(bench.now_ms)
    await lots.advance(bench.now_ms)
    first = (await bench.post())[0]
    await bench.say(first.device_id, first.command_id, "succeeded")
    cancelled = await bench.store.cancel_fleet(TENANT, fleet.fleet_id, who="ann", at_ms=bench.now_ms)
    assert cancelled.stage is Stage.CANCELLING
    await expand(bench, lots)
    cancelled = await bench.store.fleet(TENANT, fleet.fleet_id)
    assert (cancelled.stage, cancelled.counts) == (Stage.CANCELLED, {State.SUCCEEDED: 1, State.CANCELLED: 19})
    assert await bench.pool.fetchval("SELECT count(*) FROM command_moves WHERE who = 'ann'") == 19
    with pytest.raises(Refusal) as raised:
        await bench.store.cancel_fleet(TENANT, fleet.fleet_id, who="ann", at_ms=bench.now_ms)
    assert raised.value.reason is Reason.CONFLICT


async def test_what_is_made_after_its_time_is_not_said_and_expires(bench: CommandBench) -> None:
    await bench.register(names(3))
    fleet = await make(bench)
    bench.now_ms += TTL_MS
    await expand(bench, FleetLots(bench.pool))
    await bench.sweep()
    assert await bench.post() == []
    assert (await bench.store.fleet(TENANT, fleet.fleet_id)).counts == {State.EXPIRED: 3}


async def test_a_request_repeated_under_its_key_makes_one_fleet(bench: CommandBench) -> None:
    await bench.register(names(3))
    made = await asyncio.gather(
        *[bench.store.create_fleet(asked(idempotency_key="k"), who="key", at_ms=START_MS) for _ in range(8)]
    )
    assert sum(is_new for _, is_new in made) == 1
    assert len({fleet.fleet_id for fleet, _ in made}) == 1
    with pytest.raises(Refusal) as raised:
        await bench.store.create_fleet(asked(idempotency_key="k", filter=Filter(prefix="d")), who="key", at_ms=START_MS)
    assert raised.value.reason is Reason.CONFLICT


async def test_a_named_device_that_is_not_registered_is_said_at_once(bench: CommandBench) -> None:
    await bench.register(["d1"])
    with pytest.raises(Refusal) as raised:
        await make(bench, filter=Filter(devices=("d1", "d9")))
    assert (raised.value.reason, raised.value.field) == (Reason.NOT_FOUND, "filter.devices")
    assert "d9" in raised.value.message


async def test_a_tenants_key_reaches_its_own_fleets_alone(bench: CommandBench) -> None:
    await bench.register(["d1"])
    await bench.register(["d1"], tenant_id="other")
    theirs = await make(bench)
    own = CommandStore(Scoped(pool=bench.pool, tenant_id="other"))
    mine, _ = await own.create_fleet(asked(tenant_id="other"), who="key", at_ms=START_MS)
    await expand(bench, FleetLots(bench.pool))
    assert (await own.fleet("other", mine.fleet_id)).counts == {State.QUEUED: 1}
    assert [fleet.fleet_id for fleet in await own.fleets("other")] == [mine.fleet_id]
    assert await own.fleets(TENANT) == []
    for call in (own.fleet(TENANT, theirs.fleet_id), own.cancel_fleet(TENANT, theirs.fleet_id, who="k", at_ms=0)):
        with pytest.raises(Refusal) as raised:
            await call
        assert raised.value.reason is Reason.NOT_FOUND


async def test_fleets_are_listed_the_newest_first_page_by_page(bench: CommandBench) -> None:
    made = []
    for number in range(5):
        bench.now_ms += number % 2
        made.append(await make(bench))
    expected = sorted(made, key=lambda each: (each.created_ms, each.fleet_id), reverse=True)
    pages, before = [], None
    while page := await bench.store.fleets(TENANT, before=before, limit=2):
        pages += page
        before = page[-1].created_ms, page[-1].fleet_id
    assert [each.fleet_id for each in pages] == [each.fleet_id for each in expected]
