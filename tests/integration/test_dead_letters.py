"""Dead letters end to end on real servers: how they arise, replay, purge, and what a kill in between can do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from dead_letter_bench import Bench, bench, envelope, topology
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.origin import OriginStreams
from pulse.adapters.postgres.dead_letters import DeadLetterStore
from pulse.adapters.postgres.pool import Scoped
from pulse.domain.dead_letter import Filter, Replay
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.receipt import Receipt
from pulse.services.dead_letters import DeadLetters

GOOD = b'{"metrics":{"n":%d}}'
POISON = {
    b'{"test":1}': Reason.INVALID_ENVELOPE,
    b"\xff\xfe\x00": Reason.INVALID_ENVELOPE,
    b"": Reason.INVALID_ENVELOPE,
    envelope(tenant="t2"): Reason.INVALID_ENVELOPE,
    envelope(b'{"metrics":{"n":null}}'): Reason.INVALID_PAYLOAD,
    envelope(b'{"metrics":{"n":1},"ts":1}'): Reason.TIMESTAMP_OUT_OF_RANGE,
    envelope(device="cursed"): Reason.REFUSED_BY_DATABASE,
}


@pytest.fixture
async def system(nats: NatsServer, database: str) -> AsyncIterator[Bench]:
    async with bench(nats.url, database) as made:
        yield made


async def die(system: Bench, *bodies: bytes) -> list[int]:
    """Have these become dead letters; returns their ids."""
    before = len(await system.dead())
    await system.publish(*bodies)
    await system.ingest(lambda: dead_at_least(system, before + len(bodies)))
    return [letter["id"] for letter in await system.dead()][before:]


async def dead_at_least(system: Bench, count: int) -> bool:
    return len(await system.dead()) >= count


async def replay_all(letters: DeadLetters, wanted: Filter | None = None, **options: float) -> list[int | None]:
    """Replay what matches; returns the new sequences."""
    wanted = wanted or Filter(replayed=False)
    found = await letters.count(wanted)
    pages = [page async for page in letters.replay(wanted, last_id=found.last_id, **options)]
    return [one.sequence for page in pages for one in page]


async def test_of_5000_messages_with_7_poison_ones_4993_are_rows_in_one_pass_and_7_after_mending(
    system: Bench,
) -> None:
    await system.apply(topology(workers_ack_wait_s=30.0))  # a slow machine is no second pass
    await system.pool.execute("ALTER TABLE telemetry ADD CONSTRAINT curse CHECK (device_id <> 'cursed')")
    bodies = [envelope(GOOD % number) for number in range(4993)]
    chance = random.Random(7)
    for poison in POISON:
        bodies.insert(chance.randrange(len(bodies)), poison)
    stream = system.client.jetstream()
    for low in range(0, len(bodies), 500):
        await asyncio.gather(*(stream.publish("telemetry.t1", body) for body in bodies[low : low + 500]))
    await system.ingest(lambda: system.settled(5000))
    assert len(await system.stored()) == 4993
    died = await system.dead()
    assert {letter["body"]: letter["reason"] for letter in died} == {body: str(why) for body, why in POISON.items()}
    assert {letter["attempts"] for letter in died} == {1}

    await system.pool.execute("ALTER TABLE telemetry DROP CONSTRAINT curse")
    for letter in died:
        mended = None if letter["reason"] == Reason.REFUSED_BY_DATABASE else envelope(GOOD % letter["id"])
        await system.letters.replay_one(letter["id"], body=mended)
    await system.ingest(lambda: system.settled(5007))
    assert len(await system.stored()) == 5000
    audit = await system.audit()
    assert (audit.accepted, audit.stored, audit.dead, audit.in_flight, audit.expired) == (5007, 5000, 7, 0, 0)


async def test_a_replay_keeps_the_message_and_links_both(system: Bench) -> None:
    stream = system.client.jetstream()
    await stream.publish("telemetry.t1", b"bad", headers={"Nats-Msg-Id": "first", "Trace": "abc"})
    await system.ingest(lambda: dead_at_least(system, 1))
    (letter,) = await system.letters.page(Filter())
    assert await replay_all(system.letters) == [2]
    message = await stream.get_msg("TELEMETRY", 2)
    assert (message.subject, message.data) == ("telemetry.t1", b"bad")
    headers = message.headers or {}
    assert (headers["Trace"], headers["Pulse-Replay-Of"]) == ("abc", str(letter.id))
    assert headers["Nats-Msg-Id"] != "first"

    await system.ingest(lambda: dead_at_least(system, 2))
    again, first = await system.letters.page(Filter())
    assert (first.replays, first.replayed_sequence) == (1, 2)
    assert first.replayed_at is not None
    assert (again.replay_of, again.replays, again.sequence) == (first.id, 0, 2)
    assert (await system.letters.show(first.id)).died_again_as == (again.id,)


async def test_a_replay_whose_body_cannot_be_read_is_still_of_the_device_that_sent_it(system: Bench) -> None:
    (first,) = await die(system, envelope(b"{}"))
    await system.pool.execute("UPDATE dead_letters SET body = 'cut o', in_stream = false")
    assert (await system.letters.show(first)).summary.sequence is None
    await system.letters.replay_one(first)
    await system.ingest(lambda: dead_at_least(system, 2))
    again, _ = await system.letters.page(Filter(device_id="d1"))
    assert (again.reason, again.replay_of, again.tenant_id, again.device_id) == ("invalid_envelope", first, "t1", "d1")
    await system.pool.execute("UPDATE dead_letters SET tenant_id = 't2' WHERE id = $1", again.id)
    await system.letters.replay_one(again.id)
    await system.ingest(lambda: dead_at_least(system, 3))
    (newest, *_) = await system.letters.page(Filter())
    assert (newest.tenant_id, newest.device_id) == (None, None)


async def test_a_replay_that_was_cut_off_before_it_was_recorded_sends_nothing_twice(system: Bench) -> None:
    await die(system, *[b"%d" % number for number in range(5)])

    class CutOff(DeadLetterStore):
        async def record_replays(self, replays: object) -> None:
            raise Outage("postgresql", "cut off")

    cut = DeadLetters(store=CutOff(system.pool), publisher=OriginStreams(system.client))
    with pytest.raises(Outage):
        await replay_all(cut)
    assert (await system.audit()).accepted == 10
    assert await replay_all(system.letters) == [6, 7, 8, 9, 10]
    assert (await system.audit()).accepted == 10


async def test_two_that_replay_at_once_send_and_record_each_letter_once(system: Bench) -> None:
    await die(system, *[b"%d" % number for number in range(5)])
    wanted = Filter(replayed=False)
    last_id = (await system.letters.count(wanted)).last_id

    class Together(OriginStreams):
        async def publish(self, replay: Replay) -> Receipt:
            await both.wait()
            return await super().publish(replay)

    both = asyncio.Barrier(10)
    letters = DeadLetters(store=DeadLetterStore(system.pool), publisher=Together(system.client))

    async def one() -> None:
        async for _ in letters.replay(wanted, last_id=last_id):
            pass

    await asyncio.gather(one(), one())
    assert (await system.audit()).accepted == 10
    assert {letter.replays for letter in await system.letters.page(Filter())} == {1}


async def test_of_a_replay_that_meets_an_outage_what_was_sent_is_recorded_and_the_rest_can_be_repeated(
    system: Bench,
) -> None:
    ids = await die(system, *[b"%d" % number for number in range(4)])

    class HalfAway(OriginStreams):
        async def publish(self, replay: Replay) -> Receipt:
            if replay.letter_id in ids[2:]:
                raise Outage("nats", "away")
            return await super().publish(replay)

    away = DeadLetters(store=DeadLetterStore(system.pool), publisher=HalfAway(system.client))
    with pytest.raises(Outage):
        await replay_all(away)
    assert [letter.id for letter in await system.letters.page(Filter(replayed=True))] == ids[1::-1]
    assert len(await replay_all(system.letters)) == 2


async def test_a_cancelled_replay_records_what_it_has_sent(system: Bench) -> None:
    await die(system, b"bad")
    sent = asyncio.Event()

    class Slow(OriginStreams):
        async def publish(self, replay: Replay) -> Receipt:
            receipt = await super().publish(replay)
            sent.set()
            await asyncio.sleep(0.2)
            return receipt

    slow = DeadLetters(store=DeadLetterStore(system.pool), publisher=Slow(system.client))
    task = asyncio.create_task(replay_all(slow))
    await sent.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await system.letters.count(Filter(replayed=True))).count == 1


async def test_what_was_replayed_once_is_another_message_the_next_time(system: Bench) -> None:
    (letter_id,) = await die(system, b"bad")
    first = await system.letters.replay_one(letter_id)
    second = await system.letters.replay_one(letter_id)
    mended = await system.letters.replay_one(letter_id, body=envelope())
    assert (first.sequence, second.sequence, mended.sequence) == (2, 3, 4)
    assert (await system.letters.show(letter_id)).summary.replays == 3


async def test_a_mended_body_that_would_only_die_again_is_refused(system: Bench) -> None:
    (letter_id,) = await die(system, b"bad")
    with pytest.raises(Refusal, match="no whole message, envelope and payload"):
        await system.letters.replay_one(letter_id, body=b'{"metrics":{"t":5}}')
    assert (await system.letters.show(letter_id)).summary.replays == 0


async def test_a_replay_goes_into_its_own_stream_or_nowhere(system: Bench) -> None:
    (letter_id,) = await die(system, b"bad")
    await system.pool.execute("UPDATE dead_letters SET stream = 'SHADOW'")
    with pytest.raises(Refusal, match="SHADOW"):
        await system.letters.replay_one(letter_id)
    assert (await system.letters.show(letter_id)).summary.replays == 0
    with pytest.raises(Refusal):
        await system.letters.replay_one(letter_id + 1)


async def test_a_rate_is_kept(system: Bench) -> None:
    await die(system, *[b"%d" % number for number in range(6)])
    started = asyncio.get_running_loop().time()
    assert len(await replay_all(system.letters, rate_per_s=20.0)) == 6
    assert asyncio.get_running_loop().time() - started >= 4 / 20


async def test_pages_and_filters(system: Bench) -> None:
    now = datetime.now(UTC)
    ids = await die(system, b"1", envelope(b"{}"), envelope(b"{}", device="d2"), b"4")
    letters = system.letters
    assert [one.id for one in await letters.page(Filter(), limit=3)] == ids[:0:-1]
    assert [one.id for one in await letters.page(Filter(), before=ids[1], limit=3)] == ids[:1]
    for wanted, count in (
        (Filter(reason="invalid_payload"), 2),
        (Filter(tenant_id="t1"), 2),
        (Filter(tenant_id="t1", device_id="d2"), 1),
        (Filter(stream="TELEMETRY"), 4),
        (Filter(stream="ROUTES"), 0),
        (Filter(letter_id=ids[2]), 1),
        (Filter(since=now - timedelta(hours=1)), 4),
        (Filter(until=now - timedelta(hours=1)), 0),
        (Filter(replayed=True), 0),
    ):
        assert (await letters.count(wanted)).count == count == len(await letters.page(wanted)), wanted


async def test_a_purge_takes_what_matched_when_it_was_asked_for_and_no_more(system: Bench) -> None:
    kept = envelope(b"{}")
    await die(system, b"1", b"2", kept)
    wanted = Filter(reason="invalid_envelope")
    found = await system.letters.count(wanted)
    await die(system, b"5")
    assert [count async for count in system.letters.purge(wanted, last_id=found.last_id)] == [2]
    assert [letter["body"] for letter in await system.dead()] == [kept, b"5"]
    audit = await system.audit()
    assert (audit.dead, audit.expired) == (4, 0)


async def test_a_tenant_replays_and_purges_only_its_own(system: Bench) -> None:
    await system.publish(envelope(b"{}", tenant="t2"), subject="telemetry.t2")
    await die(system, envelope(b"{}"), b"nobody's")
    store = DeadLetterStore(Scoped(pool=system.pool, tenant_id="t2"))
    mine = DeadLetters(store=store, publisher=OriginStreams(system.client))
    (letter,) = await mine.page(Filter())
    assert letter.tenant_id == "t2"
    assert len(await replay_all(mine)) == 1
    found = await mine.count(Filter())
    assert [count async for count in mine.purge(Filter(), last_id=found.last_id + 100)] == [1]
    assert len(await system.dead()) == 2
