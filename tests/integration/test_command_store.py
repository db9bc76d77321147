"""Commands are made once, in order where asked, and never beyond what a key may see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from command_bench import START_MS, TENANT, TTL_MS, CommandBench, Told, new, open_bench
from pulse.adapters.postgres.commands import CommandStore, _insert, open_commands
from pulse.adapters.postgres.pool import Scoped, transaction
from pulse.domain.command import State
from pulse.domain.errors import LimitExceeded, Reason, Refusal


@pytest.fixture
async def bench(database: str) -> AsyncIterator[CommandBench]:
    async with open_bench(database) as bench:
        yield bench


async def test_a_command_is_stored_and_said_in_one_transaction(bench: CommandBench) -> None:
    command = await bench.create(payload=b'{"at":[1,2.50,"\\u00e9"]}')
    assert command == await bench.store.command(TENANT, command.command_id)
    assert (command.state, command.due_ms, command.sends) == (State.QUEUED, START_MS + TTL_MS, 0)
    assert command.payload == b'{"at":[1,2.50,"\\u00e9"]}', "as it was asked, to the byte"
    assert await bench.post() == [Told("d1", command.command_id)]
    assert await bench.moves(command) == [("queued", 0, "key")]


async def test_a_device_that_is_not_registered_gets_none(bench: CommandBench) -> None:
    with pytest.raises(Refusal) as raised:
        await bench.create("d3")
    assert (raised.value.reason, raised.value.field) == (Reason.NOT_FOUND, "device_id")
    assert await bench.post() == []


async def test_a_request_repeated_under_its_key_makes_one_command(bench: CommandBench) -> None:
    made, first = await bench.store.create(new(idempotency_key="k"), who="key", at_ms=START_MS)
    again, second = await bench.store.create(
        new(idempotency_key="k", payload=b'{ "delay": 3 }'), who="other", at_ms=START_MS + 5
    )
    assert (first, second, again) == (True, False, made)
    assert len(await bench.post()) == 1


@pytest.mark.parametrize(
    "other",
    [{"device_id": "d2"}, {"name": "blink"}, {"payload": b"{}"}, {"ttl_ms": 5}, {"timeout_ms": 5}, {"ordered": True}],
    ids=str,
)
async def test_another_request_under_that_key_is_a_conflict(bench: CommandBench, other: dict[str, object]) -> None:
    await bench.create(idempotency_key="k")
    with pytest.raises(Refusal) as raised:
        await bench.create(**{"idempotency_key": "k", **other})  # type: ignore[arg-type]
    assert (raised.value.reason, raised.value.field) == (Reason.CONFLICT, "idempotency_key")


@pytest.mark.parametrize("ordered", [False, True])
async def test_ten_at_once_under_one_key_make_one_command(bench: CommandBench, ordered: bool) -> None:
    made = await asyncio.gather(
        *[bench.store.create(new(idempotency_key="k", ordered=ordered), who="key", at_ms=START_MS) for _ in range(10)]
    )
    assert sum(is_new for _, is_new in made) == 1
    assert len({command.command_id for command, _ in made}) == 1
    assert len(await bench.post()) == 1


async def test_a_key_is_a_tenants_own(bench: CommandBench) -> None:
    await bench.register(["d1"], tenant_id="other")
    await bench.create(idempotency_key="k")
    _, is_new = await bench.store.create(
        new(tenant_id="other", name="blink", idempotency_key="k"), who="key", at_ms=START_MS
    )
    assert is_new


async def test_a_device_has_no_more_open_commands_than_it_may(bench: CommandBench) -> None:
    store = CommandStore(bench.pool, open_max=2)
    for _ in range(2):
        last, _ = await store.create(new(), who="key", at_ms=START_MS)
    with pytest.raises(LimitExceeded) as raised:
        await store.create(new(), who="key", at_ms=START_MS)
    assert (raised.value.limit, raised.value.value) == ("command_open_max", 2)
    await store.create(new("d2"), who="key", at_ms=START_MS)
    await store.cancel(TENANT, last.command_id, who="key", at_ms=START_MS)
    await store.create(new(), who="key", at_ms=START_MS)


async def test_of_ordered_ones_the_oldest_open_is_said_and_its_end_says_the_next(bench: CommandBench) -> None:
    first, second, third = [await bench.create(ordered=True) for _ in range(3)]
    elsewhere = [await bench.create("d2", ordered=True), await bench.create(name="blink", ordered=True)]
    unordered = await bench.create()
    assert await bench.post() == [Told(each.device_id, each.command_id) for each in (first, *elsewhere, unordered)]
    await bench.say("d1", first.command_id, "acknowledged")
    assert await bench.post() == [], "an acknowledged one is open"
    settled = await bench.say("d1", first.command_id, "succeeded")
    assert (settled.released, await bench.post()) == (1, [Told("d1", second.command_id)])
    await bench.store.cancel(TENANT, second.command_id, who="key", at_ms=bench.now_ms)
    assert await bench.post() == [Told("d1", third.command_id)]
    bench.now_ms += TTL_MS
    fourth = await bench.create(ordered=True)
    assert await bench.post() == []
    await bench.sweep()
    assert await bench.state(third) == "expired"
    assert await bench.post() == [Told("d1", fourth.command_id)]


async def test_the_end_of_one_that_waits_says_nothing(bench: CommandBench) -> None:
    first, second, third = [await bench.create(ordered=True) for _ in range(3)]
    await bench.post()
    await bench.store.cancel(TENANT, second.command_id, who="key", at_ms=START_MS)
    assert await bench.post() == []
    await bench.say("d1", first.command_id, "failed")
    assert await bench.post() == [Told("d1", third.command_id)]


async def test_however_they_come_and_go_at_once_one_ordered_command_is_open_and_none_is_left_behind(
    bench: CommandBench,
) -> None:
    async def make(number: int) -> None:
        command = await bench.create(ordered=True, idempotency_key=f"k{number}")
        if number % 3 == 0:
            await bench.store.cancel(TENANT, command.command_id, who="key", at_ms=START_MS)

    async def finish() -> int:
        told = await bench.post()
        for each in told:
            await bench.say("d1", each.command_id, "succeeded")
        return len(told)

    makers = [asyncio.create_task(make(number)) for number in range(30)]
    while not all(maker.done() for maker in makers):
        open_now = await bench.pool.fetchval("SELECT count(*) FROM commands WHERE due_ms IS NOT NULL AND NOT held")
        assert open_now <= 1
        await finish()
    await asyncio.gather(*makers)
    while await finish():
        pass
    states = await bench.pool.fetch("SELECT state, count(*) FROM commands GROUP BY 1")
    assert sum(row["count"] for row in states) == 30
    assert {row["state"] for row in states} <= {"cancelled", "succeeded"}, "none waits for ever"


async def test_one_that_is_made_while_the_one_before_it_ends_has_its_turn(bench: CommandBench) -> None:
    """The end waits for what is being made to wait for it."""
    first = await bench.create(ordered=True)
    await bench.post()

    async def waits_for_a_lock() -> bool:
        count = await bench.pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return bool(count)

    async with transaction(bench.pool) as connection:
        second = await _insert(connection, new(ordered=True), who="key", at_ms=START_MS)
        assert second is not None
        assert second.held
        ending = asyncio.create_task(bench.say("d1", first.command_id, "succeeded"))
        while not ending.done() and not await waits_for_a_lock():  # noqa: ASYNC110 - PostgreSQL is waited for
            await asyncio.sleep(0.01)
    await ending
    assert await bench.post() == [Told("d1", second.command_id)]


async def test_what_is_listed_is_the_newest_first_page_by_page(bench: CommandBench) -> None:
    made = []
    for number in range(7):
        bench.now_ms += number % 2
        made.append(await bench.create("d1" if number % 3 else "d2"))
    await bench.say("d2", made[0].command_id, "failed")
    pages, before = [], None
    while page := await bench.store.commands(TENANT, before=before, limit=3):
        pages += page
        before = page[-1].created_ms, page[-1].command_id
    expected = sorted(made, key=lambda each: (each.created_ms, each.command_id), reverse=True)
    assert [each.command_id for each in pages] == [each.command_id for each in expected]
    of_device = await bench.store.commands(TENANT, device_id="d2")
    assert {each.command_id for each in of_device} == {made[0].command_id, made[3].command_id, made[6].command_id}
    failed = await bench.store.commands(TENANT, device_id="d2", state=State.FAILED)
    assert [each.command_id for each in failed] == [made[0].command_id]
    assert await bench.store.commands("nobody") == []


async def test_what_has_ended_cannot_be_cancelled(bench: CommandBench) -> None:
    command = await bench.create()
    cancelled = await bench.store.cancel(TENANT, command.command_id, who="ann", at_ms=START_MS + 7)
    assert (cancelled.state, cancelled.due_ms) == (State.CANCELLED, None)
    assert await bench.moves(command) == [("queued", 0, "key"), ("cancelled", 7, "ann")]
    with pytest.raises(Refusal) as raised:
        await bench.store.cancel(TENANT, command.command_id, who="ann", at_ms=START_MS)
    assert raised.value.reason is Reason.CONFLICT
    with pytest.raises(Refusal) as raised:
        await bench.store.cancel(TENANT, "none", who="ann", at_ms=START_MS)
    assert raised.value.reason is Reason.NOT_FOUND


async def test_who_asks_is_told_what_it_has_to_answer_for(bench: CommandBench) -> None:
    queued, sent, heard, done = [await bench.create() for _ in range(4)]
    await bench.sent(sent)
    await bench.say("d1", heard.command_id, "acknowledged")
    await bench.say("d1", done.command_id, "rejected")
    first, _ = [await bench.create(ordered=True) for _ in range(2)]
    await bench.create("d2")
    await bench.create(ttl_ms=1)
    bench.now_ms += 1
    found = await open_commands(bench.pool, TENANT, "d1", at_ms=bench.now_ms, limit=10)
    assert [each.command_id for each in found] == [each.command_id for each in (queued, sent, first)]
    found = await open_commands(bench.pool, TENANT, "d1", at_ms=bench.now_ms, limit=1)
    assert [each.command_id for each in found] == [queued.command_id]


async def test_a_tenants_key_reaches_its_own_commands_alone(bench: CommandBench) -> None:
    await bench.register(["d1"], tenant_id="other")
    own = CommandStore(Scoped(pool=bench.pool, tenant_id="other"))
    theirs = await bench.create()
    mine, _ = await own.create(new(tenant_id="other", ordered=True), who="key", at_ms=START_MS)
    await own.cancel("other", mine.command_id, who="key", at_ms=START_MS)
    with pytest.raises(Refusal):
        await own.command(TENANT, theirs.command_id)
    assert await own.moves(TENANT, theirs.command_id) == []
    assert await own.commands(TENANT) == []
    with pytest.raises(Refusal):
        await own.cancel(TENANT, theirs.command_id, who="key", at_ms=START_MS)
    with pytest.raises(Refusal):
        await own.create(new(), who="key", at_ms=START_MS)
    async with transaction(Scoped(pool=bench.pool, tenant_id="other")) as connection:
        seen = await connection.fetch("SELECT tenant_id FROM commands UNION ALL SELECT tenant_id FROM command_moves")
        assert {row["tenant_id"] for row in seen} == {"other"}


async def test_each_question_about_many_commands_has_an_index(bench: CommandBench) -> None:
    await bench.pool.execute(
        """
        INSERT INTO commands (tenant_id, command_id, device_id, name, payload, state, created_ms, expires_ms,
                              timeout_ms, due_ms, ended_ms, created_by, fleet_id)
        SELECT 'acme', lpad(n::text, 8, '0'), 'd' || n % 5000, 'blink', '{}',
               CASE WHEN n % 10 = 0 THEN 'queued' ELSE 'succeeded' END, n, n + 60000, 1000,
               CASE WHEN n % 10 = 0 THEN n + 60000 END, CASE WHEN n % 10 > 0 THEN n END, 'key', 'f' || n % 20
        FROM generate_series(1, 50000) AS n
        """
    )
    await bench.pool.execute("ANALYZE commands")
    page = "ORDER BY created_ms DESC, command_id DESC LIMIT 9"
    questions = {
        "commands_open": "tenant_id = 'acme' AND device_id = 'd10' AND due_ms IS NOT NULL ORDER BY number LIMIT 10",
        "commands_due": "due_ms <= 60100 ORDER BY due_ms LIMIT 1000",
        "commands_newest": f"tenant_id = 'acme' {page}",
        "commands_in_state": f"tenant_id = 'acme' AND state = 'failed' {page}",
        "commands_of_device": f"tenant_id = 'acme' AND device_id = 'd7' {page}",
        "commands_of_fleet": f"tenant_id = 'acme' AND fleet_id = 'f7' {page}",
        "commands_ended": "ended_ms < 100 ORDER BY ended_ms LIMIT 1000",
    }
    for index, question in questions.items():
        plan = await bench.pool.fetch(f"EXPLAIN SELECT * FROM commands WHERE {question}")  # noqa: S608 - from above
        assert f"using {index} on" in "\n".join(row[0] for row in plan), (index, plan)
