"""The line of an ordered route: jobs of one device, of which only the head may be attempted. No clock, no I/O.

    the head is        the head          the line
    delivered          leaves            goes on with the next one
    dead               leaves            goes on with the next one, once its dead letter is on disk
    to be retried      keeps its place   waits until then
    parked, or cut     keeps its place   waits until then; no attempt is counted

A worker that has a line goes through it alone and in this way, so of what it sends first nothing overtakes. Two that
believe to have the same line only repeat what is delivered: each of them begins at a head that is nobody's past yet.

Lines are in the order of positions, and positions are numbers of a stream; what its workers have not routed yet may
have to stand further ahead. `Patience` says up to which position nothing is missing any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from pulse.domain.ledger import SEQUENCE_MAX, epoch_of, position

LOOK_GAP_S_MAX = 5.0
"""Who has not looked at a floor for longer does not know since when it has stood still."""


class LineKey(NamedTuple):
    """Names a line: messages of one making of a stream, by one device, for one route."""

    tenant_id: str
    route_id: str
    device_id: str
    epoch: int


class InLine(msgspec.Struct, frozen=True, kw_only=True):
    """A job that stands in a line; it came at `since_ms`, and so many `attempts` were made."""

    tenant_id: str
    route_id: str
    device_id: str
    position: int
    body: bytes
    since_ms: int
    attempts: int = 0

    @property
    def line(self) -> LineKey:
        """Where it stands."""
        return LineKey(self.tenant_id, self.route_id, self.device_id, epoch_of(self.position))


class Line(msgspec.Struct, frozen=True):
    """A line as a worker took it, with the first of its jobs; `claim` is the number of that taking."""

    key: LineKey
    claim: int
    jobs: Sequence[InLine]


class Turned(msgspec.Struct, frozen=True, kw_only=True):
    """What one turn made of a line: the positions that are `gone`, and when its next head is due.

    `head` has made so many `attempts`, where that is to be written down.
    """

    key: LineKey
    claim: int
    gone: Sequence[int]
    due_s: float
    head: int | None = None
    attempts: int = 0


class Turn:
    """One worker's way along a line, from its head."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._passed = 0
        self._due_s = 0.0
        self._attempts: int | None = None

    @property
    def head(self) -> InLine | None:
        """Whose turn it is; None where the line waits, or has none left that was taken."""
        if self._attempts is not None or self._passed == len(self._line.jobs):
            return None
        return self._line.jobs[self._passed]

    def passed(self) -> None:
        """The head is delivered, or its dead letter is on disk."""
        assert self.head is not None
        self._passed += 1

    def waits(self, until_s: float, *, attempts: int) -> None:
        """The head keeps its place, with so many attempts, and the line waits."""
        assert self.head is not None
        self._due_s, self._attempts = until_s, attempts

    def turned(self) -> Turned:
        """What became of it; a line that does not wait is due at once."""
        gone = [job.position for job in self._line.jobs[: self._passed]]
        if self._attempts is None:
            return Turned(key=self._line.key, claim=self._line.claim, gone=gone, due_s=0.0)
        return Turned(
            key=self._line.key,
            claim=self._line.claim,
            gone=gone,
            due_s=self._due_s,
            head=self._line.jobs[self._passed].position,
            attempts=self._attempts,
        )


class Patience:
    """How far one making of a stream is routed, as its consumer's ack floor says; what is acked is routed.

    A message that is never acked holds the floor where it is. After `patience_s` nobody waits for it any more, nor for
    anything else until the floor has moved. The floor of a stream in which nothing comes stands still as well, which
    counts for nothing: only time in which something is `unacked`, and in which somebody looks, does.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._floor = -1
        self._since_s = 0.0
        self._looked_s = 0.0

    def upto(self, epoch: int, floor: int, *, unacked: int, now_s: float) -> int:
        """The last position that may be sent, where the epoch's floor is `floor` now, with so many unacked above it."""
        if floor != self._floor or not unacked or now_s - self._looked_s > LOOK_GAP_S_MAX:
            self._floor, self._since_s = floor, now_s
        self._looked_s = now_s
        if now_s - self._since_s >= self._patience_s:
            return position(epoch, SEQUENCE_MAX)
        return position(epoch, min(floor + 1, SEQUENCE_MAX))
