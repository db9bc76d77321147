"""The store settles each position once, whatever is delivered again, by however many at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime

import asyncpg
import pytest

from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.domain.envelope import wrap
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.ledger import PositionSet, position
from pulse.domain.settlement import Message, Row, Settlement, condemn, settle
from pulse.domain.subjects import MessageType
from pulse.domain.telemetry import Bounds, PayloadDecoder
from storage import ON_BOTH

pytestmark = ON_BOTH

NOW_MS = int(datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp() * 1000)
DECODER = PayloadDecoder(
    Bounds(
        metric_count_max=10,
        metric_name_length_max=64,
        metric_string_length_max=256,
        ts_past_s_max=400 * 86_400,
        ts_future_s_max=3600,
    )
)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=8, timeout_s=10, application_name="test") as pool:
        yield pool


@pytest.fixture
def store(pool: Pool) -> TelemetryStore:
    return TelemetryStore(pool, stream="TELEMETRY")


def message(sequence: int, payload: bytes = b"", *, body: bytes | None = None, device: str = "d1") -> Message:
    payload = payload or b'{"metrics":{"n":%d}}' % sequence
    if body is None:
        body = wrap(
            tenant_id="t1",
            device_id=device,
            message_type=MessageType.TELEMETRY,
            received_ms=NOW_MS,
            source="http",
            payload=payload,
        )
    return Message("telemetry.t1", body, b"", "$JS.ACK", sequence, NOW_MS * 1_000_000, 1)


def settlement(messages: Iterable[Message], epoch: int = 1) -> Settlement:
    return settle([(position(epoch, each.sequence), each) for each in messages], DECODER)


async def stored(pool: Pool) -> list[int]:
    rows = await pool.fetch("SELECT position & ((1::bigint << 46) - 1) AS seq FROM telemetry ORDER BY position")
    return [row["seq"] for row in rows]


async def test_a_batch_delivered_again_is_stored_once(pool: Pool, store: TelemetryStore) -> None:
    batch = settlement(message(seq) for seq in range(1, 101))
    assert not await store.settle(batch)
    assert await store.settle(batch) == batch.positions
    assert await stored(pool) == list(range(1, 101))


async def test_of_a_batch_that_overlaps_only_the_rest_is_stored(pool: Pool, store: TelemetryStore) -> None:
    await store.settle(settlement(message(seq) for seq in (1, 2, 3, 7)))
    already = await store.settle(settlement(message(seq) for seq in range(2, 10)))
    assert already == PositionSet.of(position(1, seq) for seq in (2, 3, 7))
    assert await stored(pool) == list(range(1, 10))


async def test_the_same_sequence_of_another_making_is_another_message(pool: Pool, store: TelemetryStore) -> None:
    await store.settle(settlement([message(1)], epoch=1))
    assert not await store.settle(settlement([message(1)], epoch=2))
    assert await stored(pool) == [1, 1]


@pytest.mark.parametrize("seed", range(5))
async def test_workers_that_race_on_the_same_messages_store_each_once(
    pool: Pool, store: TelemetryStore, seed: int
) -> None:
    chance = random.Random(seed)

    async def worker(number: int) -> None:
        for _ in range(20):
            low = chance.randrange(1, 300)
            wanted = [seq for seq in range(low, low + 60) if chance.random() < 0.8]
            await store.settle(settlement(message(seq, device=f"d{seq % 7}") for seq in wanted))
            settled.update(wanted)

    settled: set[int] = set()
    await asyncio.gather(*(worker(number) for number in range(6)))
    assert await stored(pool) == sorted(settled)
    reader = LedgerReader(pool)
    ledger = await reader.settled(1)
    assert ledger.positions == PositionSet.of(position(1, seq) for seq in settled)
    assert ledger.rows == len(settled)
    assert await reader.count_rows(1) == (len(settled), len(settled))


async def test_a_row_keeps_what_the_device_said(pool: Pool, store: TelemetryStore) -> None:
    said = (
        b'{"metrics":{"temp":-21.5,"on":true,"big":9007199254740993,"text":"a\\tb\\\\c\\n\\"\xc3\xa9\\u0001"},"seq":5,'
    )
    said += b'"ts":"2026-11-22T23:59:59.999999Z","site_id":"roof\\t\\\\N"}'
    await store.settle(settlement([message(1, said)]))
    row = await pool.fetchrow("SELECT *, metrics->>'text' AS text, metrics->>'big' AS big FROM telemetry")
    assert row is not None
    assert (row["tenant_id"], row["device_id"], row["seq"]) == ("t1", "d1", 5)
    assert row["site_id"] == "roof\t\\N"
    assert row["ts"] == datetime(2026, 11, 22, 23, 59, 59, 999_999, UTC)
    assert row["text"] == 'a\tb\\c\n"é\x01'
    assert row["big"] == "9007199254740993"


async def test_late_and_early_readings_find_a_partition_of_their_own_day(pool: Pool, store: TelemetryStore) -> None:
    days = [b'"2025-11-30T00:00:00Z"', b'"2026-02-28T23:59:59Z"', b'"2026-11-23T12:59:00Z"']
    await store.settle(
        settlement(message(seq, b'{"metrics":{"n":1},"ts":%b}' % ts) for seq, ts in enumerate(days, start=1))
    )
    rows = await pool.fetch("SELECT day FROM telemetry JOIN telemetry_days() ON relation = tableoid ORDER BY ts")
    assert [f"{row['day']}" for row in rows] == ["2025-11-30", "2026-02-28", "2026-11-23"]


async def test_a_partition_has_the_index_of_a_device_and_a_range(pool: Pool, store: TelemetryStore) -> None:
    await store.settle(settlement([message(1)]))
    definitions = await pool.fetch(
        "SELECT pg_get_indexdef(indexrelid) AS indexdef FROM telemetry_days() JOIN pg_index ON indrelid = relation"
    )
    assert any("(tenant_id, device_id, ts DESC)" in row["indexdef"] for row in definitions)


async def test_two_that_need_the_same_new_day_both_get_it(pool: Pool) -> None:
    stores = [TelemetryStore(pool, stream="TELEMETRY") for _ in range(6)]
    await asyncio.gather(*(each.settle(settlement([message(seq)])) for seq, each in enumerate(stores, start=1)))
    assert await stored(pool) == [1, 2, 3, 4, 5, 6]


async def test_a_partition_that_was_dropped_is_made_again(pool: Pool, store: TelemetryStore) -> None:
    await store.settle(settlement([message(1)]))
    await pool.execute("SELECT drop_telemetry_day(day, relation) FROM telemetry_days()")
    await store.settle(settlement([message(2)]))
    assert await stored(pool) == [2]


async def test_a_dead_letter_keeps_the_whole_message_and_settles_its_position(
    pool: Pool, store: TelemetryStore
) -> None:
    dead = Message("telemetry.t1", b'{"test":1}\0\xff', b"NATS/1.0\r\nA: b\r\n\r\n", "r", 2, NOW_MS * 1_000_000, 3)
    await store.settle(settlement([message(1), dead]))
    row = await pool.fetchrow("SELECT * FROM dead_letters")
    assert row is not None
    assert (row["stream"], row["subject"], row["reason"]) == ("TELEMETRY", "telemetry.t1", "invalid_envelope")
    assert (row["body"], row["headers"], row["attempts"]) == (dead.body, dead.headers, 3)
    assert row["position"] == position(1, 2)
    ledger = await LedgerReader(pool).settled(1)
    assert ledger.dead == PositionSet.of([position(1, 2)])
    assert len(ledger.positions) == 2


async def test_an_error_text_that_postgresql_cannot_hold_does_not_stop_a_dead_letter(
    pool: Pool, store: TelemetryStore
) -> None:
    letter = condemn(position(1, 1), message(1), Refusal(Reason.INVALID_PAYLOAD, "a\0b\ud800", field="x\0"))
    await store.settle(letter)
    assert await pool.fetchval("SELECT error FROM dead_letters") == "x\\x00: a\\x00b\\ud800"


async def test_what_the_database_can_never_take_is_a_refusal_and_leaves_nothing(
    pool: Pool, store: TelemetryStore
) -> None:
    good = settlement([message(1)])
    poison = Row(position(1, 2), NOW_MS * 1000, "t1", "d1", None, None, b"{not json")
    with pytest.raises(Refusal) as refused:
        await store.settle(Settlement([*good.rows, poison], [], []))
    assert refused.value.reason is Reason.REFUSED_BY_DATABASE
    assert await stored(pool) == []
    assert await pool.fetchval("SELECT count(*) FROM ledger") == 0


async def test_each_making_of_a_stream_has_one_number_whoever_asks(pool: Pool, store: TelemetryStore) -> None:
    first = set(await asyncio.gather(*(store.epoch(111) for _ in range(8))))
    second = set(await asyncio.gather(*(store.epoch(222) for _ in range(8))))
    other = await TelemetryStore(pool, stream="SHADOW").epoch(111)
    assert (first, second, other) == ({1}, {2}, 3)
    assert await store.epoch(111) == 1


async def test_old_ledger_rows_merge_and_still_refuse_what_they_settled(pool: Pool, store: TelemetryStore) -> None:
    for low in range(1, 200, 10):
        await store.settle(settlement(message(seq) for seq in range(low, low + 10)))
    await store.settle(settlement([message(1)], epoch=2))
    reader = LedgerReader(pool)
    before = await reader.settled(1)
    await pool.execute("UPDATE ledger SET settled_at = now() - interval '1 hour'")
    assert await reader.merge() == 21
    assert await pool.fetchval("SELECT count(*) FROM ledger") == 2
    assert await reader.settled(1) == before
    again = settlement(message(seq) for seq in range(50, 60))
    assert await store.settle(again) == again.positions
    assert await stored(pool) == [*range(1, 201), 1]


async def test_a_merge_while_workers_settle_loses_nothing(pool: Pool, store: TelemetryStore) -> None:
    reader = LedgerReader(pool)

    async def work(low: int) -> None:
        for start in range(low, low + 300, 10):
            batch = settlement(message(seq) for seq in range(start, start + 15))
            await store.settle(batch)

    async def merge() -> None:
        for _ in range(30):
            async with pool.acquire() as connection:
                await connection.execute("UPDATE ledger SET settled_at = now() - interval '1 hour'")
            await reader.merge()

    await asyncio.gather(work(1), work(150), merge())
    assert await stored(pool) == list(range(1, 455))


async def test_an_absent_database_is_an_outage(store: TelemetryStore, pool: Pool) -> None:
    await pool.close()
    with pytest.raises(Outage):
        await store.settle(settlement([message(1)]))


async def test_the_exclusion_alone_keeps_a_position_from_being_settled_twice(pool: Pool) -> None:
    insert = "INSERT INTO ledger (positions, telemetry_rows) VALUES ($1::text::int8multirange, 1)"
    await pool.execute(insert, "{[1,5),[9,12)}")
    with pytest.raises(asyncpg.ExclusionViolationError):
        await pool.execute(insert, "{[6,8),[11,13)}")
    await pool.execute(insert, "{[6,8),[12,13)}")
