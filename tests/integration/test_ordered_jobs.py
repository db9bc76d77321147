"""Lines of ordered routes in a real PostgreSQL: who takes them, what is left of them, and that their counts hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest

from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.ordered_jobs import STEPS_MAX, OrderedJobs, OrderedLines
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool
from pulse.domain.errors import StreamFull
from pulse.domain.ledger import SEQUENCE_MAX, position
from pulse.domain.line import InLine, Line, Turn, Turned
from pulse.domain.receipt import Receipt
from worker_bench import until

ALL = {1: position(1, SEQUENCE_MAX), 2: position(2, SEQUENCE_MAX)}
LEASE_S = 600.0


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=6, timeout_s=10, application_name="test") as pool:
        yield pool


@pytest.fixture
def jobs(pool: Pool) -> OrderedJobs:
    return OrderedJobs(pool, jobs_max=1000)


@pytest.fixture
def lines(pool: Pool) -> OrderedLines:
    return OrderedLines(pool, lease_s=LEASE_S)


def job(sequence: int, *, device_id: str = "d1", route_id: str = "r", epoch: int = 1) -> InLine:
    at = position(epoch, sequence)
    return InLine(tenant_id="acme", route_id=route_id, device_id=device_id, position=at, body=b"{}", since_ms=1)


def sequences(line: Line) -> list[int]:
    return [each.position & SEQUENCE_MAX for each in line.jobs]


def passed(line: Line, count: int) -> Turned:
    turn = Turn(line)
    for _ in range(count):
        turn.passed()
    return turn.turned()


def waits(line: Line, until_s: float, attempts: int) -> Turned:
    turn = Turn(line)
    turn.waits(until_s, attempts=attempts)
    return turn.turned()


async def counts(pool: Pool) -> list[tuple[str, int, int]]:
    """Of each line what it says that stands in it, and what does."""
    rows = await pool.fetch(
        """
        SELECT device_id, sum(said)::int AS said, sum(there)::int AS there FROM (
            SELECT device_id, jobs AS said, 0 AS there FROM ordered_lines
            UNION ALL SELECT device_id, 0, 1 FROM ordered_jobs
        ) AS each GROUP BY device_id ORDER BY device_id
        """
    )
    return [tuple(row) for row in rows]


async def test_a_line_is_in_the_order_of_positions_and_taken_by_one(jobs: OrderedJobs, lines: OrderedLines) -> None:
    await jobs.add([job(7), job(3)])
    await jobs.add([job(5), job(1, device_id="d2")])
    first, second = await lines.take(ALL, limit=10)
    assert [(each.key.device_id, sequences(each)) for each in (first, second)] == [("d1", [3, 5, 7]), ("d2", [1])]
    assert await lines.take(ALL, limit=10) == []


async def test_what_is_added_twice_stands_there_once(jobs: OrderedJobs, pool: Pool) -> None:
    assert await jobs.add([job(1), job(2)]) == [Receipt("ordered_jobs", 0)] * 2
    again = await jobs.add([job(2), job(3)])
    assert [isinstance(each, Receipt) and each.duplicate for each in again] == [True, False]
    assert await counts(pool) == [("d1", 3, 3)]


async def test_nothing_is_taken_beyond_what_is_routed(jobs: OrderedJobs, lines: OrderedLines) -> None:
    await jobs.add([job(3), job(9), job(12, device_id="d2")])
    [line] = await lines.take({1: position(1, 9)}, limit=10)
    assert sequences(line) == [3, 9]
    assert await lines.take({1: position(1, 11)}, limit=10) == []
    assert await lines.take({2: position(2, 99)}, limit=10) == []


async def test_each_making_of_a_stream_has_lines_of_its_own(jobs: OrderedJobs, lines: OrderedLines, pool: Pool) -> None:
    await pool.execute("INSERT INTO stream_epochs (epoch, stream, created_ns) VALUES (1, 'TELEMETRY', 17)")
    await jobs.add([job(1), job(1, epoch=2)])
    assert await lines.due_epochs() == {1: ("TELEMETRY", 17), 2: None}
    assert [each.key.epoch for each in await lines.take(ALL, limit=10)] == [1, 2]


async def test_a_long_line_is_taken_a_part_at_a_time_and_goes_when_it_is_empty(
    jobs: OrderedJobs, lines: OrderedLines, pool: Pool
) -> None:
    await jobs.add([job(each + 1) for each in range(STEPS_MAX + 1)])
    [line] = await lines.take(ALL, limit=1)
    assert len(line.jobs) == STEPS_MAX
    await lines.settle([passed(line, STEPS_MAX)])
    [rest] = await lines.take(ALL, limit=1)
    assert sequences(rest) == [STEPS_MAX + 1]
    await lines.settle([passed(rest, 1)])
    assert await counts(pool) == []


async def test_a_line_that_waits_is_due_at_its_time_with_its_attempts(
    jobs: OrderedJobs, lines: OrderedLines, pool: Pool
) -> None:
    await jobs.add([job(1)])
    [line] = await lines.take(ALL, limit=1)
    await lines.settle([waits(line, 4_000_000_000.0, 2)])
    assert await lines.take(ALL, limit=1) == []
    await jobs.add([job(2)])
    assert await lines.take(ALL, limit=1) == []  # who comes later does not wake it
    await pool.execute("UPDATE ordered_lines SET due_at = now()")
    [again] = await lines.take(ALL, limit=1)
    assert [each.attempts for each in again.jobs] == [2, 0]


async def test_a_worker_that_is_gone_loses_its_line_and_moves_nothing_of_it(jobs: OrderedJobs, pool: Pool) -> None:
    mortal, other = OrderedLines(pool, lease_s=0.0), OrderedLines(pool, lease_s=LEASE_S)
    await jobs.add([job(1), job(2)])
    [lost] = await mortal.take(ALL, limit=1)
    [line] = await other.take(ALL, limit=1)
    await mortal.keep({lost.key: lost.claim})
    await mortal.settle([waits(lost, 4_000_000_000.0, 1)])
    assert await pool.fetchval("SELECT due_at < to_timestamp(4000000000) FROM ordered_lines")
    await mortal.settle([passed(lost, 1)])  # what is delivered is, whoever did it
    await other.settle([passed(line, 1)])
    assert await counts(pool) == [("d1", 1, 1)]


async def test_a_worker_that_is_there_keeps_its_line(jobs: OrderedJobs, pool: Pool) -> None:
    short, long = OrderedLines(pool, lease_s=0.0), OrderedLines(pool, lease_s=LEASE_S)
    await jobs.add([job(1)])
    [line] = await short.take(ALL, limit=1)
    await long.keep({line.key: line.claim})
    assert await short.take(ALL, limit=1) == []


async def test_a_route_has_room_for_so_many_jobs_and_another_for_as_many(pool: Pool, lines: OrderedLines) -> None:
    jobs = OrderedJobs(pool, jobs_max=2)
    answers = await jobs.add([job(1), job(2, device_id="d2"), job(3), job(4, route_id="s")])
    assert [isinstance(each, StreamFull) for each in answers] == [False, False, True, False]
    await lines.settle([passed(line, 1) for line in await lines.take({1: position(1, 1)}, limit=9)])
    [answer] = await OrderedJobs(pool, jobs_max=2).add([job(5)])
    assert isinstance(answer, Receipt)


async def test_what_stands_in_a_full_line_is_not_refused_when_its_message_comes_again(pool: Pool) -> None:
    await OrderedJobs(pool, jobs_max=2).add([job(1), job(2)])
    first, third, second = await OrderedJobs(pool, jobs_max=2).add([job(1), job(3), job(2)])
    assert isinstance(first, Receipt)
    assert first.duplicate
    assert isinstance(second, Receipt)
    assert isinstance(third, StreamFull)


async def test_a_level_that_is_forgotten_while_another_is_looked_up_is_looked_up_again(pool: Pool) -> None:
    jobs = OrderedJobs(pool, jobs_max=2)
    await jobs.add([job(1)])
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE ordered_lines")
        both = asyncio.create_task(jobs.add([job(2), job(3), job(4, route_id="s")]))

        async def is_looked_up() -> bool:
            return bool(
                await connection.fetchval(
                    "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'ordered_lines'::regclass"
                )
            )

        await until(is_looked_up)
        jobs._level.clear()  # as another batch does once a second
    assert [isinstance(each, StreamFull) for each in await both] == [False, True, False]


async def test_counts_hold_while_many_add_take_and_settle(pool: Pool) -> None:
    chance = random.Random(1)
    jobs, lines = OrderedJobs(pool, jobs_max=10_000), OrderedLines(pool, lease_s=0.0)

    async def adds(first: int) -> None:
        for start in range(first, 120, 12):
            of_batch = [job(start + each, device_id=f"d{chance.randrange(4)}") for each in range(6)]
            await jobs.add(of_batch)
            await jobs.add(of_batch[:2])

    async def works() -> None:
        for _ in range(15):
            if found := await taken():
                await lines.settle([passed(line, chance.randint(0, len(line.jobs))) for line in found])

    async def taken() -> Sequence[Line]:
        return await lines.take(ALL, limit=3)

    async with asyncio.timeout(60):
        await asyncio.gather(adds(1), adds(7), works(), works())
    assert all(said == there for _, said, there in await counts(pool))
    while left := await taken():
        await lines.settle([passed(line, len(line.jobs)) for line in left])
    assert await counts(pool) == []
