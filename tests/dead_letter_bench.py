"""Streams, tables, ingest worker and rescue in one process, for tests of messages that nobody could settle.

The topology is as shipped, but for ack waits of a moment. `Bench.rescue()` and `Bench.ingest()` run a role until a
condition holds.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import asyncpg
import msgspec
from prometheus_client import CollectorRegistry

from pulse.adapters.nats.audit import AuditReader
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.nats.origin import OriginStreams
from pulse.adapters.nats.single_consumer import SingleConsumer
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.command_settling import CommandSettling
from pulse.adapters.postgres.dead_letters import DeadLetterStore, RescueStore
from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.pool import Pool
from pulse.adapters.postgres.shadow_settling import ShadowSettlements
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.domain.audit import StreamAudit
from pulse.domain.envelope import wrap
from pulse.domain.shadow import ShadowBounds
from pulse.domain.subjects import MessageType
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.runtime.metrics import CommandMetrics, IngestMetrics, ShadowMetrics
from pulse.services.audit import Auditor
from pulse.services.batches import Settler
from pulse.services.commands import CommandSettler
from pulse.services.dead_letters import DeadLetters
from pulse.services.ingest import IngestWorker, TelemetrySettler, written_at_once
from pulse.services.rescue import Rescue
from pulse.services.shadow import ShadowSettler
from pulse.topology.declared import Declared, DeclaredConsumer, load
from pulse.wiring.rescue import rescued_streams
from pulse.wiring.streams import COMMANDS, DEAD_LETTERS, INGEST_WORKERS, RESCUE_WORKERS, SHADOW, TELEMETRY
from worker_bench import LIMIT_S, apply, created_ns, servers, until

ACK_WAIT_S = 0.3
"""Of the rescue, which never runs out of deliveries."""
WORKERS_ACK_WAIT_S = 2.0
"""Of all others: a batch in hand must not run out of its three deliveries where the machine pauses for a moment."""
DECODER = PayloadDecoder(
    Bounds(
        metric_count_max=100,
        metric_name_length_max=128,
        metric_string_length_max=4096,
        ts_past_s_max=366 * 86_400,
        ts_future_s_max=3600,
    )
)


def topology(*, ack_wait_s: float = ACK_WAIT_S, workers_ack_wait_s: float = WORKERS_ACK_WAIT_S) -> Declared:
    """What is shipped, with short ack waits; `ack_wait_s` is that of the rescue."""
    shipped = load()

    def waits_ns(consumer: str) -> int:
        return int((ack_wait_s if consumer == RESCUE_WORKERS else workers_ack_wait_s) * 1e9)

    return Declared(
        streams=shipped.streams,
        consumers=tuple(
            DeclaredConsumer(
                stream=each.stream, config=msgspec.structs.replace(each.config, ack_wait=waits_ns(each.config.name))
            )
            for each in shipped.consumers
        ),
    )


def envelope(payload: bytes = b'{"metrics":{"n":1}}', *, tenant: str = "t1", device: str = "d1") -> bytes:
    """A message of telemetry that is received now."""
    return wrap(
        tenant_id=tenant,
        device_id=device,
        message_type=MessageType.TELEMETRY,
        received_ms=time.time_ns() // 1_000_000,
        source="http",
        payload=payload,
    )


@dataclass
class Counted:
    """A RescueMetrics that a test can read."""

    outcomes: Counter[str] = field(default_factory=Counter)
    waited_for: list[str] = field(default_factory=list)

    def rescued(self, outcome: str) -> None:
        self.outcomes[str(outcome)] += 1

    def waiting(self, system: str, waiting: bool) -> None:
        if waiting:
            self.waited_for.append(system)


class Crash(Exception):
    """The process dies here."""


def crash_at(step: str) -> Callable[[str], None]:
    """A probe that ends everything at `step`."""

    def probe(reached: str) -> None:
        if reached == step:
            raise Crash(step)

    return probe


class Bench:
    """One nats-server and one database, with all that is in them."""

    def __init__(self, client: PulseClient, pool: Pool) -> None:
        self.client = client
        self.pool = pool
        self.counted = Counted()
        self.letters = DeadLetters(store=DeadLetterStore(pool), publisher=OriginStreams(client))

    async def apply(self, declared: Declared) -> None:
        """Make the streams and consumers so."""
        await apply(self.client, declared)

    async def publish(self, *bodies: bytes, subject: str = "telemetry.t1", **headers: str) -> list[int]:
        """Store messages; returns their sequences."""
        stream = self.client.jetstream()
        receipts = [await stream.publish(subject, body, headers=headers or None) for body in bodies]
        return [receipt.seq for receipt in receipts]

    async def exhaust(self, *, stream: str = TELEMETRY, consumer: str = INGEST_WORKERS, count: int = 1) -> None:
        """Use up all deliveries of the `count` messages of `stream`, and wait for the advisories."""
        before = (await stream_state(self.client, DEAD_LETTERS)).messages
        subscription = await self.client.jetstream().pull_subscribe_bind(consumer, stream)

        async def given_up() -> bool:
            try:
                for message in await subscription.fetch(100, timeout=0.2):
                    await message.nak()
            except TimeoutError:
                pass
            return (await stream_state(self.client, DEAD_LETTERS)).messages >= before + count

        await until(given_up)
        await subscription.unsubscribe()

    async def rescue(
        self,
        done: Callable[[], Awaitable[bool]] | None = None,
        *,
        probe: Callable[[str], None] = lambda _: None,
        store: RescueStore | None = None,
    ) -> Counted:
        """Run the rescue, as it is wired, until `done`, or until DEAD_LETTERS is empty."""
        counted = Counted()
        service = Rescue(
            source=SingleConsumer(
                self.client, stream=DEAD_LETTERS, consumer=RESCUE_WORKERS, created_ns=self.created_ns(DEAD_LETTERS)
            ),
            origin=OriginStreams(self.client),
            store=store or RescueStore(self.pool, probe=probe),
            streams=rescued_streams(self.chances(probe)),
            metrics=counted,
            retry_delay_s_min=0.02,
            retry_delay_s_max=0.1,
            probe=probe,
            keep_alive_s=ACK_WAIT_S / 3,
        )
        await self._run(service, done or self.nothing_to_rescue)
        return counted

    def chances(self, probe: Callable[[str], None]) -> dict[str, Settler]:
        """What the rescue can do of what workers do."""
        store = TelemetryStore(self.pool, stream=TELEMETRY, probe=probe)
        telemetry = TelemetrySettler(
            store=store,
            decoder=DECODER,
            metrics=IngestMetrics(CollectorRegistry()),
            hear=written_at_once(store),
            probe=probe,
        )
        shadow = ShadowSettler(
            store=ShadowSettlements(
                self.pool,
                stream=SHADOW,
                bounds=ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8),
                names_max=16,
                probe=probe,
            ),
            metrics=ShadowMetrics(CollectorRegistry()),
            posted=lambda: None,
            probe=probe,
        )
        commands = CommandSettler(
            store=CommandSettling(self.pool, stream=COMMANDS, probe=probe),
            metrics=CommandMetrics(CollectorRegistry()),
            posted=lambda: None,
            now_ms=lambda: time.time_ns() // 1_000_000,
            probe=probe,
        )
        return {TELEMETRY: telemetry, SHADOW: shadow, COMMANDS: commands}

    async def ingest(self, done: Callable[[], Awaitable[bool]]) -> None:
        """Run an ingest worker until `done`; with its one writer, batches commit in the order of the stream."""
        async with PullConsumer(
            self.client,
            stream=TELEMETRY,
            consumer=INGEST_WORKERS,
            created_ns=self.created_ns(TELEMETRY),
            batch_max=5000,
            batch_bytes_max=32 << 20,
            linger_s=0.02,
        ) as source:
            worker = IngestWorker(
                source=source,
                store=TelemetryStore(self.pool, stream=TELEMETRY),
                decoder=DECODER,
                metrics=IngestMetrics(CollectorRegistry()),
                writers=1,
                retry_delay_s_min=0.02,
                retry_delay_s_max=0.1,
                probe=lambda _: None,
            )
            await self._run(worker, done)

    async def nothing_to_rescue(self) -> bool:
        """Whether DEAD_LETTERS is empty."""
        return (await stream_state(self.client, DEAD_LETTERS)).messages == 0

    async def stored(self) -> list[int]:
        """The sequences of all rows of telemetry."""
        rows = await self.pool.fetch(
            "SELECT position & ((1::bigint << 46) - 1) AS seq FROM telemetry ORDER BY position"
        )
        return [row["seq"] for row in rows]

    async def dead(self) -> list[asyncpg.Record]:
        """All dead letters, oldest first, with their `sequence`."""
        return await self.pool.fetch(
            "SELECT *, position & ((1::bigint << 46) - 1) AS sequence FROM dead_letters ORDER BY id"
        )

    async def settled(self, count: int) -> bool:
        """Whether `count` messages of telemetry are rows or dead letters."""
        return len(await self.stored()) + len(await self.dead()) >= count

    async def audit(self) -> StreamAudit:
        """Of the present making of TELEMETRY."""
        streams = AuditReader(self.client, consumer_of={TELEMETRY: INGEST_WORKERS})
        return (await Auditor(streams=streams, ledger=LedgerReader(self.pool)).audit(TELEMETRY))[-1]

    async def _run(self, service: Rescue | IngestWorker, done: Callable[[], Awaitable[bool]]) -> None:
        stop = asyncio.Event()
        running = asyncio.create_task(service.run(stop))
        waiting = asyncio.create_task(until(done))
        try:
            await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            async with asyncio.timeout(LIMIT_S):
                await running
        finally:
            running.cancel()
            waiting.cancel()
            await asyncio.wait([running, waiting])
        if not waiting.cancelled():
            waiting.result()

    def created_ns(self, stream: str) -> Callable[[], Awaitable[int]]:
        """Asks when `stream` was made."""
        return created_ns(self.client, stream)


@asynccontextmanager
async def bench(nats_url: str, database_url: str) -> AsyncIterator[Bench]:
    """Streams and tables made, and connections to both."""
    async with servers(nats_url, database_url, size_max=4) as (client, pool):
        made = Bench(client, pool)
        await made.apply(topology())
        yield made
