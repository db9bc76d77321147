"""One worker in this process, on a real nats-server and a real PostgreSQL: what its tests have in common.

A bench of a worker is a WorkerBench that says its stream, consumer and subject, and how the worker is made.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import msgspec

from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.nats.jetstream import ConsumerAnswer, request
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool
from pulse.topology.declared import Declared, DeclaredConsumer, load

LIMIT_S = 30.0
ACK_WAIT_S = 10.0
"""Longer than a busy machine may pause: what comes again in a test, the test has had come again."""
KEEP_ALIVE_S = 0.25
AT_ONCE = 500

Drain = Callable[[], Awaitable[None]]
"""Stops a worker, and returns when it has drained."""


class Worker(Protocol):
    """What runs until `stop`, and returns when it has drained."""

    async def run(self, stop: asyncio.Event) -> None: ...


async def until(holds: Callable[[], Awaitable[bool]], *, limit_s: float = LIMIT_S) -> None:
    """Return once `holds` says so."""
    async with asyncio.timeout(limit_s):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(0.02)


async def apply(client: PulseClient, declared: Declared) -> None:
    """Make the streams and consumers so."""
    provisioner = Provisioner(client)
    await provisioner.apply(declared, await provisioner.plan(declared))


def created_ns(client: PulseClient, stream: str) -> Callable[[], Awaitable[int]]:
    """Asks when `stream` was made."""

    async def ask() -> int:
        return (await stream_state(client, stream)).created_ns

    return ask


@dataclass
class Told:
    """What a worker has told its metrics."""

    counts: Counter[str] = field(default_factory=Counter)
    waits: list[tuple[str, bool]] = field(default_factory=list)

    def waiting(self, system: str, waiting: bool) -> None:
        self.waits.append((system, waiting))

    def redelivered(self, count: int) -> None:
        self.counts["redelivered"] += count


@dataclass(kw_only=True)
class WorkerBench:
    """Everything but the worker."""

    STREAM: ClassVar[str]
    CONSUMER: ClassVar[str]
    SUBJECT: ClassVar[str]

    client: PulseClient
    pool: Pool

    async def declare(self, *, ack_wait_s: float = ACK_WAIT_S) -> None:
        """The stream and its consumer as shipped, but for the ack wait."""
        shipped = load()
        (stream,) = (each for each in shipped.streams if each.name == self.STREAM)
        (config,) = (each.config for each in shipped.consumers if each.config.name == self.CONSUMER)
        config = msgspec.structs.replace(config, ack_wait=int(ack_wait_s * 1e9))
        consumer = DeclaredConsumer(stream=self.STREAM, config=config)
        await apply(self.client, Declared(streams=(stream,), consumers=(consumer,)))

    def source(self, *, batch_max: int) -> PullConsumer:
        """What a worker fetches from; use as `async with`."""
        return PullConsumer(
            self.client,
            stream=self.STREAM,
            consumer=self.CONSUMER,
            created_ns=created_ns(self.client, self.STREAM),
            batch_max=batch_max,
            batch_bytes_max=1 << 25,
            linger_s=0.05,
        )

    async def publish(self, *bodies: bytes) -> None:
        """Store these in the stream, in this order."""
        for low in range(0, len(bodies), AT_ONCE):
            await asyncio.gather(
                *(self.client.jetstream().publish(self.SUBJECT, body) for body in bodies[low : low + AT_ONCE])
            )

    async def consumer(self) -> ConsumerAnswer:
        """How the consumer stands."""
        return await request(
            self.client, f"CONSUMER.INFO.{self.STREAM}.{self.CONSUMER}", {}, ConsumerAnswer, doing="ask"
        )

    async def until_settled(self, count: int) -> None:
        """Return once so many are acked."""

        async def acked() -> bool:
            consumer = await self.consumer()
            return consumer.ack_floor.stream_seq == count and consumer.num_ack_pending == 0

        await until(acked)


@contextlib.asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[Drain]:
    """Run it for as long as the block lasts, or until it is drained."""
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop), name="worker")

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


@contextlib.asynccontextmanager
async def servers(nats_url: str, database_url: str, *, size_max: int = 8) -> AsyncIterator[tuple[PulseClient, Pool]]:
    """Connections to both, and the tables made."""
    async with open_connection(database_url, timeout_s=LIMIT_S, application_name="test") as database:
        await migrate(database, available())
    async with (
        connection(nats_url, name="test") as client,
        open_pool(database_url, size_max=size_max, timeout_s=LIMIT_S, application_name="test") as pool,
    ):
        yield client, pool
