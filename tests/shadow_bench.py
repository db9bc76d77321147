"""Shadow workers in this process, against a real nats-server and a real PostgreSQL, for whoever tests shadows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.nats.jetstream import ConsumerAnswer, request
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool
from pulse.adapters.postgres.shadow_settling import ShadowSettlements
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.domain.envelope import wrap
from pulse.domain.shadow import ShadowBounds, ShadowKey
from pulse.domain.subjects import MessageType
from pulse.services.shadow import ShadowWorker
from pulse.topology.declared import Declared, DeclaredConsumer, load

STREAM, CONSUMER = "SHADOW", "shadow-workers"
LIMIT_S = 30.0
ACK_WAIT_S = 1.0
BOUNDS = ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8)
NAMES_MAX = 3


@dataclass
class Metrics:
    """Remembers what it is told."""

    counts: Counter[str] = field(default_factory=Counter)
    waits: list[tuple[str, bool]] = field(default_factory=list)

    def settled(self, *, commit_s: float, end_to_end_s: Sequence[float], **counts: int) -> None:
        self.counts.update(counts)
        self.counts["transactions"] += 1

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
    posted: int = 0

    @property
    def store(self) -> ShadowStore:
        return ShadowStore(self.pool, names_max=NAMES_MAX)

    @property
    def settlements(self) -> ShadowSettlements:
        return ShadowSettlements(self.pool, stream=STREAM, bounds=BOUNDS, names_max=NAMES_MAX)

    @contextlib.asynccontextmanager
    async def worker(self, *, batch_max: int = 500, writers: int = 1) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """A running worker; calling what it gives stops it and returns when it has drained.

        With one writer, batches commit in the order of the stream.
        """

        async def created_ns() -> int:
            return (await stream_state(self.client, STREAM)).created_ns

        def posted() -> None:
            self.posted += 1

        async with PullConsumer(
            self.client,
            stream=STREAM,
            consumer=CONSUMER,
            created_ns=created_ns,
            batch_max=batch_max,
            batch_bytes_max=1 << 22,
            linger_s=0.02,
        ) as source:
            worker = ShadowWorker(
                source=source,
                store=self.settlements,
                metrics=self.metrics,
                posted=posted,
                writers=writers,
                retry_delay_s_min=0.05,
                retry_delay_s_max=0.2,
                probe=lambda _: None,
                keep_alive_s=ACK_WAIT_S / 4,
            )
            stop = asyncio.Event()
            task = asyncio.create_task(worker.run(stop), name="shadow")

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
                *(self.client.jetstream().publish("shadow.t1", body) for body in bodies[low : low + 500])
            )

    async def until_settled(self, count: int) -> None:
        """Return once so many are acked."""

        async def acked() -> bool:
            consumer = await request(self.client, f"CONSUMER.INFO.{STREAM}.{CONSUMER}", {}, ConsumerAnswer, doing="ask")
            return consumer.ack_floor.stream_seq == count and consumer.num_ack_pending == 0

        await until(acked)

    async def heard(self, device_id: str = "d1") -> list[tuple[str, dict[str, Any]]]:
        """What stands in the outbox for a device, in order: topic and document."""
        rows = await self.pool.fetch("SELECT topic, body FROM outbox WHERE device_id = $1 ORDER BY id", device_id)
        return [(row["topic"], json.loads(row["body"])) for row in rows]

    async def dead(self) -> list[tuple[str, str | None]]:
        """Reason and device of each dead letter, in the order of the stream."""
        rows = await self.pool.fetch("SELECT reason, device_id FROM dead_letters ORDER BY position")
        return [(row["reason"], row["device_id"]) for row in rows]


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(0.02)


def message(payload: object, *, device_id: str = "d1", name: str = "", get: bool = False) -> bytes:
    """The body of a message of SHADOW; `payload` is bytes, or what becomes JSON."""
    return wrap(
        tenant_id="t1",
        device_id=device_id,
        message_type=MessageType.SHADOW_GET if get else MessageType.SHADOW,
        received_ms=time.time_ns() // 1_000_000,
        source="mqtt",
        payload=payload if isinstance(payload, bytes) else msgspec.json.encode(payload),
        name=name,
    )


def reported(state: object, *, device_id: str = "d1", name: str = "", **more: object) -> bytes:
    """A device says what it is."""
    return message({"state": {"reported": state}, **more}, device_id=device_id, name=name)


def key(device_id: str = "d1", name: str = "") -> ShadowKey:
    return ShadowKey("t1", device_id, name)


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
        open_pool(database_url, size_max=8, timeout_s=5, application_name="test") as pool,
    ):
        provisioner = Provisioner(client)
        await provisioner.apply(topology(), await provisioner.plan(topology()))
        yield Bench(client=client, pool=pool)
