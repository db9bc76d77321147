"""The role `maintenance`: its chores, and how often each has its turn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prometheus_client import CollectorRegistry

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.dead_letters import DeadLetterStore
from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.pool import Pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.runtime.metrics import DeadLetterMetrics, RegistryMetrics
from pulse.runtime.settings import Settings
from pulse.services.maintenance import Chore, Maintenance
from pulse.services.reconcile import RegistryReconciler
from pulse.wiring.streams import TELEMETRY, state_of


def maintenance_service(
    *, settings: Settings, nats: PulseClient, pool: Pool, metrics: CollectorRegistry
) -> Maintenance:
    """The service with all of its chores."""
    ledger, letters = LedgerReader(pool), DeadLetterStore(pool)
    reconciler = RegistryReconciler(truth=RegistryTruth(pool), projection=RegistryBucket(nats))
    repairs, letters_kept = RegistryMetrics(metrics), DeadLetterMetrics(metrics)

    async def partitions() -> None:
        today = datetime.now(UTC).date()
        for ahead in range(-1, settings.partitions_ahead_days + 1):
            await ledger.ensure_day(today + timedelta(days=ahead))

    async def epochs() -> None:
        state = await state_of(nats, TELEMETRY)
        await ledger.observe(TELEMETRY, state.created_ns, state.last_seq)

    async def dead_letters() -> None:
        letters_kept.kept(await letters.count_by_reason())

    async def registry() -> None:
        repairs.repaired((await reconciler.reconcile_once()).total)

    often_s, seldom_s = settings.maintenance_interval_s, settings.reconcile_interval_s
    chores = [
        Chore(name="partitions", run=partitions, interval_s=often_s),
        Chore(name="epochs", run=epochs, interval_s=often_s),
        Chore(name="ledger", run=ledger.merge, interval_s=often_s),
        Chore(name="dead letters", run=dead_letters, interval_s=often_s),
        Chore(name="registry", run=registry, interval_s=seldom_s),
    ]
    return Maintenance(chores=chores)
