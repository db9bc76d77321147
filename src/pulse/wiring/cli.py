"""What a command works with, on connections of its own; the command line takes it from `app.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from pulse.adapters.nats.audit import AuditReader
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.origin import OriginStreams
from pulse.adapters.postgres.dead_letters import DeadLetterStore
from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.pool import Pool, Scoped, open_pool
from pulse.domain.access import ChangeRecord
from pulse.runtime.settings import Settings
from pulse.services.audit import Auditor
from pulse.services.dead_letters import DeadLetters
from pulse.wiring.streams import WORKERS


@asynccontextmanager
async def open_auditor(settings: Settings) -> AsyncIterator[Auditor]:
    """An auditor of the streams of WORKERS."""
    async with (
        connection(settings.nats_url, name="pulse audit") as client,
        _open_pool(settings, "audit") as pool,
    ):
        yield auditor_on(client, pool)


def auditor_on(client: PulseClient, pool: Pool) -> Auditor:
    """An auditor of the streams of WORKERS on connections that are there."""
    return Auditor(streams=AuditReader(client, consumer_of=WORKERS), ledger=LedgerReader(pool))


@asynccontextmanager
async def open_dead_letters(
    settings: Settings, *, to_replay: bool = False, record: ChangeRecord | None = None
) -> AsyncIterator[DeadLetters]:
    """The dead letters; with a connection to NATS only `to_replay`. What is changed is logged with `record`."""
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(_open_pool(settings, "dead-letters"))
        publisher = None
        if to_replay:
            client = await stack.enter_async_context(connection(settings.nats_url, name="pulse dead-letters"))
            publisher = OriginStreams(client)
        yield DeadLetters(store=DeadLetterStore(Scoped(pool=pool, record=record)), publisher=publisher)


@asynccontextmanager
async def _open_pool(settings: Settings, command: str) -> AsyncIterator[Pool]:
    async with open_pool(
        settings.database_url,
        size_max=1,
        timeout_s=settings.database_timeout_s,
        application_name=f"pulse {command}",
    ) as pool:
        yield pool
