"""The rescue against real servers: a message that nobody could settle ends as a row or as a dead letter, once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from dead_letter_bench import Bench, Crash, bench, crash_at, envelope, topology
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.process import ManagedProcess
from pulse.adapters.nats.single_consumer import SingleConsumer
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.dead_letters import RescueStore
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.domain.dead_letter import Condemned
from pulse.domain.envelope import wrap
from pulse.domain.errors import Outage, Reason
from pulse.domain.shadow import ShadowKey
from pulse.domain.subjects import MessageType
from pulse.services.rescue import TRIES_MAX

JOB = b'{"route":7}'


@pytest.fixture
async def system(nats: NatsServer, database: str) -> AsyncIterator[Bench]:
    async with bench(nats.url, database) as made:
        yield made


async def test_a_message_that_ran_out_of_deliveries_is_stored_where_nothing_is_wrong_with_it(system: Bench) -> None:
    """Outages are not failures: its workers died, or were restarted, for reasons that are not its own."""
    await system.publish(envelope(), envelope())
    await system.exhaust(count=2)
    counted = await system.rescue()
    assert await system.stored() == [1, 2]
    assert await system.dead() == []
    assert counted.outcomes == {"stored": 2}
    audit = await system.audit()
    assert (audit.stored, audit.dead, audit.in_flight, audit.expired) == (2, 0, 0, 0)


async def test_one_that_cannot_be_read_is_a_dead_letter_with_the_reason_that_its_worker_would_give(
    system: Bench,
) -> None:
    await system.publish(b'{"test":1}', X="y")
    await system.exhaust()
    await system.rescue()
    (letter,) = await system.dead()
    assert (letter["reason"], letter["body"], letter["attempts"]) == ("invalid_envelope", b'{"test":1}', 3)
    assert (letter["stream"], letter["subject"], letter["sequence"]) == ("TELEMETRY", "telemetry.t1", 1)
    assert b"X: y\r\n" in letter["headers"]
    audit = await system.audit()
    assert (audit.stored, audit.dead, audit.in_flight, audit.expired) == (0, 1, 0, 0)


async def test_one_that_the_database_refuses_is_a_dead_letter(system: Bench) -> None:
    await system.pool.execute("ALTER TABLE telemetry ADD CHECK (device_id <> 'cursed')")
    await system.publish(envelope(device="cursed"))
    await system.exhaust()
    await system.rescue()
    (letter,) = await system.dead()
    assert (letter["reason"], letter["device_id"]) == ("refused_by_database", "cursed")


async def test_one_that_kills_the_rescue_as_well_is_buried_unread_after_its_tries(system: Bench) -> None:
    await system.publish(envelope())
    await system.exhaust()
    deaths = 0
    while not await system.nothing_to_rescue():
        try:
            await system.rescue(probe=crash_at("ingest.decoded"))
        except* Crash:
            deaths += 1
    assert 1 <= deaths <= TRIES_MAX
    assert await system.stored() == []
    (letter,) = await system.dead()
    assert (letter["reason"], letter["tenant_id"], letter["device_id"]) == ("max_deliveries", "t1", None)
    assert "3 deliveries to ingest-workers" in letter["error"]


async def test_what_its_worker_had_stored_before_it_died_is_only_acknowledged(system: Bench) -> None:
    await system.publish(envelope(), b"poison")
    await system.exhaust(count=2)
    # a worker that held the messages for longer than their ack waits, and commits at last
    await system.client.jetstream().delete_consumer("TELEMETRY", "ingest-workers")
    await system.apply(topology())
    await system.ingest(lambda: system.settled(2))
    counted = await system.rescue()
    assert counted.outcomes == {"already_settled": 2}
    assert await system.stored() == [1]
    assert len(await system.dead()) == 1


@pytest.mark.parametrize(
    "step",
    [
        "rescue.fetched",
        "ingest.decoded",
        "ingest.ledger_written",
        "ingest.before_commit",
        "rescue.settled",
    ],
)
async def test_wherever_the_rescue_dies_the_message_is_stored_once(system: Bench, step: str) -> None:
    await system.publish(envelope())
    await system.exhaust()
    with pytest.raises(ExceptionGroup):
        await system.rescue(probe=crash_at(step))
    await system.rescue()
    assert await system.stored() == [1]
    assert await system.dead() == []


@pytest.mark.parametrize("step", ["shadow.decoded", "shadow.ledger_written", "shadow.before_commit", "rescue.settled"])
async def test_an_update_of_a_shadow_is_taken_in_once_and_answered_wherever_the_rescue_dies(
    system: Bench, step: str
) -> None:
    update = wrap(
        tenant_id="t1",
        device_id="d1",
        message_type=MessageType.SHADOW,
        received_ms=1_790_000_000_000,
        source="mqtt",
        payload=b'{"state":{"reported":{"a":1}}}',
    )
    await system.publish(update, b"poison", subject="shadow.t1")
    await system.exhaust(stream="SHADOW", consumer="shadow-workers", count=2)
    with pytest.raises(ExceptionGroup):
        await system.rescue(probe=crash_at(step))
    await system.rescue()
    shadow = await ShadowStore(system.pool, names_max=16).shadow(ShadowKey("t1", "d1"))
    assert (shadow.version, shadow.reported.state) == (1, {"a": 1})
    assert await system.pool.fetchval("SELECT count(*) FROM outbox") == 1
    (letter,) = await system.dead()
    assert (letter["stream"], letter["reason"]) == ("SHADOW", "invalid_envelope")


@pytest.mark.parametrize("step", ["rescue.fetched", "rescue.before_commit", "rescue.committed", "rescue.settled"])
async def test_a_job_of_a_work_queue_is_a_dead_letter_and_leaves_the_queue_wherever_the_rescue_dies(
    system: Bench, step: str
) -> None:
    await system.publish(JOB, subject="routes.t1")
    await system.exhaust(stream="ROUTES", consumer="route-delivery")
    with pytest.raises(ExceptionGroup):
        await system.rescue(probe=crash_at(step))
    await system.rescue()
    (letter,) = await system.dead()
    assert (letter["stream"], letter["reason"], letter["body"]) == ("ROUTES", "max_deliveries", JOB)
    assert letter["tenant_id"] == "t1"
    assert (await stream_state(system.client, "ROUTES")).messages == 0


async def test_a_message_that_has_expired_is_counted_and_stays_expired_for_the_audit(system: Bench) -> None:
    await system.publish(envelope())
    await system.exhaust()
    await system.client.jetstream().purge_stream("TELEMETRY")
    counted = await system.rescue()
    assert counted.outcomes == {"gone": 1}
    assert (await system.stored(), await system.dead()) == ([], [])
    audit = await system.audit()
    assert (audit.accepted, audit.expired) == (1, 1)


async def test_a_message_that_was_settled_and_has_expired_since_is_no_loss(system: Bench) -> None:
    await system.publish(envelope())
    await system.exhaust()
    with pytest.raises(ExceptionGroup):
        await system.rescue(probe=crash_at("rescue.settled"))
    await system.client.jetstream().purge_stream("TELEMETRY")
    counted = await system.rescue()
    assert counted.outcomes == {"already_settled": 1}


async def test_a_message_of_a_former_making_of_its_stream_is_not_taken_for_its_namesake(system: Bench) -> None:
    await system.publish(b"poison")
    await system.exhaust()
    await system.client.jetstream().delete_stream("TELEMETRY")
    counted = await system.rescue()
    assert counted.outcomes == {"gone": 1}


async def test_of_a_stream_that_was_made_anew_nothing_is_touched(system: Bench) -> None:
    await system.publish(envelope())
    await system.exhaust()
    await system.client.jetstream().delete_stream("TELEMETRY")
    await system.apply(topology())
    await system.publish(b"its namesake")
    counted = await system.rescue()
    assert counted.outcomes == {"gone": 1}
    assert await system.dead() == []


async def test_the_advisory_of_a_strangers_consumer_settles_nothing(system: Bench) -> None:
    """Somebody looks at TELEMETRY with a consumer of his own; what it gives up, our worker has yet to see."""
    await system.publish(b"poison")
    config = {"durable_name": "looker", "ack_policy": "explicit", "max_deliver": 1, "ack_wait": 100_000_000}
    body = msgspec.json.encode({"stream_name": "TELEMETRY", "config": config})
    await system.client.request("$JS.API.CONSUMER.CREATE.TELEMETRY.looker", body, timeout=30)
    await system.exhaust(consumer="looker")
    counted = await system.rescue()
    assert counted.outcomes == {"foreign": 1}
    assert await system.dead() == []


async def test_while_the_database_is_away_the_item_is_kept_alive_and_costs_no_try(system: Bench) -> None:
    await system.apply(topology(ack_wait_s=Away.ACK_WAIT_S))
    await system.publish(envelope())
    await system.exhaust()
    store = Away(system, times=int(1.5 * Away.ACK_WAIT_S / Away.PAUSE_S))
    other = SingleConsumer(
        system.client, stream="DEAD_LETTERS", consumer="rescue-workers", created_ns=system.created_ns("DEAD_LETTERS")
    )

    async def offered_to_nobody_else() -> bool:
        if not store.tries:
            return False
        if store.times:
            assert await other.fetch() is None
        return await system.nothing_to_rescue()

    counted = await system.rescue(offered_to_nobody_else, store=store)
    assert store.times == 0
    assert counted.waited_for == ["postgresql"]
    assert await system.stored() == [1]
    assert store.tries == {1}


class Away(RescueStore):
    """A store that is away for the first `times` that something is looked up: longer than the ack wait."""

    ACK_WAIT_S, PAUSE_S = 3.0, 0.05

    def __init__(self, system: Bench, *, times: int) -> None:
        super().__init__(system.pool, probe=lambda _: None)
        self.times = times
        self.tries: set[int] = set()
        self._system = system

    async def is_settled(self, at: int) -> bool:
        info = await self._system.client.jetstream().consumer_info("DEAD_LETTERS", "rescue-workers")
        self.tries.add((info.delivered.consumer_seq if info.delivered else 0) or 0)
        if self.times:
            self.times -= 1
            await asyncio.sleep(self.PAUSE_S)
            raise Outage("postgresql", "PostgreSQL is away")
        return await super().is_settled(at)


class Roles:
    """Ingest and rescue in a real process that a metric named `deadly` kills; started again whenever it has died."""

    def __init__(self, folder: Path, nats_url: str, database_url: str) -> None:
        script = Path(__file__).resolve().parents[1] / "deadly_process.py"
        kept = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG"}}
        given = {
            "NATS_URL": nats_url,
            "DATABASE_URL": database_url,
            "PYTHONPATH": str(script.parents[1] / "src"),
            "PULSE_HEALTH_PORT": str(ports.free_port()),
        }
        self.deaths = 0
        self._process = ManagedProcess(
            "roles",
            [sys.executable, str(script), "ingest", "rescue"],
            log_path=folder / "roles.log",
            environment=kept | given,
            working_directory=folder,
        )

    async def supervise(self, done: Callable[[], Awaitable[bool]]) -> None:
        """Return once `done`, with the process gone."""
        await asyncio.to_thread(self._process.start)
        try:
            while not await done():
                if not self._process.alive:
                    assert self._process.returncode == -signal.SIGKILL, self._said_last()
                    self.deaths += 1
                    await asyncio.to_thread(self._process.start)
                await asyncio.sleep(0.05)
        finally:
            await asyncio.to_thread(self._process.stop, 5.0)

    def _said_last(self) -> str:
        return self._process.log_path.read_text("utf-8")[-4000:]


async def test_a_message_that_kills_its_worker_three_times_is_a_dead_letter_and_all_the_rest_is_stored(
    system: Bench, nats: NatsServer, database: str, scratch: Path
) -> None:
    """All of its batch runs out of deliveries with it: 200 innocent messages, which the rescue stores one by one."""
    deadly = envelope(b'{"metrics":{"deadly":1}}')
    await system.publish(*(envelope() for _ in range(120)), deadly, *(envelope() for _ in range(80)))
    roles = Roles(scratch, nats.url, database)
    async with asyncio.timeout(100):
        await roles.supervise(lambda: system.settled(201))
    assert [number for number in range(1, 202) if number != 121] == await system.stored()
    (letter,) = await system.dead()
    assert (letter["body"], letter["reason"]) == (deadly, "max_deliveries")
    # Fewer than one death a delivery where the machine pauses between the two.
    assert 2 <= roles.deaths <= 3 + TRIES_MAX
    audit = await system.audit()
    assert (audit.accepted, audit.stored, audit.dead, audit.expired) == (201, 200, 1, 0)


def letter_of_a_job(**fields: object) -> Condemned:
    known: dict[str, object] = {
        "stream": "ROUTES",
        "subject": "routes.t1",
        "reason": Reason.CONFLICT,
        "error": "the queue is full",
        "body": b"\xff\x00job",
        "headers": b"NATS/1.0\r\nA: b\r\n\r\n",
        "tenant_id": "t1",
        "device_id": "d1",
        "published_ns": 1_790_000_000_000_000_000,
    }
    return Condemned(**(known | fields))  # type: ignore[arg-type]


async def test_a_letter_of_a_role_ends_in_the_table_once(system: Bench) -> None:
    letter = letter_of_a_job()
    await system.publish(msgspec.json.encode(letter), subject=letter.carrier)
    with pytest.raises(ExceptionGroup):
        await system.rescue(probe=crash_at("rescue.settled"))
    await system.rescue()
    (row,) = await system.dead()
    assert (row["stream"], row["subject"], row["reason"]) == ("ROUTES", "routes.t1", "conflict")
    assert (row["body"], row["headers"], row["tenant_id"]) == (letter.body, letter.headers, "t1")


async def test_a_letter_that_names_its_message_settles_that(system: Bench) -> None:
    """So a worker that redelivers it later finds it settled."""
    (sequence,) = await system.publish(envelope())
    created_ns = (await stream_state(system.client, "TELEMETRY")).created_ns
    letter = letter_of_a_job(stream="TELEMETRY", subject="telemetry.t1", stream_seq=sequence, created_ns=created_ns)
    await system.publish(msgspec.json.encode(letter), subject=letter.carrier)
    await system.rescue()
    audit = await system.audit()
    assert (audit.dead, audit.in_flight) == (1, 0)


async def test_a_letter_that_cannot_be_read_is_a_dead_letter_itself(system: Bench) -> None:
    await system.publish(b"\xffnot json", subject="dead.ROUTES")
    await system.rescue()
    (row,) = await system.dead()
    assert (row["stream"], row["reason"], row["body"]) == ("DEAD_LETTERS", "invalid_envelope", b"\xffnot json")
