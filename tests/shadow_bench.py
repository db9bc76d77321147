"""Shadow workers in this process, against a real nats-server and a real PostgreSQL, for whoever tests shadows."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.postgres.shadow_settling import ShadowSettlements
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.domain.envelope import wrap
from pulse.domain.shadow import ShadowBounds, ShadowKey
from pulse.domain.subjects import MessageType
from pulse.services.shadow import ShadowWorker
from worker_bench import ACK_WAIT_S, KEEP_ALIVE_S, Drain, Told, WorkerBench, running, servers

STREAM = "SHADOW"
BOUNDS = ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8)
NAMES_MAX = 3


class Metrics(Told):
    """Remembers what it is told."""

    def settled(self, *, commit_s: float, end_to_end_s: Sequence[float], **counts: int) -> None:
        self.counts.update(counts)
        self.counts["transactions"] += 1


@dataclass(kw_only=True)
class Bench(WorkerBench):
    """Everything but the worker."""

    STREAM, CONSUMER, SUBJECT = STREAM, "shadow-workers", "shadow.t1"

    metrics: Metrics = field(default_factory=Metrics)
    posted: int = 0

    @property
    def store(self) -> ShadowStore:
        return ShadowStore(self.pool, names_max=NAMES_MAX)

    @property
    def settlements(self) -> ShadowSettlements:
        return ShadowSettlements(self.pool, stream=STREAM, bounds=BOUNDS, names_max=NAMES_MAX)

    @contextlib.asynccontextmanager
    async def worker(self, *, batch_max: int = 500, writers: int = 1) -> AsyncIterator[Drain]:
        """A running worker; calling what it gives stops it and returns when it has drained.

        With one writer, batches commit in the order of the stream.
        """

        def posted() -> None:
            self.posted += 1

        async with self.source(batch_max=batch_max) as source:
            worker = ShadowWorker(
                source=source,
                store=self.settlements,
                metrics=self.metrics,
                posted=posted,
                writers=writers,
                retry_delay_s_min=0.05,
                retry_delay_s_max=0.2,
                probe=lambda _: None,
                keep_alive_s=KEEP_ALIVE_S,
            )
            async with running(worker) as drain:
                yield drain

    async def heard(self, device_id: str = "d1") -> list[tuple[str, dict[str, Any]]]:
        """What stands in the outbox for a device, in order: topic and document."""
        rows = await self.pool.fetch("SELECT topic, body FROM outbox WHERE device_id = $1 ORDER BY id", device_id)
        return [(row["topic"], json.loads(row["body"])) for row in rows]

    async def dead(self) -> list[tuple[str, str | None]]:
        """Reason and device of each dead letter, in the order of the stream."""
        rows = await self.pool.fetch("SELECT reason, device_id FROM dead_letters ORDER BY position")
        return [(row["reason"], row["device_id"]) for row in rows]


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


@contextlib.asynccontextmanager
async def bench_on(nats: NatsServer, database_url: str, *, ack_wait_s: float = ACK_WAIT_S) -> AsyncIterator[Bench]:
    async with servers(nats.url, database_url) as (client, pool):
        made = Bench(client=client, pool=pool)
        await made.declare(ack_wait_s=ack_wait_s)
        yield made
