"""Gathers what the audit weighs, in the order that keeps a live system from being over-counted (see `domain.audit`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import structlog

from pulse.domain.audit import EpochRecord, RowCheck, Settled, StreamAudit, StreamFacts, StreamReading, audit
from pulse.domain.ledger import PositionSet, position, sequence_of

log = structlog.get_logger()


class StreamReader(Protocol):
    """The stream; raises Outage where it is away."""

    async def read(self, stream: str) -> StreamReading:
        """What it says now."""


class Ledger(Protocol):
    """The ledger; raises Outage where the database is away."""

    async def epochs(self, stream: str) -> Sequence[EpochRecord]:
        """Every making of `stream` that a worker has met, oldest first."""

    async def settled(self, epoch: int) -> Settled:
        """What is settled of `epoch`."""

    async def count_rows(self, epoch: int) -> tuple[int, int]:
        """Rows of telemetry of `epoch`, and how many positions they have."""


class AuditMetrics(Protocol):
    """What is told of each audit."""

    def audited(self, stream: str, makings: Sequence[StreamAudit]) -> None:
        """The equation of each making of `stream`."""


class Auditor:
    """Audits streams against the ledger."""

    def __init__(self, *, streams: StreamReader, ledger: Ledger) -> None:
        self._streams = streams
        self._ledger = ledger

    async def audit(self, stream: str) -> list[StreamAudit]:
        """One equation a making of `stream`, oldest first. Raises Outage."""
        before = await self._streams.read(stream)
        records = await self._ledger.epochs(stream)
        settled = {record.epoch: await self._ledger.settled(record.epoch) for record in records}
        after = await self._streams.read(stream)
        audits = [
            audit(
                StreamFacts(
                    stream=stream,
                    epoch=record.epoch,
                    first=record.first_seq,
                    last=max(record.last_seq, _last(settled[record.epoch].positions)),
                    removed_below=0,
                    removed_between=PositionSet(),
                    delivered=0,
                    in_hand_max=0,
                    gone=True,
                ),
                settled[record.epoch].positions,
                settled[record.epoch].dead,
            )
            for record in records
            if record.created_ns != after.created_ns
        ]
        now = next((record for record in records if record.created_ns == after.created_ns), None)
        epoch = now.epoch if now else max((record.epoch for record in records), default=0) + 1
        of_now = settled.get(epoch)
        # A stream that was made anew between the two readings has removed nothing that we know of.
        same = before.created_ns == after.created_ns
        facts = StreamFacts(
            stream=stream,
            epoch=epoch,
            first=now.first_seq if now else 1,
            last=after.last_seq,
            removed_below=before.first_seq if same else 0,
            removed_between=PositionSet.of(position(epoch, seq) for seq in before.deleted if same),
            delivered=before.delivered_seq if same else 0,
            in_hand_max=before.ack_pending if same else 0,
        )
        audits.append(
            audit(facts, of_now.positions if of_now else PositionSet(), of_now.dead if of_now else PositionSet())
        )
        return audits

    async def check_rows(self, epoch: int) -> RowCheck:
        """Count the rows of telemetry themselves: slow, and right only while nothing is being written or dropped."""
        rows, positions = await self._ledger.count_rows(epoch)
        settled = await self._ledger.settled(epoch)
        return RowCheck(rows_in_ledger=settled.rows, rows_in_table=rows, duplicates=rows - positions)


class AuditWatch:
    """Audits again and again, and raises the alarm where it finds what no earlier look has found."""

    def __init__(self, *, auditor: Auditor, metrics: AuditMetrics) -> None:
        self._auditor = auditor
        self._metrics = metrics
        self._expired: dict[tuple[str, int], int] = {}

    async def look(self, stream: str) -> None:
        """Once. Raises Outage."""
        audits = await self._auditor.audit(stream)
        self._metrics.audited(stream, audits)
        for each in audits:
            known = self._expired.get((stream, each.epoch), 0)
            if each.expired > known:
                log.error(
                    "messages expired unprocessed", stream=stream, epoch=each.epoch, more=each.expired - known,
                    expired=each.expired,
                )  # fmt: skip
            if not each.balanced:
                log.error("the audit does not add up", **msgspec.structs.asdict(each))
            self._expired[stream, each.epoch] = each.expired


def _last(settled: PositionSet) -> int:
    """The highest sequence that is settled: a making that is gone had at least so many."""
    return sequence_of(settled.ranges[-1][1] - 1) if settled else 0
