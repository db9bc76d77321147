"""The books of a simulated run: what became of each message that was sent, weighed against what is stored.

    unsent ─► unconfirmed ─► accepted       a 202 or a PUBACK: a row has to be there, once
                         ├─► heartbeat      the same to a heartbeat, which makes no row
                         └─► refused        any other final answer: no row may be there

A message is one byte here, and its number says all else: device = number % devices, its own count = number // devices.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from enum import IntEnum

import msgspec

from pulse.domain.ledger import PositionSet

MESSAGES_MAX = 50_000_000
"""Of one run: 50 MB of books, seven hours at 2000 a second."""
NO_ANSWER = "no answer"

LATENCY_S_MIN = 1e-5
LATENCY_GROWTH = 1.02
LATENCY_BUCKETS = 1000
"""From 10 µs in steps of 2 % to 4000 s."""


class Outcome(IntEnum):
    """What is known of a message."""

    UNSENT = 0
    UNCONFIRMED = 1
    ACCEPTED = 2
    HEARTBEAT = 3
    REFUSED = 4


class Latencies:
    """A histogram of bounded size; a quantile is right to 2 %, the maximum exactly."""

    def __init__(self) -> None:
        self._counts = [0] * LATENCY_BUCKETS
        self.count = 0
        self.max_s = 0.0

    def record(self, seconds: float) -> None:
        """Count one."""
        bucket = int(math.log(max(seconds, LATENCY_S_MIN) / LATENCY_S_MIN) / math.log(LATENCY_GROWTH))
        self._counts[min(bucket, LATENCY_BUCKETS - 1)] += 1
        self.count += 1
        self.max_s = max(self.max_s, seconds)

    def quantile_s(self, fraction: float) -> float:
        """The latency, in seconds, that `fraction` of all did not exceed; 0 where there is none."""
        wanted = math.ceil(self.count * fraction)
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return min(LATENCY_S_MIN * LATENCY_GROWTH ** (bucket + 1), self.max_s)
        return self.max_s


class Tally:
    """What the sender knows of `count` messages of `devices` devices."""

    def __init__(self, *, devices: int, count: int) -> None:
        self.devices = devices
        self.count = count
        self.answers: Counter[str] = Counter()
        """Every answer by its name (an HTTP status, or what a broker did), those to retries included, and NO_ANSWER."""
        self.sent = 0
        self.sent_twice = 0
        self.retried = 0
        self.late = 0
        """Messages whose first try began too long after it was due."""
        self.recognised = 0
        """202s that say that the message was accepted before."""
        self.latencies = Latencies()
        """From when a message was due to its 202, so a sender that falls behind cannot look fast."""
        self.by_outcome = [0] * len(Outcome)
        self.by_outcome[Outcome.UNSENT] = count
        self._outcomes = bytearray(count)

    def settle(self, message: int, outcome: Outcome) -> None:
        """Note what became of `message`; a copy of one that was accepted changes nothing any more."""
        known = self._outcomes[message]
        if known not in (Outcome.ACCEPTED, Outcome.HEARTBEAT):
            self.by_outcome[known] -= 1
            self.by_outcome[outcome] += 1
            self._outcomes[message] = outcome

    def accepted_of(self, device: int, *, seq_base: int) -> PositionSet:
        """The sequence numbers of `device` that have to be stored; its count 0 was sent as `seq_base`."""
        mine = bytes(self._outcomes[device :: self.devices])
        runs = re.finditer(rb"\x02+", mine)
        return PositionSet((seq_base + run.start(), seq_base + run.end()) for run in runs)


class StoredRows(msgspec.Struct, frozen=True):
    """The rows of one device: how many, and which sequence numbers they have."""

    rows: int
    seqs: PositionSet


NO_ROWS = StoredRows(0, PositionSet())


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of a run against what was accepted of it, in messages.

    `missing` were accepted and have no row; `unexpected` have a row and were never confirmed to the sender, which is no
    fault unless they were refused; `duplicates` are rows beyond the first of a message.
    """

    accepted: int
    stored: int
    missing: int
    unexpected: int
    duplicates: int


def compare(tally: Tally, rows: Mapping[int, StoredRows], *, seq_base: int) -> Storage:
    """Weigh message by message; `rows` by device number."""
    accepted = stored = missing = unexpected = duplicates = 0
    for device in range(min(tally.devices, tally.count)):
        expected = tally.accepted_of(device, seq_base=seq_base)
        found = rows.get(device, NO_ROWS)
        accepted += len(expected)
        stored += len(found.seqs)
        missing += len(expected - found.seqs)
        unexpected += len(found.seqs - expected)
        duplicates += found.rows - len(found.seqs)
    return Storage(accepted=accepted, stored=stored, missing=missing, unexpected=unexpected, duplicates=duplicates)
