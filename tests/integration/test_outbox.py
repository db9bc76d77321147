"""From the outbox to DOWN: PostgreSQL and nats-server, with postmen between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from bridge_process import until
from gateway_process import prepared
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.committer import GroupCommitter
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.postgres import outbox as outbox_module
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.outbox import Outbox, put_into_outbox
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool, transaction
from pulse.domain.downward import Downward
from pulse.runtime.metrics import PostmanMetrics
from pulse.services.postman import AT_ONCE, Postman


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=8, timeout_s=10, application_name="test") as pool:
        yield pool


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[PulseClient]:
    async with prepared(nats) as made:
        yield made


@pytest.fixture
async def committer(client: PulseClient) -> AsyncIterator[GroupCommitter]:
    async with GroupCommitter(client, streams={"down": "DOWN"}, timeout_s=5.0) as made:
        yield made


@asynccontextmanager
async def posting(
    pool: Pool, committer: GroupCommitter, kind: str = "shadow", *, registry: CollectorRegistry | None = None
) -> AsyncIterator[Postman]:
    postman = Postman(
        kind=kind,
        outbox=Outbox(pool, kind),
        publisher=committer,
        metrics=PostmanMetrics(registry or CollectorRegistry(), kind=kind),
        retry_delay_s_min=0.02,
        retry_delay_s_max=0.1,
        probe=lambda _: None,
    )
    stop = asyncio.Event()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(postman.run(stop))
        yield postman
        stop.set()


async def put(pool: Pool, *said: Downward) -> None:
    async with transaction(pool) as connection:
        await put_into_outbox(connection, said)


def deltas(numbers: range, *, device_id: str = "d0") -> list[Downward]:
    return [Downward("acme", device_id, "shadow/update/delta", b"%d" % number) for number in numbers]


async def down(client: PulseClient) -> list[tuple[str, bytes]]:
    context = client.jetstream()
    state = (await context.stream_info("DOWN")).state
    found = []
    for sequence in range(max(1, state.first_seq), state.last_seq + 1):
        message = await context.get_msg("DOWN", sequence)
        found.append((message.subject or "", message.data or b""))
    return found


async def left(pool: Pool) -> int:
    return int(await pool.fetchval("SELECT count(*) FROM outbox"))


async def is_empty(pool: Pool) -> bool:
    return await left(pool) == 0


async def test_all_of_it_is_posted_once_and_in_its_order(
    pool: Pool, client: PulseClient, committer: GroupCommitter
) -> None:
    numbers = range(2 * AT_ONCE + 7)
    await put(pool, *deltas(numbers))
    registry = CollectorRegistry()
    async with posting(pool, committer, registry=registry):
        await until(lambda: is_empty(pool), "the outbox is empty")
        labels = {"kind": "shadow"}
        await until(lambda: registry.get_sample_value("pulse_outbox_oldest_seconds", labels) == 0, "nothing waits")
        posted = registry.get_sample_value("pulse_outbox_messages_total", labels | {"outcome": "posted"})
        assert posted == len(numbers)
    assert await down(client) == [("down.acme.d0.shadow.update.delta", b"%d" % number) for number in numbers]


async def test_two_postmen_of_one_kind_post_each_message_once_and_keep_each_devices_order(
    pool: Pool, client: PulseClient, committer: GroupCommitter
) -> None:
    async with posting(pool, committer), posting(pool, committer):
        for number in range(0, 300, 30):
            for device in range(5):
                await put(pool, *deltas(range(number, number + 30), device_id=f"d{device}"))
        await until(lambda: is_empty(pool), "the outbox is empty")
    found = await down(client)
    for device in range(5):
        assert [int(body) for subject, body in found if f".d{device}." in subject] == list(range(300))


async def test_a_postman_leaves_the_other_kind_alone(
    pool: Pool, client: PulseClient, committer: GroupCommitter
) -> None:
    await put(pool, Downward("acme", "d0", "commands", b"{}"), *deltas(range(3)))
    async with posting(pool, committer, "commands"):
        await until(lambda: left_is(pool, 3), "the commands are posted")
    assert await down(client) == [("down.acme.d0.commands", b"{}")]


async def left_is(pool: Pool, count: int) -> bool:
    return await left(pool) == count


async def test_what_is_told_is_posted_and_what_nobody_tells_of_too(
    pool: Pool, client: PulseClient, committer: GroupCommitter
) -> None:
    async with posting(pool, committer) as postman:
        await put(pool, *deltas(range(1)))
        postman.tell()
        await until(lambda: is_empty(pool), "it was told")
        await put(pool, *deltas(range(1, 2)))
        await until(lambda: is_empty(pool), "it looks by itself")
    assert len(await down(client)) == 2


async def test_an_outage_of_jetstream_keeps_it_in_the_outbox(
    pool: Pool, nats: NatsServer, client: PulseClient, committer: GroupCommitter
) -> None:
    registry = CollectorRegistry()
    async with posting(pool, committer, registry=registry):
        await asyncio.to_thread(nats.kill)
        await put(pool, *deltas(range(50)))
        waiting = {"kind": "shadow", "system": "nats"}
        await until(lambda: registry.get_sample_value("pulse_outbox_waiting", waiting) == 1, "it waits")
        await until(
            lambda: bool(registry.get_sample_value("pulse_outbox_oldest_seconds", {"kind": "shadow"})), "so does it"
        )
        assert await left(pool) == 50
        await asyncio.to_thread(nats.start)
        await until(lambda: is_empty(pool), "the outbox is empty")
        await until(lambda: registry.get_sample_value("pulse_outbox_waiting", waiting) == 0, "it waits no more")
    assert [int(body) for _, body in await down(client)] == list(range(50))


async def test_what_is_put_by_a_transaction_that_fails_is_never_said(
    pool: Pool, client: PulseClient, committer: GroupCommitter
) -> None:
    async def fail() -> None:
        async with transaction(pool) as connection:
            await put_into_outbox(connection, deltas(range(3)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    await put(pool, *deltas(range(5, 6)))
    async with posting(pool, committer):
        await until(lambda: is_empty(pool), "the outbox is empty")
    assert [body for _, body in await down(client)] == [b"5"]


async def test_what_appears_behind_what_was_posted_already_is_posted_too(
    pool: Pool, client: PulseClient, committer: GroupCommitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its transaction began before the other one, and committed after it."""
    monkeypatch.setattr(outbox_module, "BEHIND", 0)
    monkeypatch.setattr(outbox_module, "FROM_FIRST_S", 0.5)
    async with posting(pool, committer):
        async with transaction(pool) as slow:
            await put_into_outbox(slow, deltas(range(3), device_id="d1"))
            await put(pool, *deltas(range(5)))
            await until(lambda: is_empty(pool), "the other one's are posted")
        await until(lambda: is_empty(pool), "its own are posted")
    found = await down(client)
    assert [body for subject, body in found if ".d1." in subject] == [b"0", b"1", b"2"]
    assert len(found) == 8


async def test_a_look_does_not_step_over_all_that_was_deleted(pool: Pool) -> None:
    """Nothing can be vacuumed while a transaction of before lasts."""
    outbox = Outbox(pool, "shadow")
    await outbox.oldest(1)
    async with pool.acquire() as long, long.transaction(isolation="repeatable_read"):
        await long.fetchval("SELECT count(*) FROM outbox")
        for _ in range(12):
            await put(pool, *deltas(range(1000)))
            await outbox.delete([number for number, *_ in await outbox.oldest(1000)])
        first, last = await _pages_read(pool, after=0), await _pages_read(pool, after=outbox._after)
        assert await outbox.oldest(1) == []
    assert outbox._after > 0
    assert last < first


async def _pages_read(pool: Pool, *, after: int) -> int:
    statement = outbox_module.SELECT_OLDEST.replace("$1", "'shadow'").replace("$2", str(after)).replace("$3", "500")
    (plan,) = msgspec.json.decode(await pool.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"))
    return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


async def test_what_nats_cannot_carry_is_counted_and_holds_nobody_up(
    pool: Pool, client: PulseClient, committer: GroupCommitter
) -> None:
    registry = CollectorRegistry()
    large = Downward("acme", "d0", "shadow/get/accepted", b"x" * 2_000_000)
    await put(pool, *deltas(range(1)), large, *deltas(range(1, 2)))
    async with posting(pool, committer, registry=registry):
        await until(lambda: is_empty(pool), "the outbox is empty")
    labels = {"kind": "shadow", "outcome": "refused"}
    assert registry.get_sample_value("pulse_outbox_messages_total", labels) == 1
    assert [body for _, body in await down(client)] == [b"0", b"1"]
