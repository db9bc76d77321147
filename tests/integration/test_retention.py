"""Retention drops whole days that have had their time, counts what it drops, and stands in nobody's way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta

import pytest

from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool, transaction
from pulse.adapters.postgres.retention import RetentionStore
from pulse.adapters.postgres.rollups import STORAGE_LOCK_KEY, RollupStore
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.adapters.postgres.telemetry_query import TelemetryReader
from pulse.domain.ledger import position
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.query import Aggregate, BucketQuery
from pulse.domain.rollup import Series
from pulse.domain.settlement import Row, Settlement
from pulse.services.retention import Retention
from storage import ON_BOTH

pytestmark = ON_BOTH

TODAY = datetime(2026, 11, 23, 12, tzinfo=UTC)
OLD = date(2026, 11, 10)


class Killed(BaseException):
    """What a test raises in place of a death: nothing may catch it."""


class Counts:
    """What was dropped, by series."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.bytes = 0

    def dropped(self, series: str, rows: int, size_bytes: int) -> None:
        self.rows[series] = self.rows.get(series, 0) + rows
        self.bytes += size_bytes


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=8, timeout_s=10, application_name="test") as pool:
        yield pool


async def settle(pool: Pool, sequence: int, ts: datetime, *, count: int = 1, epoch: int = 1) -> None:
    ts_us = (ts - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    rows = [
        Row(position(epoch, each), ts_us, "t1", "d1", each, None, b'{"n":%d}' % each)
        for each in range(sequence, sequence + count)
    ]
    await TelemetryStore(pool, stream="TELEMETRY").settle(Settlement(rows=rows, signs_of_life=[], dead_letters=[]))


async def settle_days(pool: Pool, *, count: int = 20) -> None:
    """A day each, `count` days up to TODAY, ten rows a day, and in the rollups."""
    for back in range(count):
        await settle(pool, 1 + back * 10, TODAY - timedelta(days=back), count=10)
    await roll_up(pool)


async def roll_up(pool: Pool) -> None:
    while await RollupStore(pool).add():
        pass


def retention(
    store: RetentionStore, counts: Counts, *, telemetry: int = 10, minutes: int = 0, hours: int = 0
) -> Retention:
    return Retention(
        store=store,
        metrics=counts,
        days={Series.ROWS: telemetry, Series.MINUTES: minutes, Series.HOURS: hours},
        dead_letter_days=7,
        command_days=0,
        now=lambda: TODAY,
    )


async def days(pool: Pool) -> list[date]:
    return [row["day"] for row in await pool.fetch("SELECT day FROM telemetry_days() ORDER BY day")]


async def test_days_that_have_had_their_time_are_dropped_and_counted(pool: Pool) -> None:
    await settle_days(pool)
    counts = Counts()
    await retention(RetentionStore(pool), counts).run_once()
    assert (await days(pool))[0] == date(2026, 11, 13)
    assert counts.rows == {"telemetry": 90}
    assert counts.bytes > 9 * 8192
    assert await pool.fetchval("SELECT count(*) FROM telemetry") == 110
    await retention(RetentionStore(pool), counts).run_once()
    assert counts.rows == {"telemetry": 90}


async def test_the_audit_counts_what_was_dropped(pool: Pool) -> None:
    """Of each making of the stream, rows in the table and rows dropped together are what the ledger has."""
    await settle_days(pool)
    await settle(pool, 1, TODAY - timedelta(days=15), count=3, epoch=2)
    await roll_up(pool)
    reader = LedgerReader(pool)
    counts = Counts()
    await retention(RetentionStore(pool), counts).run_once()
    assert counts.rows == {"telemetry": 93}
    for epoch, rows in ((1, 200), (2, 3)):
        assert await reader.count_rows(epoch) == (rows, rows)
        assert (await reader.settled(epoch)).rows == rows


async def test_a_death_between_taking_out_and_dropping_is_made_good(pool: Pool) -> None:
    await settle_days(pool)

    def die_at(fatal: str) -> RetentionStore:
        def probe(step: str) -> None:
            if step == fatal:
                raise Killed

        return RetentionStore(pool, probe=probe)

    counts = Counts()
    reader = LedgerReader(pool)
    for step in ("retention.taken_out", "retention.dropped"):
        with pytest.raises(Killed):
            await retention(die_at(step), counts).run_once()
        assert await reader.count_rows(1) == (200, 200)
    await retention(RetentionStore(pool), counts).run_once()
    assert await reader.count_rows(1) == (200, 200)
    assert (await days(pool))[0] == date(2026, 11, 13)
    assert await pool.fetchval("SELECT count(*) FROM telemetry_retired") == 0


async def test_a_day_that_somebody_writes_to_is_kept_and_nobody_waits_for_long(pool: Pool) -> None:
    """A late batch holds the day; retention gives up, ingest of today goes on, and the next turn drops the day."""
    await settle_days(pool)
    counts = Counts()
    async with transaction(pool) as writer:
        await writer.execute(
            "INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position) VALUES ($1, 't1', 'd1', '{}', 1)",
            TODAY - timedelta(days=13),
        )
        busy = asyncio.create_task(retention(RetentionStore(pool), counts).run_once())
        await settle(pool, 1000, TODAY)
        await busy
        assert OLD in await days(pool)
    await retention(RetentionStore(pool), counts).run_once()
    assert counts.rows == {"telemetry": 91}
    assert (await days(pool))[0] == date(2026, 11, 13)


async def test_a_late_row_of_a_dropped_day_is_stored_rolled_up_and_dropped_in_its_turn(pool: Pool) -> None:
    await settle_days(pool)
    counts = Counts()
    await retention(RetentionStore(pool), counts).run_once()
    await settle(pool, 1000, TODAY - timedelta(days=13))
    assert OLD in await days(pool)
    # Not before the rollups have it.
    await retention(RetentionStore(pool), counts).run_once()
    assert OLD in await days(pool)
    await roll_up(pool)
    await retention(RetentionStore(pool), counts).run_once()
    assert OLD not in await days(pool)
    hour = await pool.fetchrow("SELECT count, last FROM telemetry_hours WHERE bucket = $1", TODAY - timedelta(days=13))
    assert hour is not None
    assert tuple(hour) == (11, 1000)
    assert await LedgerReader(pool).count_rows(1) == (201, 201)


async def test_writers_of_late_data_and_two_retentions_at_once_lose_nothing(pool: Pool) -> None:
    await settle_days(pool)
    counts = Counts()
    done = asyncio.Event()

    async def write() -> None:
        for number in range(60):
            await settle(pool, 1000 + number, TODAY - timedelta(days=number % 20))
        done.set()

    async def drop() -> None:
        while not done.is_set():
            await RollupStore(pool).add()
            await retention(RetentionStore(pool), counts).run_once()

    await asyncio.gather(write(), drop(), drop())
    await roll_up(pool)
    await retention(RetentionStore(pool), counts).run_once()
    assert await LedgerReader(pool).count_rows(1) == (260, 260)
    assert counts.rows["telemetry"] + await pool.fetchval("SELECT count(*) FROM telemetry") == 260
    assert await pool.fetchval("SELECT sum(count) FROM telemetry_hours") == 260


async def test_rollups_outlive_their_rows_and_go_in_their_own_time(pool: Pool) -> None:
    await settle_days(pool)
    counts = Counts()
    await retention(RetentionStore(pool), counts, minutes=5).run_once()
    assert counts.rows == {"telemetry": 90, "telemetry_minutes": 14}
    await pool.execute("INSERT INTO tenants (tenant_id) VALUES ('t1')")
    await pool.execute("INSERT INTO devices (tenant_id, device_id) VALUES ('t1', 'd1')")

    async def ask(aggregate: Aggregate, bucket_s: int) -> list[tuple[date, object]]:
        query = BucketQuery(
            since=TODAY - timedelta(days=30), until=TODAY, metrics=None, bucket_s=bucket_s, aggregate=aggregate
        )
        found = await TelemetryReader(pool, statement_s_max=10, presence_after=PRESENCE_AFTER).buckets(
            "t1", "d1", query
        )
        return [(bucket.ts.date(), json.loads(bytes(bucket.metrics["n"]))) for bucket in found]

    counted = await ask(Aggregate.COUNT, 3600)
    assert [count for _, count in counted] == [10] * 19
    assert [value for _, value in await ask(Aggregate.LAST, 3600)] == [1 + back * 10 + 9 for back in range(19, 0, -1)]
    # A minute of a day whose minutes and rows are gone is gone; one whose rows are there is not.
    assert [day for day, _ in await ask(Aggregate.AVG, 60)] == [day for day, _ in counted if day >= date(2026, 11, 13)]
    # Late data is added to what is kept, and makes no minutes of a day that has none any more.
    await settle(pool, 1000, TODAY - timedelta(days=13))
    await roll_up(pool)
    assert await pool.fetchval("SELECT min(bucket) FROM telemetry_minutes") == TODAY - timedelta(days=5)
    await retention(RetentionStore(pool), counts, hours=22).run_once()
    assert "telemetry_hours" not in counts.rows
    later = Retention(
        store=RetentionStore(pool), metrics=counts, days={Series.HOURS: 30}, dead_letter_days=0, command_days=0,
        now=lambda: TODAY + timedelta(days=60),
    )  # fmt: skip
    await later.run_once()
    assert counts.rows["telemetry_hours"] == 20


async def test_zero_days_are_for_ever(pool: Pool) -> None:
    await settle_days(pool, count=3)
    counts = Counts()
    for_ever = Retention(
        store=RetentionStore(pool), metrics=counts, days=dict.fromkeys(Series, 0), dead_letter_days=0, command_days=0,
        now=lambda: TODAY + timedelta(days=20_000),
    )  # fmt: skip
    await for_ever.run_once()
    assert counts.rows == {}


async def test_dead_letters_that_have_had_their_time_go_and_the_ledger_keeps_their_positions(pool: Pool) -> None:
    await pool.execute("INSERT INTO ledger (positions, dead, telemetry_rows) VALUES ('{[1,4)}', '{[1,4)}', 0)")
    await pool.execute(
        "INSERT INTO dead_letters"
        " (stream, position, subject, reason, error, headers, body, attempts, published_at, died_at)"
        " SELECT 'T', n, 's', 'r', 'e', '', 'body', 1, now(), $1::timestamptz - n * interval '5 days'"
        " FROM generate_series(1, 3) AS n",
        TODAY,
    )
    counts = Counts()
    await retention(RetentionStore(pool), counts).run_once()
    assert counts.rows == {"dead_letters": 2}
    assert counts.bytes == 8
    assert len((await LedgerReader(pool).settled(0)).dead) == 3


async def test_of_two_at_once_one_drops_and_the_other_leaves_it_alone(pool: Pool) -> None:
    await settle_days(pool)
    store = RetentionStore(pool)
    expired = await store.expired(Series.ROWS, date(2026, 11, 13))
    async with transaction(pool) as connection:
        await connection.execute("SELECT pg_advisory_xact_lock($1)", STORAGE_LOCK_KEY)
        assert await store.drop(expired[0]) is None
        assert await RollupStore(pool).add() == 0
    assert len(await days(pool)) == 20
    async with asyncio.timeout(60):
        while await store.expired(Series.ROWS, date(2026, 11, 13)):
            await asyncio.gather(*(store.drop(each) for each in expired for _ in range(2)))
    async with asyncio.timeout(60):
        while await pool.fetchval("SELECT count(*) FROM telemetry_retired"):
            await asyncio.gather(store.drop_retired(), store.drop_retired())
    assert await LedgerReader(pool).count_rows(1) == (200, 200)
    assert await pool.fetchval("SELECT sum(rows) FROM telemetry_dropped") == 90
