"""The pull consumer against a real nats-server: what it hands over, when, and what its three answers do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats import consumer as module
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.consumer import Fetched, PullConsumer
from pulse.adapters.nats.jetstream import ConsumerAnswer, request
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.streams import stream_state
from pulse.domain.errors import Outage
from pulse.topology.declared import Declared, DeclaredConsumer, load

STREAM, CONSUMER = "TELEMETRY", "ingest-workers"
SUBJECT = "telemetry.t1"
LINGER_S = 0.05
LONG_LINGER_S = 2.0
"""Of a consumer that is cut off in the middle of its lingering."""
LIMIT_S = 30.0

Open = Callable[..., Awaitable[PullConsumer]]


def topology(*, ack_wait_s: float = 30.0) -> Declared:
    shipped = load()
    (stream,) = (each for each in shipped.streams if each.name == STREAM)
    (config,) = (each.config for each in shipped.consumers if each.config.name == CONSUMER)
    config = msgspec.structs.replace(config, ack_wait=int(ack_wait_s * 1e9))
    return Declared(streams=(stream,), consumers=(DeclaredConsumer(stream=STREAM, config=config),))


async def apply(client: PulseClient, declared: Declared) -> None:
    provisioner = Provisioner(client)
    await provisioner.apply(declared, await provisioner.plan(declared))


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[PulseClient]:
    async with connection(nats.url, name="test") as client:
        await apply(client, topology())
        yield client


def consumer_on(client: PulseClient, *, linger_s: float = LINGER_S, **options: int) -> PullConsumer:
    async def created_ns() -> int:
        return (await stream_state(client, STREAM)).created_ns

    bounds = {"batch_max": 100, "batch_bytes_max": 1 << 20} | options
    return PullConsumer(client, stream=STREAM, consumer=CONSUMER, created_ns=created_ns, linger_s=linger_s, **bounds)


@pytest.fixture
async def open_consumer(client: PulseClient) -> AsyncIterator[Open]:
    """Makes pull consumers; on the test's connection where none is given."""
    async with AsyncExitStack() as stack:

        async def make(on: PulseClient = client, **options: Any) -> PullConsumer:
            return await stack.enter_async_context(consumer_on(on, **options))

        yield make


async def publish(client: PulseClient, *bodies: bytes, **headers: str) -> None:
    for body in bodies:
        await client.jetstream().publish(SUBJECT, body, headers=headers or None)


async def next_batch(source: PullConsumer) -> Fetched:
    """The next batch, outages waited out."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                batch = await source.fetch()
            except Outage:
                await asyncio.sleep(0.05)
                continue
            if batch is not None:
                return batch


async def take(source: PullConsumer, count: int) -> list[Fetched]:
    """Batches of so many messages in all."""
    batches: list[Fetched] = []
    while sum(len(batch.messages) for batch in batches) < count:
        batches.append(await next_batch(source))
    assert sum(len(batch.messages) for batch in batches) == count
    return batches


async def state(client: PulseClient) -> ConsumerAnswer:
    return await request(client, f"CONSUMER.INFO.{STREAM}.{CONSUMER}", {}, ConsumerAnswer, doing="ask")


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.02)


async def test_a_lone_message_comes_whole_without_waiting_for_company(client: PulseClient, open_consumer: Open) -> None:
    source = await open_consumer()
    await publish(client, b"one", **{"Nats-Msg-Id": "a", "X-Tag": "é"})
    batch = await next_batch(source)
    (message,) = batch.messages
    assert (message.subject, message.body, message.sequence, message.attempts) == (SUBJECT, b"one", 1, 1)
    assert message.headers.startswith(b"NATS/1.0\r\n")
    assert b"Nats-Msg-Id: a\r\n" in message.headers
    assert message.headers.endswith(b"\r\n\r\n")
    stream = await stream_state(client, STREAM)
    assert batch.created_ns == stream.created_ns
    assert message.published_ns == stream.last_ts_ns


async def test_nothing_is_none(open_consumer: Open) -> None:
    assert await (await open_consumer()).fetch() is None


async def test_a_batch_is_bounded_by_its_count(client: PulseClient, open_consumer: Open) -> None:
    await publish(client, *(b"%d" % number for number in range(25)))
    source = await open_consumer(batch_max=10)
    batches = await take(source, 25)
    assert max(len(batch.messages) for batch in batches) == 10
    assert [message.sequence for batch in batches for message in batch.messages] == list(range(1, 26))


async def test_a_batch_is_bounded_by_its_bytes_and_a_full_pull_is_no_outage(
    client: PulseClient, open_consumer: Open
) -> None:
    """NATS ends a pull whose `max_bytes` are full with the status 409, which is also that of a deleted consumer."""
    body = bytes(100_000)
    await publish(client, *(body for _ in range(30)))
    source = await open_consumer(batch_bytes_max=250_000)
    sizes: list[int] = []
    async with asyncio.timeout(LIMIT_S):
        while sum(sizes) < 30:
            batch = await source.fetch()
            assert batch is not None
            sizes.append(len(batch.messages))
            await source.ack(batch)
    assert max(sizes) == 3, "the message that reaches the bound is the last"


async def test_a_message_larger_than_the_bound_comes_alone_and_blocks_nobody(
    client: PulseClient, open_consumer: Open
) -> None:
    large = bytes(client.max_payload - 100)
    await publish(client, b"before", large, b"behind")
    source = await open_consumer(batch_bytes_max=1000)
    batches = await take(source, 3)
    assert [message.body for batch in batches for message in batch.messages] == [b"before", large, b"behind"]
    assert len(batches[-1].messages) == 1


async def test_what_is_acked_is_done(client: PulseClient, open_consumer: Open) -> None:
    await publish(client, b"1", b"2", b"3")
    source = await open_consumer()
    for batch in await take(source, 3):
        await source.ack(batch)

    async def done() -> bool:
        return (await state(client)).num_ack_pending == 0

    await until(done)
    assert (await state(client)).ack_floor.stream_seq == 3


async def test_what_is_not_acked_comes_again_and_counts(client: PulseClient, open_consumer: Open) -> None:
    await apply(client, topology(ack_wait_s=0.5))
    await publish(client, b"1")
    source = await open_consumer()
    attempts = [(await next_batch(source)).messages[0].attempts for _ in range(3)]
    assert attempts == [1, 2, 3]


async def test_what_is_kept_alive_does_not_come_again(client: PulseClient, open_consumer: Open) -> None:
    await apply(client, topology(ack_wait_s=3.0))
    await publish(client, b"1")
    source = await open_consumer()
    batch = await next_batch(source)
    for _ in range(16):
        await asyncio.sleep(0.25)
        await source.keep_alive(batch.messages)
    assert (await state(client)).delivered.consumer_seq == 1


async def test_what_has_gathered_here_is_kept_alive_with_the_rest(client: PulseClient, open_consumer: Open) -> None:
    await apply(client, topology(ack_wait_s=3.0))
    await publish(client, *(b"%d" % number for number in range(15)))
    source = await open_consumer(batch_max=10, linger_s=LONG_LINGER_S)
    first = await next_batch(source)

    await until(lambda: _delivered(client, source, 15))
    for _ in range(16):
        await asyncio.sleep(0.25)
        await source.keep_alive(first.messages)
    (second,) = await take(source, 5)
    assert {message.attempts for message in second.messages} == {1}
    assert (await state(client)).delivered.consumer_seq == 15


async def test_what_is_given_back_comes_again_at_once_to_others_and_not_to_the_giver(
    client: PulseClient, open_consumer: Open
) -> None:
    """The giver has asked for more before: each message that came back to it would have spent an attempt."""
    await publish(client, b"1", b"2")
    source = await open_consumer()
    for batch in await take(source, 2):
        await source.give_back(batch)
    assert await source.fetch() is None
    again = await take(await open_consumer(), 2)
    assert {message.attempts for batch in again for message in batch.messages} == {2}


async def test_leaving_gives_back_what_was_never_fetched(client: PulseClient, open_consumer: Open) -> None:
    await publish(client, *(b"%d" % number for number in range(10)))
    async with consumer_on(client, linger_s=LONG_LINGER_S) as leaving:
        await until(lambda: _delivered(client, leaving, 10))
    again = await take(await open_consumer(), 10)
    assert {message.attempts for batch in again for message in batch.messages} == {2}


async def _delivered(client: PulseClient, source: PullConsumer, count: int) -> bool:
    """Whether so many are in its hands; it is asked to fetch, and cut off in the middle of that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            assert await source.fetch() is None
    return (await state(client)).num_ack_pending == count


async def test_two_consumers_share(nats: NatsServer, client: PulseClient, open_consumer: Open) -> None:
    async with connection(nats.url, name="other") as second:
        sources = [await open_consumer(batch_max=10), await open_consumer(second, batch_max=10)]
        got: list[list[int]] = [[], []]

        async def work(number: int) -> None:
            while sum(map(len, got)) < 400:
                batch = await sources[number].fetch()
                if batch is not None:
                    await sources[number].ack(batch)
                    got[number].extend(message.sequence for message in batch.messages)

        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(work(0), work(1), publish(client, *(b"%d" % number for number in range(400))))
    assert all(got), "one of them got nothing"
    assert sorted(got[0] + got[1]) == list(range(1, 401))


async def test_a_restart_of_the_server_in_the_middle_of_a_pull_is_recovered_from_at_once(
    nats: NatsServer, client: PulseClient, open_consumer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pull request dies with the server; the reconnect tells, long before the heartbeats are missed."""
    monkeypatch.setattr(module, "SILENCE_S_MAX", 10 * LIMIT_S)
    source = await open_consumer()
    assert await source.fetch() is None
    for number in range(3):
        nats.kill()
        await asyncio.to_thread(nats.start)
        await until(lambda: _connected(client))
        await publish(client, b"%d" % number)
        assert [message.body for message in (await next_batch(source)).messages] == [b"%d" % number]


async def _connected(client: PulseClient) -> bool:
    return client.is_connected


async def test_a_pull_that_nothing_is_heard_of_is_given_up(
    client: PulseClient, open_consumer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_S_MAX", 0.5)
    monkeypatch.setattr(module, "POLL_S", 0.2)
    source = await open_consumer()
    real = source._next_subject
    source._next_subject = "$JS.API.CONSUMER.MSG.NEXT.nowhere.at-all"
    subscription = await client.subscribe(source._next_subject)  # somebody listens and never answers
    assert await source.fetch() is None
    source._next_subject = real
    await publish(client, b"1")
    assert len((await next_batch(source)).messages) == 1
    await subscription.unsubscribe()


async def test_without_a_server_it_is_an_outage(nats: NatsServer, client: PulseClient, open_consumer: Open) -> None:
    source = await open_consumer()
    await publish(client, b"1")
    batch = await next_batch(source)
    nats.kill()

    async def gone() -> bool:
        return not client.is_connected

    await until(gone)
    for call in (source.fetch(), source.ack(batch), source.keep_alive(batch.messages), source.give_back(batch)):
        with pytest.raises(Outage):
            await call
    await asyncio.to_thread(nats.start)
    await until(lambda: _connected(client))
    await source.ack(batch)


async def test_a_consumer_that_was_deleted_is_an_outage_until_it_is_there_again(
    client: PulseClient, open_consumer: Open
) -> None:
    source = await open_consumer()
    assert await source.fetch() is None
    await client.jetstream().delete_consumer(STREAM, CONSUMER)
    with pytest.raises(Outage, match="Consumer Deleted"):
        await until(lambda: _fetched(source))
    with pytest.raises(Outage, match="503"):
        await until(lambda: _fetched(source))
    await apply(client, topology())
    await publish(client, b"1")
    assert len((await next_batch(source)).messages) == 1


async def _fetched(source: PullConsumer) -> bool:
    return await source.fetch() is not None


async def test_of_a_stream_that_was_made_anew_all_comes_under_its_own_time_of_making(
    client: PulseClient, open_consumer: Open
) -> None:
    source = await open_consumer()
    await publish(client, b"old 1", b"old 2")
    before = await take(source, 2)
    await client.jetstream().delete_stream(STREAM)
    # What the consumer had asked of the old stream, and leaves to be redelivered, is to come within the limit.
    await apply(client, topology(ack_wait_s=5.0))
    await publish(client, b"new 1", b"new 2")
    after = await take(source, 2)
    assert {batch.created_ns for batch in after} == {(await stream_state(client, STREAM)).created_ns}
    assert {batch.created_ns for batch in before}.isdisjoint({batch.created_ns for batch in after})
    assert sorted(message.body for batch in after for message in batch.messages) == [b"new 1", b"new 2"]


async def test_an_answer_to_a_message_of_a_former_making_does_not_settle_its_namesake(
    client: PulseClient, open_consumer: Open
) -> None:
    """An ack names a sequence, and the new stream counts from 1 as well."""
    source = await open_consumer()
    await publish(client, b"old")
    former = await next_batch(source)
    await client.jetstream().delete_stream(STREAM)
    await apply(client, topology())
    await publish(client, b"new")
    other = await open_consumer()
    assert (await next_batch(other)).messages[0].sequence == former.messages[0].sequence
    await source.ack(former)
    await client.flush()
    assert (await state(client)).num_ack_pending == 1
