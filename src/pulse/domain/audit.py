"""The audit: where is every message that a stream accepted?

    accepted = stored + dead + in flight + expired

accepted   what the stream has counted: last sequence − first sequence ever + 1
stored     settled by the ledger as stored
dead       settled by the ledger as a dead letter
in flight  not settled, and still in the stream or in a worker's hand
expired    not settled, and no longer anywhere: the stream's limits removed it unprocessed. An alarm.

The order of reading keeps a live system from being over-counted: first what the stream has removed, then the
ledger, then what the stream has accepted. So whatever the ledger knows was accepted before, and whatever is called
expired had been removed before the ledger was read.
"""

from __future__ import annotations

import msgspec

from pulse.domain.ledger import PositionSet, position


class StreamReading(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream and its consumer say at one moment; sequences are the stream's own.

    `deleted` are the sequences that are missing between the first and the last.
    """

    created_ns: int
    first_seq: int
    last_seq: int
    deleted: tuple[int, ...]
    delivered_seq: int
    ack_pending: int


class EpochRecord(msgspec.Struct, frozen=True):
    """One making of a stream, with the last sequence that was seen of it."""

    epoch: int
    created_ns: int
    first_seq: int
    last_seq: int


class Settled(msgspec.Struct, frozen=True):
    """All that the ledger knows of one epoch; `rows` is how many rows of telemetry it says were written."""

    positions: PositionSet
    dead: PositionSet
    rows: int


class RowCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger's word against the table itself, for one epoch."""

    rows_in_ledger: int
    rows_in_table: int
    duplicates: int

    @property
    def agrees(self) -> bool:
        """True where each row that the ledger counted is there once."""
        return self.duplicates == 0 and self.rows_in_ledger == self.rows_in_table


class StreamFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one making of a stream; sequences are the stream's own.

    `removed_below` is the first sequence that the stream still has, `removed_between` those that are gone above it,
    both read before the ledger; `last` is read after it. `in_hand_max` messages may be in the hands of workers, none
    of them above `delivered`. `gone` is true for a making that no longer exists.
    """

    stream: str
    epoch: int
    first: int
    last: int
    removed_below: int
    removed_between: PositionSet
    delivered: int
    in_hand_max: int
    gone: bool = False


class StreamAudit(msgspec.Struct, frozen=True, kw_only=True):
    """The equation of one making of a stream, in messages."""

    stream: str
    epoch: int
    accepted: int
    stored: int
    dead: int
    in_flight: int
    expired: int

    @property
    def balanced(self) -> bool:
        """True unless the ledger settles what the stream never accepted; the rest follows from arithmetic."""
        return self.in_flight >= 0 and self.expired >= 0 and self.accepted == self.total

    @property
    def total(self) -> int:
        """The right side of the equation."""
        return self.stored + self.dead + self.in_flight + self.expired


def audit(facts: StreamFacts, settled: PositionSet, dead: PositionSet) -> StreamAudit:
    """Weigh what the ledger settled of one making against what its stream accepted.

    `settled` (all that the ledger settled of this epoch) and `dead` (those of it that are dead letters) hold positions;
    so does `facts.removed_between`.
    """
    accepted = _span(facts.epoch, facts.first, facts.last + 1)
    unsettled = accepted - settled
    if facts.gone:
        removed = unsettled
    else:
        removed = unsettled & (_span(facts.epoch, facts.first, facts.removed_below) | facts.removed_between)
    # A worker may still hold a message that the stream has removed since it was delivered.
    delivered = removed & _span(facts.epoch, facts.first, facts.delivered + 1)
    in_hand = min(len(delivered), facts.in_hand_max)
    expired = len(removed) - in_hand
    return StreamAudit(
        stream=facts.stream,
        epoch=facts.epoch,
        accepted=len(accepted),
        stored=len(settled) - len(dead),
        dead=len(dead),
        in_flight=len(unsettled) - expired,
        expired=expired,
    )


def _span(epoch: int, low: int, high: int) -> PositionSet:
    """All positions of `epoch` from sequence `low` to below `high`."""
    if high <= low:
        return PositionSet()
    return PositionSet([(position(epoch, low), position(epoch, high - 1) + 1)])
