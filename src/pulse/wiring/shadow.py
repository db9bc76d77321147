"""The role `shadow`: SHADOW ─► ShadowWorker ─► PostgreSQL ─► Postman ─► DOWN; and answers about shadows to gateways."""

from __future__ import annotations

import msgspec

from pulse.adapters.nats.ask import Answerer
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.postgres.shadow_settling import ShadowSettlements
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import is_id
from pulse.domain.shadow import ShadowKey
from pulse.domain.shadow_documents import document
from pulse.runtime.health import Dependency
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import ShadowMetrics
from pulse.services.shadow import ShadowWorker
from pulse.wiring.postman import postman_of
from pulse.wiring.process import Process
from pulse.wiring.streams import SHADOW, SHADOW_WORKERS, state_of
from pulse.wiring.waiting import WatchedShadowSettlements

KIND = "shadow"
"""Of what is in the outbox, and of the questions that gateways ask."""
ANSWERS_MAX = 2
"""Questions that are answered at the same time; each holds one PostgreSQL connection."""
CONNECTIONS = 1 + ANSWERS_MAX
"""To PostgreSQL, beside those of the writers: the postman's, and those of the answers."""
BATCH_BYTES_MAX = 4 * 1024 * 1024
"""What one pull may bring."""


async def shadow_services(process: Process) -> list[Service]:
    """What is said goes first: the postman is the worker's sink."""
    settings = process.settings

    async def created_ns() -> int:
        return (await state_of(process.nats, SHADOW)).created_ns

    source = await process.stack.enter_async_context(
        PullConsumer(
            process.nats,
            stream=SHADOW,
            consumer=SHADOW_WORKERS,
            created_ns=created_ns,
            batch_max=settings.shadow_batch_max,
            batch_bytes_max=BATCH_BYTES_MAX,
            linger_s=settings.shadow_linger_s_max,
        )
    )
    check = Dependency("shadow", detail="the first look at the tables")
    process.checks.append(check)
    postman = postman_of(process, KIND)
    worker = ShadowWorker(
        source=source,
        store=WatchedShadowSettlements(shadow_settlements(process), check),
        metrics=ShadowMetrics(process.metrics),
        posted=postman.tell,
        writers=settings.shadow_writers,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
        routed=process.routed,
    )
    return [postman, worker, _answerer(process)]


def shadow_settlements(process: Process) -> ShadowSettlements:
    """Where messages of SHADOW are settled."""
    return ShadowSettlements(
        process.pool,
        stream=SHADOW,
        bounds=process.shadow_bounds,
        names_max=process.settings.shadow_names_max,
        probe=process.probe,
    )


def _answerer(process: Process) -> Answerer:
    store = ShadowStore(process.pool, names_max=process.settings.shadow_names_max)

    async def answer(tenant_id: str, device_id: str, body: bytes) -> bytes:
        name = body.decode("ascii", "replace")
        if name and not is_id(name):
            raise Refusal(Reason.INVALID_IDENTITY, "this is no name of a shadow")
        shadow = await store.shadow(ShadowKey(tenant_id, device_id, name))
        if not shadow.exists:
            raise Refusal(Reason.NOT_FOUND, "there is no such shadow")
        return msgspec.json.encode(document(shadow))

    return Answerer(process.nats, kind=KIND, answer=answer, concurrency_max=ANSWERS_MAX)
