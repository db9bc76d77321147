"""Rollups are what a count of all rows would give, in whatever order the rows came and whoever died meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext

import pytest

from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, Scoped, open_connection, open_pool, transaction
from pulse.adapters.postgres.rollups import RollupStore
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.adapters.postgres.telemetry_query import TelemetryReader
from pulse.domain.ledger import position
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.query import Aggregate, BucketQuery
from pulse.domain.settlement import Row, Settlement
from storage import ON_BOTH

pytestmark = ON_BOTH

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
UNIT_S = {"telemetry_minutes": 60, "telemetry_hours": 3600}
STEPS = ("rollups.taken", "rollups.added", "rollups.committed")


class Killed(BaseException):
    """What a test raises in place of a death: nothing may catch it."""


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=6, timeout_s=10, application_name="test") as pool:
        yield pool


def row(sequence: int, ts: datetime, metrics: object, *, device: str = "d1", tenant: str = "t1") -> Row:
    ts_us = (ts - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    return Row(position(1, sequence), ts_us, tenant, device, sequence, None, json.dumps(metrics).encode())


async def settle(pool: Pool, rows: Iterable[Row]) -> None:
    store = TelemetryStore(pool, stream="TELEMETRY")
    await store.settle(Settlement(rows=list(rows), signs_of_life=[], dead_letters=[]))


async def roll_up(pool: Pool) -> None:
    while await RollupStore(pool).add():
        pass


async def expected(pool: Pool, unit_s: int) -> dict[tuple[object, ...], tuple[object, ...]]:
    """Every rollup as a loop over all rows makes it."""
    rows = await pool.fetch("SELECT ts, tenant_id, device_id, position, metrics FROM telemetry ORDER BY ts, position")
    values: dict[tuple[object, ...], list[tuple[Decimal, datetime, int]]] = {}
    for ts, tenant, device, at, metrics in rows:
        bucket = datetime.fromtimestamp(int(ts.timestamp()) // unit_s * unit_s, UTC)
        for name, value in json.loads(metrics, parse_float=Decimal).items():
            if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
                values.setdefault((tenant, device, name, bucket), []).append((Decimal(value), ts, at))
    with localcontext(prec=400):
        return {
            key: (len(these), sum(v[0] for v in these), min(v[0] for v in these), max(v[0] for v in these), *these[-1])
            for key, these in values.items()
        }


async def stored(pool: Pool, series: str) -> dict[tuple[object, ...], tuple[object, ...]]:
    rows = await pool.fetch(f"SELECT * FROM {series}")  # noqa: S608
    return {tuple(each.values())[:4]: tuple(each.values())[4:] for each in rows}


async def check(pool: Pool) -> None:
    for series, unit_s in UNIT_S.items():
        assert await stored(pool, series) == await expected(pool, unit_s), series


async def test_each_number_is_counted_by_the_minute_and_by_the_hour(pool: Pool) -> None:
    metrics = {"temp": 21.5, "door": "open", "on": True, "n": 9007199254740993}
    later = {"temp": -1, "n": "not a number"}
    await settle(pool, [row(1, NOON, metrics), row(2, NOON + timedelta(seconds=59), later)])
    await settle(pool, [row(3, NOON + timedelta(minutes=1), {"temp": 1e308}), row(4, NOON, metrics, device="d2")])
    await roll_up(pool)
    minutes = await stored(pool, "telemetry_minutes")
    assert minutes["t1", "d1", "temp", NOON] == (
        2, Decimal("20.5"), -1, Decimal("21.5"), -1, NOON + timedelta(seconds=59), position(1, 2),
    )  # fmt: skip
    assert minutes["t1", "d1", "n", NOON][1] == 9007199254740993
    assert {key[2] for key in minutes} == {"temp", "n"}
    assert len(await stored(pool, "telemetry_hours")) == 4
    await check(pool)


@pytest.mark.parametrize("seed", range(4))
async def test_late_data_deaths_and_rivals_leave_what_a_recount_gives(pool: Pool, seed: int) -> None:
    """Batches from a month, in any order; the roller dies at every step it has, and two run at once."""
    chance = random.Random(seed)
    sequence = 0

    def probe(step: str) -> None:
        if chance.random() < 0.3:
            raise Killed(step)

    async def add_until_dead() -> None:
        try:
            await RollupStore(pool, probe=probe).add()
        except Killed:
            died.append(1)

    died: list[int] = []
    for _ in range(25):
        batch = []
        for _ in range(chance.randrange(1, 40)):
            sequence += 1
            ts = NOON - timedelta(seconds=chance.choice((0, 0, 3600, 86_400, 30 * 86_400)) + chance.randrange(7200))
            value = chance.choice((chance.randrange(-50, 50), chance.random(), "text", True, None))
            metrics = {"a": value if value is not None else 0.1, f"m{chance.randrange(3)}": chance.random()}
            batch.append(row(sequence, ts, metrics, device=f"d{chance.randrange(3)}", tenant=f"t{chance.randrange(2)}"))
        await settle(pool, batch)
        if chance.random() < 0.6:
            await asyncio.gather(add_until_dead(), add_until_dead())
    await roll_up(pool)
    await check(pool)
    assert died
    assert await RollupStore(pool).pending() == 0


async def test_a_batch_delivered_again_is_added_once(pool: Pool) -> None:
    batch = [row(number, NOON, {"n": number}) for number in range(1, 50)]
    await settle(pool, batch[:30])
    await roll_up(pool)
    await settle(pool, batch)
    await roll_up(pool)
    await roll_up(pool)
    await check(pool)


async def test_merging_the_ledger_adds_nothing(pool: Pool) -> None:
    for number in range(1, 20):
        await settle(pool, [row(number, NOON, {"n": number})])
    await pool.execute("UPDATE ledger SET settled_at = now() - interval '1 hour'")
    await LedgerReader(pool).merge()
    await roll_up(pool)
    await check(pool)


async def test_what_was_settled_before_there_were_rollups_is_added(database: str) -> None:
    """The migration finds a ledger: all of it is pending, wherever its rows are."""
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available()[:6])
        for day in ("2026-11-20", "2026-11-23"):
            await connection.execute("SELECT ensure_telemetry_day($1::text::date)", day)
        await connection.execute(
            "INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position)"
            " SELECT '2026-11-20T23:59Z'::timestamptz + n * interval '12 h',"
            " 't1', 'd1', '{\"n\":1}', (1::bigint << 46) + n"
            " FROM generate_series(0, 6, 6) AS n"
        )
        await connection.execute(
            "INSERT INTO ledger (positions, telemetry_rows) VALUES (int8multirange(int8range($1, $2)), 2)",
            position(1, 1) - 1,
            position(1, 300_000),
        )
        await migrate(connection, available())
    async with open_pool(database, size_max=2, timeout_s=10, application_name="test") as pool:
        assert await RollupStore(pool).pending() == 3
        await roll_up(pool)
        await check(pool)
        assert len(await stored(pool, "telemetry_minutes")) == 2


RANGES = (
    (NOON - timedelta(days=2), NOON + timedelta(hours=1)),
    (NOON - timedelta(minutes=90, seconds=17), NOON - timedelta(seconds=3, microseconds=5)),
    (NOON - timedelta(minutes=90), NOON + timedelta(seconds=30)),
)


async def answers(pool: Pool, *, tenant_id: str = "t1") -> list[object]:
    await pool.execute(
        "INSERT INTO tenants (tenant_id) VALUES ('t1') ON CONFLICT DO NOTHING;"
        "INSERT INTO devices (tenant_id, device_id) VALUES ('t1', 'd1') ON CONFLICT DO NOTHING"
    )
    reader = TelemetryReader(Scoped(pool=pool, tenant_id=tenant_id), statement_s_max=10, presence_after=PRESENCE_AFTER)
    return [
        [
            (bucket.ts, {name: json.loads(bytes(value)) for name, value in bucket.metrics.items()})
            for bucket in await reader.buckets(
                "t1",
                "d1",
                BucketQuery(since=since, until=until, metrics=metrics, bucket_s=bucket_s, aggregate=aggregate),
            )
        ]
        for aggregate in Aggregate
        for bucket_s, metrics in ((7, None), (300, None), (60, ("a",)), (7200, None))
        for since, until in RANGES
    ]


async def test_a_question_has_the_same_answer_before_during_and_after_rolling_up(pool: Pool) -> None:
    """Rows alone, rollups alone, and some of both: 72 questions each."""
    chance = random.Random(1)
    rows = [
        row(
            number,
            NOON - timedelta(seconds=chance.randrange(2 * 86_400)) + timedelta(microseconds=chance.randrange(10**6)),
            {"a": chance.choice((chance.randrange(9), "text")), "b": chance.randrange(1000) / 8},
        )
        for number in range(1, 400)
    ]
    await settle(pool, rows[:300])
    from_rows = await answers(pool)
    await roll_up(pool)
    assert await answers(pool) == from_rows
    await settle(pool, rows[300:])
    some_of_both = await answers(pool)
    assert some_of_both != from_rows
    await roll_up(pool)
    assert await answers(pool) == some_of_both
    # The answers above did come from rollups: without any, the numbers are gone and the values of any type are there.
    await pool.execute("DELETE FROM telemetry_minutes")
    await pool.execute("DELETE FROM telemetry_hours")
    without = await answers(pool)
    assert without != some_of_both
    async with transaction(pool) as connection:
        await connection.execute("DELETE FROM storage_horizon WHERE series <> 'telemetry'")
        await connection.execute(
            "INSERT INTO storage_horizon SELECT unnest(ARRAY['telemetry_minutes', 'telemetry_hours']), '2030-01-01Z'"
        )
    assert await answers(pool) == some_of_both


async def test_a_tenant_sees_its_own_rollups_alone(pool: Pool) -> None:
    await settle(pool, [row(1, NOON, {"n": 1}), row(2, NOON, {"n": 1}, tenant="t2")])
    await roll_up(pool)
    for series in UNIT_S:
        async with transaction(Scoped(pool=pool, tenant_id="t1")) as connection:
            seen = await connection.fetch(f"SELECT tenant_id FROM {series}")  # noqa: S608
        assert [each["tenant_id"] for each in seen] == ["t1"]
