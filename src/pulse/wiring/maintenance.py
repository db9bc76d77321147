"""The role `maintenance`: its chores, and how often each has its turn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.dead_letters import DeadLetterStore
from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.adapters.postgres.retention import RetentionStore
from pulse.adapters.postgres.rollups import RollupStore
from pulse.domain.rollup import Series
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import AuditMetrics, DeadLetterMetrics, RegistryMetrics, RetentionMetrics, RollupMetrics
from pulse.services.audit import AuditWatch
from pulse.services.maintenance import Chore, Maintenance, Turn
from pulse.services.reconcile import RegistryReconciler
from pulse.services.retention import Retention
from pulse.wiring.cli import auditor_on
from pulse.wiring.command import command_sweep
from pulse.wiring.process import Process
from pulse.wiring.streams import WORKERS, state_of


async def maintenance_services(process: Process) -> list[Service]:
    """The service with all of its chores."""
    settings, nats, pool, metrics = process.settings, process.nats, process.pool, process.metrics
    ledger, letters = LedgerReader(pool), DeadLetterStore(pool)
    reconciler = RegistryReconciler(truth=RegistryTruth(pool), projection=RegistryBucket(nats))
    repairs, letters_kept = RegistryMetrics(metrics), DeadLetterMetrics(metrics)

    watch = AuditWatch(auditor=auditor_on(nats, pool), metrics=AuditMetrics(metrics))

    async def partitions() -> None:
        today = datetime.now(UTC).date()
        for ahead in range(-1, settings.partitions_ahead_days + 1):
            await ledger.ensure_day(today + timedelta(days=ahead))

    async def epochs() -> None:
        for stream in WORKERS:
            state = await state_of(nats, stream)
            await ledger.observe(stream, state.created_ns, state.last_seq)

    async def audit() -> None:
        for stream in WORKERS:
            await watch.look(stream)

    async def dead_letters() -> None:
        letters_kept.kept(await letters.count_by_reason())

    async def registry() -> None:
        repairs.repaired((await reconciler.reconcile_once()).total)

    rolling, rollups = RollupStore(pool, probe=process.probe), RollupMetrics(metrics)
    retention = _retention(process)

    async def roll_up() -> Turn | None:
        added = await rolling.add()
        rollups.added(added)
        rollups.pending(await rolling.pending())
        return Turn.MORE if added else None

    often_s, seldom_s = settings.maintenance_interval_s, settings.reconcile_interval_s
    chores = [
        Chore(name="partitions", run=partitions, interval_s=often_s),
        Chore(name="epochs", run=epochs, interval_s=often_s),
        Chore(name="ledger", run=ledger.merge, interval_s=often_s),
        Chore(name="audit", run=audit, interval_s=often_s),
        Chore(name="dead letters", run=dead_letters, interval_s=often_s),
        Chore(name="rollups", run=roll_up, interval_s=settings.rollup_interval_s),
        Chore(name="retention", run=retention.run_once, interval_s=seldom_s),
        Chore(name="registry", run=registry, interval_s=seldom_s),
    ]
    return [Maintenance(chores=chores), command_sweep(process)]


def _retention(process: Process) -> Retention:
    """Drops what the settings do not keep for ever."""
    settings = process.settings
    return Retention(
        store=RetentionStore(process.pool, probe=process.probe),
        metrics=RetentionMetrics(process.metrics),
        days={
            Series.ROWS: settings.telemetry_retention_days,
            Series.MINUTES: settings.rollup_minutes_retention_days,
            Series.HOURS: settings.rollup_hours_retention_days,
        },
        dead_letter_days=settings.dead_letters_retention_days,
        command_days=settings.commands_retention_days,
        now=lambda: datetime.now(UTC),
    )
