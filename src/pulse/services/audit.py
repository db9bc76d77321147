"""Gathers what the audit weighs, in the order that keeps a live system from being over-counted (see `domain.audit`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pulse.domain.audit import EpochRecord, RowCheck, Settled, StreamAudit, StreamFacts, StreamReading, audit
from pulse.domain.ledger import PositionSet, position, sequence_of


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


def _last(settled: PositionSet) -> int:
    """The highest sequence that is settled: a making that is gone had at least so many."""
    return sequence_of(settled.ranges[-1][1] - 1) if settled else 0
