"""The ingest worker in this process, against a real nats-server and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from conftest import PostgresServerFactory
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.nats.jetstream import ConsumerAnswer, request
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.domain.envelope import wrap
from pulse.domain.subjects import MessageType
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.services.ingest import IngestWorker
from pulse.topology.declared import Declared, DeclaredConsumer, load

STREAM, CONSUMER = "TELEMETRY", "ingest-workers"
LIMIT_S = 30.0
ACK_WAIT_S = 2.0
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
class Metrics:
    """Remembers what it is told."""

    counts: Counter[str] = field(default_factory=Counter)
    waits: list[tuple[str, bool]] = field(default_factory=list)
    end_to_end_s: list[float] = field(default_factory=list)

    def settled(
        self, *, stored: int, dead: int, already_settled: int, commit_s: float, end_to_end_s: Sequence[float]
    ) -> None:
        self.counts.update(stored=stored, dead=dead, already_settled=already_settled, transactions=1)
        self.end_to_end_s.extend(end_to_end_s)

    def waiting(self, system: str, waiting: bool) -> None:
        self.waits.append((system, waiting))

    def redelivered(self, count: int) -> None:
        self.counts["redelivered"] += count


@dataclass(kw_only=True)
class Bench:
    """Everything but the worker."""

    client: PulseClient
    pool: Pool
    metrics: Metrics = field(default_factory=Metrics)
    keep_alive_s: float = ACK_WAIT_S / 4

    @contextlib.asynccontextmanager
    async def worker(self, *, batch_max: int = 5000, writers: int = 2) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """A running worker; calling what it gives stops it and returns when it has drained."""

        async def created_ns() -> int:
            return (await stream_state(self.client, STREAM)).created_ns

        async with PullConsumer(
            self.client,
            stream=STREAM,
            consumer=CONSUMER,
            created_ns=created_ns,
            batch_max=batch_max,
            batch_bytes_max=1 << 25,
            linger_s=0.05,
        ) as source:
            worker = IngestWorker(
                source=source,
                store=TelemetryStore(self.pool, stream=STREAM),
                decoder=DECODER,
                metrics=self.metrics,
                writers=writers,
                retry_delay_s_min=0.05,
                retry_delay_s_max=0.2,
                probe=lambda _: None,
                keep_alive_s=self.keep_alive_s,
            )
            stop = asyncio.Event()
            task = asyncio.create_task(worker.run(stop), name="ingest")

            async def drain() -> None:
                stop.set()
                async with asyncio.timeout(LIMIT_S):
                    await task

            try:
                yield drain
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def publish(self, *bodies: bytes) -> None:
        """Store these in the stream, in this order."""
        for low in range(0, len(bodies), 500):
            await asyncio.gather(
                *(self.client.jetstream().publish("telemetry.t1", body) for body in bodies[low : low + 500])
            )

    async def consumer(self) -> ConsumerAnswer:
        return await request(self.client, f"CONSUMER.INFO.{STREAM}.{CONSUMER}", {}, ConsumerAnswer, doing="ask")

    async def stored(self) -> list[int]:
        """The readings that are rows, in the order of the stream."""
        rows = await self.pool.fetch("SELECT (metrics->>'n')::int AS n FROM telemetry ORDER BY position")
        return [row["n"] for row in rows]

    async def until_settled(self, count: int) -> None:
        """Return once so many are acked."""

        async def acked() -> bool:
            consumer = await self.consumer()
            return consumer.ack_floor.stream_seq == count and consumer.num_ack_pending == 0

        await until(acked)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(0.02)


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


def topology() -> Declared:
    shipped = load()
    (stream,) = (each for each in shipped.streams if each.name == STREAM)
    (config,) = (each.config for each in shipped.consumers if each.config.name == CONSUMER)
    config = msgspec.structs.replace(config, ack_wait=int(ACK_WAIT_S * 1e9))
    return Declared(streams=(stream,), consumers=(DeclaredConsumer(stream=STREAM, config=config),))


@contextlib.asynccontextmanager
async def bench_on(nats: NatsServer, database_url: str) -> AsyncIterator[Bench]:
    async with open_connection(database_url, timeout_s=10, application_name="test") as database:
        await migrate(database, available())
    async with (
        connection(nats.url, name="test") as client,
        open_pool(database_url, size_max=4, timeout_s=5, application_name="test") as pool,
    ):
        provisioner = Provisioner(client)
        await provisioner.apply(topology(), await provisioner.plan(topology()))
        yield Bench(client=client, pool=pool)


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
    await bench.publish(reading(1), b"{}")
    async with bench.pool.acquire() as blocker, bench.worker(writers=1):
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE ledger IN EXCLUSIVE MODE")
            for number in range(2, 12):
                await bench.publish(reading(number))
                await asyncio.sleep(ACK_WAIT_S / 4)
        await bench.until_settled(12)
    assert (await bench.consumer()).delivered.consumer_seq > 12, "nothing was delivered twice"
    assert sorted(await bench.stored()) == list(range(1, 12))
    assert bench.metrics.counts["stored"] == 11
    assert await bench.pool.fetchval("SELECT count(*) FROM dead_letters") == 1


async def test_an_outage_longer_than_the_ack_wait_costs_no_delivery(mortal: Bench, postgres: PostgresServer) -> None:
    """What is in hand and what has gathered is kept alive, however long PostgreSQL is away."""
    async with mortal.worker(batch_max=50) as drain:
        await mortal.publish(*(reading(number) for number in range(1, 101)))
        await mortal.until_settled(100)
        await asyncio.to_thread(postgres.stop)
        await mortal.publish(*(reading(number) for number in range(101, 501)))
        await asyncio.sleep(4 * ACK_WAIT_S)
        assert mortal.metrics.waits[-1] == ("postgresql", True)
        await asyncio.to_thread(postgres.start)
        await mortal.until_settled(500)
        await drain()
    assert sorted(await mortal.stored()) == list(range(1, 501))
    assert (await mortal.consumer()).delivered.consumer_seq == 500, "an attempt was spent on an outage"
    assert mortal.metrics.counts["redelivered"] == 0
    assert mortal.metrics.waits == [("postgresql", True), ("postgresql", False)]


async def test_a_stop_during_an_outage_gives_back_what_is_in_hand(mortal: Bench, postgres: PostgresServer) -> None:
    async with mortal.worker() as drain:
        await mortal.publish(reading(1))
        await mortal.until_settled(1)
        await asyncio.to_thread(postgres.stop)
        await mortal.publish(*(reading(number) for number in range(2, 11)))

        async def waits() -> bool:
            return mortal.metrics.waits[-1:] == [("postgresql", True)]

        await until(waits)
        await drain()
    await asyncio.to_thread(postgres.start)
    async with mortal.worker():
        await mortal.until_settled(10)
    assert sorted(await mortal.stored()) == list(range(1, 11))
    assert mortal.metrics.counts["redelivered"] == 9
    assert (await mortal.consumer()).delivered.consumer_seq == 10 + 9, "an attempt was spent on the way back"


async def test_a_worker_that_starts_during_an_outage_asks_for_nothing(mortal: Bench, postgres: PostgresServer) -> None:
    """Each delivery is an attempt, and a worker that cannot store must not spend it."""
    await mortal.publish(reading(1))
    await asyncio.to_thread(postgres.stop)
    async with mortal.worker() as drain:

        async def waits() -> bool:
            return mortal.metrics.waits == [("postgresql", True)]

        await until(waits)
        await asyncio.sleep(2 * ACK_WAIT_S)
        assert (await mortal.consumer()).delivered.consumer_seq == 0
        await asyncio.to_thread(postgres.start)
        await mortal.until_settled(1)
        await drain()
    assert mortal.metrics.waits == [("postgresql", True), ("postgresql", False)]


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
