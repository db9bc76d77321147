"""The ingest worker in this process, against a real nats-server and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from conftest import PostgresServerFactory
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.domain.envelope import wrap
from pulse.domain.subjects import MessageType
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.services.ingest import IngestWorker
from worker_bench import KEEP_ALIVE_S, LIMIT_S, Drain, Told, WorkerBench, running, servers, until

DECODER = PayloadDecoder(
    Bounds(
        metric_count_max=10,
        metric_name_length_max=64,
        metric_string_length_max=256,
        ts_past_s_max=86_400,
        ts_future_s_max=3600,
    )
)


@dataclass
class Metrics(Told):
    """Remembers what it is told."""

    end_to_end_s: list[float] = field(default_factory=list)

    def settled(
        self, *, stored: int, dead: int, already_settled: int, commit_s: float, end_to_end_s: Sequence[float]
    ) -> None:
        self.counts.update(stored=stored, dead=dead, already_settled=already_settled, transactions=1)
        self.end_to_end_s.extend(end_to_end_s)


@dataclass(kw_only=True)
class Bench(WorkerBench):
    """Everything but the worker."""

    STREAM, CONSUMER, SUBJECT = "TELEMETRY", "ingest-workers", "telemetry.t1"

    metrics: Metrics = field(default_factory=Metrics)
    keep_alive_s: float = KEEP_ALIVE_S

    @contextlib.asynccontextmanager
    async def worker(self, *, batch_max: int = 5000, writers: int = 2) -> AsyncIterator[Drain]:
        """A running worker; calling what it gives stops it and returns when it has drained."""
        async with self.source(batch_max=batch_max) as source:
            worker = IngestWorker(
                source=source,
                store=TelemetryStore(self.pool, stream=self.STREAM),
                decoder=DECODER,
                metrics=self.metrics,
                writers=writers,
                retry_delay_s_min=0.05,
                retry_delay_s_max=0.2,
                probe=lambda _: None,
                keep_alive_s=self.keep_alive_s,
            )
            async with running(worker) as drain:
                yield drain

    async def stored(self) -> list[int]:
        """The readings that are rows, in the order of the stream."""
        rows = await self.pool.fetch("SELECT (metrics->>'n')::int AS n FROM telemetry ORDER BY position")
        return [row["n"] for row in rows]

    async def waits(self) -> bool:
        """Whether the worker waits for PostgreSQL; it began to by the first thing that it said of it."""
        told = self.metrics.waits
        assert not told or (told[0] == ("postgresql", True) and {system for system, _ in told} == {"postgresql"}), told
        return told[-1:] == [("postgresql", True)]


def reading(number: int, *, device_id: str = "d1", extra: str = "") -> bytes:
    return wrap(
        tenant_id="t1",
        device_id=device_id,
        message_type=MessageType.TELEMETRY,
        received_ms=time.time_ns() // 1_000_000,
        source="http",
        payload=f'{{"metrics":{{"n":{number}{extra}}}}}'.encode(),
    )


def heartbeat() -> bytes:
    return wrap(
        tenant_id="t1",
        device_id="d9",
        message_type=MessageType.HEARTBEAT,
        received_ms=time.time_ns() // 1_000_000,
        source="http",
        payload=b"{}",
    )


@contextlib.asynccontextmanager
async def bench_on(nats: NatsServer, database_url: str) -> AsyncIterator[Bench]:
    async with servers(nats.url, database_url, size_max=4) as (client, pool):
        made = Bench(client=client, pool=pool)
        await made.declare()
        yield made


@pytest.fixture
async def bench(nats: NatsServer, database: str) -> AsyncIterator[Bench]:
    async with bench_on(nats, database) as made:
        yield made


@pytest.fixture
async def postgres(postgres_server_factory: PostgresServerFactory) -> PostgresServer:
    """One that may be stopped."""
    server = postgres_server_factory()
    await asyncio.to_thread(server.start)
    return server


@pytest.fixture
async def mortal(nats: NatsServer, postgres: PostgresServer) -> AsyncIterator[Bench]:
    async with bench_on(nats, postgres.url) as made:
        yield made


async def test_what_is_counted_is_what_happened(bench: Bench) -> None:
    await bench.publish(*(reading(number) for number in range(1, 8)), heartbeat(), b"{}", b'{"test":1}')
    async with bench.worker() as drain:
        await bench.until_settled(10)
        await drain()
    counts = bench.metrics.counts
    assert (counts["stored"], counts["dead"], counts["already_settled"], counts["redelivered"]) == (8, 2, 0, 0)
    assert len(await bench.stored()) == 7
    assert await bench.pool.fetchval("SELECT count(*) FROM dead_letters") == 2
    assert await bench.pool.fetchval("SELECT count(*) FROM device_state") == 2
    assert bench.metrics.end_to_end_s
    assert all(0 <= seconds < LIMIT_S for seconds in bench.metrics.end_to_end_s)
    assert bench.metrics.waits == []


async def test_of_a_batch_with_rows_that_the_database_refuses_only_those_are_dead(bench: Bench) -> None:
    """4993 rows and 7 dead letters, in one delivery of each message; a check of the database finds them out."""
    await bench.pool.execute("ALTER TABLE telemetry ADD CHECK (NOT metrics ? 'poison')")
    poison = {1, 2, 1250, 2500, 2501, 4999, 5000}
    await bench.publish(
        *(reading(number, extra=',"poison":1' if number in poison else "") for number in range(1, 5001))
    )
    async with bench.worker() as drain:
        await bench.until_settled(5000)
        await drain()
    assert sorted(await bench.stored()) == sorted(set(range(1, 5001)) - poison)
    letters = await bench.pool.fetch("SELECT reason, attempts, convert_from(body, 'UTF8') AS body FROM dead_letters")
    assert {(letter["reason"], letter["attempts"]) for letter in letters} == {("refused_by_database", 1)}
    assert len(letters) == 7
    assert all("poison" in letter["body"] for letter in letters)
    assert (bench.metrics.counts["stored"], bench.metrics.counts["dead"]) == (4993, 7)
    assert (await bench.consumer()).delivered.consumer_seq == 5000


async def test_a_stop_finishes_what_is_in_hand(bench: Bench) -> None:
    await bench.publish(*(reading(number) for number in range(1, 2001)))
    async with bench.worker(batch_max=200) as drain:

        async def begun() -> bool:
            return bench.metrics.counts["stored"] > 0

        await until(begun)
        await drain()
        stored = await bench.stored()
        # What is settled is acked, and nothing that was handed out is left unsettled.
        assert bench.metrics.counts["stored"] == len(stored)
    async with bench.worker():
        await bench.until_settled(2000)
    assert sorted(await bench.stored()) == list(range(1, 2001))
    assert bench.metrics.counts["already_settled"] == 0


async def test_two_deliveries_of_one_message_in_one_batch_are_one_row(bench: Bench) -> None:
    """A message that is redelivered while the first delivery still waits to be fetched stands beside it."""
    bench.keep_alive_s = LIMIT_S
    ack_wait_s = 2.0
    await bench.declare(ack_wait_s=ack_wait_s)
    await bench.publish(reading(1), b"{}")
    async with bench.pool.acquire() as blocker, bench.worker(writers=1):
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE ledger IN EXCLUSIVE MODE")
            for number in range(2, 12):
                await bench.publish(reading(number))
                await asyncio.sleep(ack_wait_s / 4)
        await bench.until_settled(12)
    assert (await bench.consumer()).delivered.consumer_seq > 12, "nothing was delivered twice"
    assert sorted(await bench.stored()) == list(range(1, 12))
    assert bench.metrics.counts["stored"] == 11
    assert await bench.pool.fetchval("SELECT count(*) FROM dead_letters") == 1


async def test_an_outage_longer_than_the_ack_wait_costs_no_delivery(mortal: Bench, postgres: PostgresServer) -> None:
    """What is in hand and what has gathered is kept alive, however long PostgreSQL is away."""
    ack_wait_s = 4.0
    await mortal.declare(ack_wait_s=ack_wait_s)
    async with mortal.worker(batch_max=50) as drain:
        await mortal.publish(*(reading(number) for number in range(1, 101)))
        await mortal.until_settled(100)
        await asyncio.to_thread(postgres.stop)
        await mortal.publish(*(reading(number) for number in range(101, 501)))
        await until(mortal.waits)
        await asyncio.sleep(2 * ack_wait_s)
        assert await mortal.waits()
        await asyncio.to_thread(postgres.start)
        await mortal.until_settled(500)
        await drain()
    assert sorted(await mortal.stored()) == list(range(1, 501))
    assert (await mortal.consumer()).delivered.consumer_seq == 500, "an attempt was spent on an outage"
    assert mortal.metrics.counts["redelivered"] == 0
    assert not await mortal.waits()


async def test_a_stop_during_an_outage_gives_back_what_is_in_hand(mortal: Bench, postgres: PostgresServer) -> None:
    async with mortal.worker() as drain:
        await mortal.publish(reading(1))
        await mortal.until_settled(1)
        await asyncio.to_thread(postgres.stop)
        await mortal.publish(*(reading(number) for number in range(2, 11)))
        await until(mortal.waits)
        await drain()
    # What came behind the batch that met the outage may never have been asked for.
    given_back = (await mortal.consumer()).delivered.consumer_seq - 1
    assert 1 <= given_back <= 9
    await asyncio.to_thread(postgres.start)
    async with mortal.worker():
        await mortal.until_settled(10)
    assert sorted(await mortal.stored()) == list(range(1, 11))
    assert mortal.metrics.counts["redelivered"] == given_back
    assert (await mortal.consumer()).delivered.consumer_seq == 10 + given_back, "an attempt was spent on the way back"


async def test_a_worker_that_starts_during_an_outage_asks_for_nothing(mortal: Bench, postgres: PostgresServer) -> None:
    """Each delivery is an attempt, and a worker that cannot store must not spend it."""
    await mortal.publish(reading(1))
    await asyncio.to_thread(postgres.stop)
    async with mortal.worker() as drain:
        await until(mortal.waits)
        await asyncio.sleep(2.0)
        assert (await mortal.consumer()).delivered.consumer_seq == 0
        await asyncio.to_thread(postgres.start)
        await mortal.until_settled(1)
        await drain()
    assert not await mortal.waits()


async def test_a_restart_of_nats_in_the_middle_is_waited_out(bench: Bench, nats: NatsServer) -> None:
    async with bench.worker(batch_max=100):
        for restart in range(3):
            low = restart * 200
            await bench.publish(*(reading(number) for number in range(low + 1, low + 201)))
            nats.kill()
            await asyncio.to_thread(nats.start)

            async def connected() -> bool:
                return bench.client.is_connected

            await until(connected)
        await bench.until_settled(600)
    assert sorted(await bench.stored()) == list(range(1, 601))
