"""The table of device states is a join: whoever writes what he knows, in whatever order, it ends in the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from pulse.adapters.postgres.device_state import write_states
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.domain.device_state import METRICS_MAX, Device, DeviceState, Word, Words, state_of
from pulse.domain.envelope import wrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.ledger import PositionSet, position
from pulse.domain.settlement import Message, Row, Settlement, SignOfLife, dead_letter
from pulse.domain.subjects import MessageType
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.runtime.metrics import IngestMetrics
from pulse.runtime.settings import Settings
from pulse.services.device_state import Answered
from pulse.services.ingest import TelemetrySettler, written_at_once

SELECT = """
    SELECT tenant_id, device_id, latest, (extract(epoch FROM last_seen) * 1000000)::bigint AS seen_us FROM device_state
"""
T0_US = 1_790_000_000_123_456
RECEIVED_MS = T0_US // 1000


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=8, timeout_s=10, application_name="test") as pool:
        yield pool


def row(at: int, *, seen_us: int, ts_us: int, device_id: str = "d", **metrics: object) -> Row:
    return Row(at, ts_us, "t", device_id, None, None, msgspec.json.encode(metrics), seen_us, tuple(metrics))


async def known(pool: Pool) -> dict[Device, DeviceState]:
    return {
        (record["tenant_id"], record["device_id"]): msgspec.convert(
            {"seen_us": record["seen_us"], "latest": msgspec.json.decode(record["latest"])}, DeviceState
        )
        for record in await pool.fetch(SELECT)
    }


def random_words(chance: random.Random, device_id: str) -> list[Row | SignOfLife]:
    """Some in order, some out of it; some with the same time; some with few metrics or none."""
    words: list[Row | SignOfLife] = []
    for number in range(1, 25):
        at = T0_US + (number if chance.random() < 0.6 else chance.randrange(30))
        names = chance.choice(["", "ab", "ab", "ab", "a", "bc", "abcd"])
        if not names:
            words.append(SignOfLife(number, "t", device_id, at))
            continue
        values = [chance.choice([number, number / 7, f"é\\\n{number}", number % 2 == 0]) for _ in names]
        ts_us = at - chance.choice([0, 0, 5])
        metrics = dict(zip(names, values, strict=True))
        words.append(row(number, seen_us=at, ts_us=ts_us, device_id=device_id, **metrics))
    return words


@pytest.mark.parametrize("seed", range(4))
async def test_any_order_any_batches_any_repetition_by_many_at_once_end_in_the_same(pool: Pool, seed: int) -> None:
    chance = random.Random(seed)
    words = {("t", f"d{number}"): random_words(chance, f"d{number}") for number in range(12)}

    async def writer(number: int) -> None:
        own = random.Random(f"{seed} {number}")
        heard: dict[Device, list[Word]] = {device: [*said] for device, said in words.items()}
        for said in heard.values():
            own.shuffle(said)
        for _ in range(8):
            devices = own.sample(sorted(heard), k=8)
            await write_states(
                pool, {each: state_of(own.choices(heard[each], k=own.randint(1, 4))) for each in devices}
            )
        for start in range(0, 24, 5):
            await write_states(pool, {each: state_of(said[start : start + 5]) for each, said in heard.items()})

    await asyncio.gather(*(writer(number) for number in range(5)))
    assert await known(pool) == {device: state_of(said) for device, said in words.items()}


async def test_nothing_moves_back(pool: Pool) -> None:
    async def write(*words: Word) -> DeviceState:
        await write_states(pool, {("t", "d"): state_of(words)})
        return (await known(pool))["t", "d"]

    now = row(5, seen_us=T0_US, ts_us=T0_US, a=1, b="x")
    state = await write(now)
    assert state == state_of([now])
    late = row(6, seen_us=T0_US + 1, ts_us=T0_US - 9_000_000, a=2, c=True)
    state = await write(late)
    assert state == state_of([now, late])
    assert await write(now) == state, "again"
    assert await write(SignOfLife(4, "t", "d", T0_US - 1)) == state
    assert (await write(SignOfLife(7, "t", "d", T0_US + 2))).seen_us == T0_US + 2


async def test_of_names_without_end_the_last_said_are_kept(pool: Pool) -> None:
    many: list[dict[str, Any]] = [{f"n{at}-{number}": number for number in range(200)} for at in range(1, 12)]
    words = [row(at, seen_us=T0_US + at, ts_us=T0_US + at, **said) for at, said in enumerate(many, start=1)]
    order = [*words[5:], *words[:5], *words]
    for word in order:
        await write_states(pool, {("t", "d"): state_of([word])})
    state = (await known(pool))["t", "d"]
    assert len(state.latest) == METRICS_MAX
    assert state == state_of(words)


async def test_a_name_that_fell_out_does_not_come_back_with_what_it_said_before(pool: Pool) -> None:
    old, newer = row(1, seen_us=1, ts_us=T0_US, a=1), row(2, seen_us=1, ts_us=T0_US + 1, a=2)
    others: dict[str, Any] = {f"n{number}": number for number in range(METRICS_MAX)}
    crowd = row(3, seen_us=1, ts_us=T0_US + 2, **others)
    for word in (newer, crowd, old):
        await write_states(pool, {("t", "d"): state_of([word])})
    assert (await known(pool))["t", "d"] == state_of([old, newer, crowd])


def rescue_settler(store: TelemetryStore) -> TelemetrySettler:
    """What the rescue settles telemetry with."""
    return TelemetrySettler(
        store=store,
        decoder=PayloadDecoder(msgspec.convert(Settings(), Bounds, from_attributes=True)),
        metrics=IngestMetrics(CollectorRegistry()),
        hear=written_at_once(store),
        probe=lambda _: None,
    )


BODY = wrap(
    tenant_id="t",
    device_id="d",
    message_type=MessageType.TELEMETRY,
    received_ms=RECEIVED_MS,
    source="http",
    payload=b'{"metrics":{"a":1}}',
)
MESSAGE = Message("telemetry.t", BODY, b"", "", 1, 0, 1)


async def test_what_the_rescue_settles_speaks_of_its_device_also_where_its_worker_had_settled_it(pool: Pool) -> None:
    """The worker died between the commit of the row and that of the state, three times."""
    said = row(position(1, 1), seen_us=RECEIVED_MS * 1000, ts_us=RECEIVED_MS * 1000, a=1)
    store = TelemetryStore(pool, stream="TELEMETRY")
    assert not await store.settle(Settlement([said], [], [], Words({("t", "d"): said}, [])))
    assert await known(pool) == {}
    await rescue_settler(store).settle(Answered(1, [MESSAGE]), [(said.position, MESSAGE)])
    assert await known(pool) == {("t", "d"): state_of([said])}


async def test_a_message_that_is_settled_as_dead_does_not_speak_when_it_comes_again(pool: Pool) -> None:
    said = row(position(1, 1), seen_us=T0_US, ts_us=T0_US, a=1)
    store = TelemetryStore(pool, stream="TELEMETRY")
    dead = Settlement([], [], [dead_letter(said.position, MESSAGE, Refusal(Reason.REFUSED_BY_DATABASE, "no"))])
    await store.settle(dead)
    assert await store.dead_among(PositionSet.of([said.position, position(1, 2)])) == dead.positions
    words = Words({("t", "d"): said}, [])
    assert words.without(dead.positions) == Words({}, [])
    await rescue_settler(store).settle(Answered(1, [MESSAGE]), [(said.position, MESSAGE)])
    assert await known(pool) == {}
