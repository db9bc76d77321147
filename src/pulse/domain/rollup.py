"""Rollups: numbers by the minute and by the hour, and which part of a question they can answer as the rows would.

A rollup of a bucket is (count, sum, min, max, last), and two of disjoint sets of rows combine into that of both. So a
question whose buckets are whole minutes or hours needs rows only where a bucket of a rollup is cut by the range, and
where a rollup does not contain everything yet: in the hours that are `pending`.

    |····rows····|■■■■minutes■■■■|■■■■■■■■■■■■■■■hours■■■■■■■■■■■■■■■|··rows··|■minutes■|··rows··|
    since                                                            pending hour                until

Rollups hold numbers alone. `count` and `last` are of any value, so they are read from the rows, as long as there are
any. All instants are µs since the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum

import msgspec

from pulse.domain.ledger import PositionSet
from pulse.domain.query import Aggregate, BucketQuery
from pulse.domain.telemetry import EPOCH

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 3600 * SECOND_US
ALWAYS_US = 2**62
OF_NUMBERS = frozenset((Aggregate.AVG, Aggregate.MIN, Aggregate.MAX, Aggregate.SUM))


class Series(StrEnum):
    """What is kept by time, under the names of its tables."""

    ROWS = "telemetry"
    MINUTES = "telemetry_minutes"
    HOURS = "telemetry_hours"


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to read: from when on each series is whole, and the hours that rollups do not wholly contain."""

    since_us: Mapping[Series, int]
    pending_hours: PositionSet


class Spans(msgspec.Struct, frozen=True, kw_only=True):
    """Which time of a question is read from which series; disjoint, and together the whole of what it asks."""

    rows: PositionSet
    minutes: PositionSet
    hours: PositionSet


def plan_spans(query: BucketQuery, kept: Kept) -> Spans:
    """Divide the range of `query` among the series, so that the answer is the one that all rows would give."""
    asked = PositionSet([(microseconds(query.since), microseconds(query.until))])
    bucket_us = query.bucket_s * SECOND_US
    rows_since = kept.since_us[Series.ROWS]
    before_rows = PositionSet([(-ALWAYS_US, rows_since)])
    # A pending hour of which the rows are gone is answered from what the rollup has.
    pending = PositionSet((low * HOUR_US, high * HOUR_US) for low, high in kept.pending_hours.ranges) - before_rows
    fit = asked - pending if query.aggregate in OF_NUMBERS else asked & before_rows
    hours = _whole(fit, HOUR_US, kept.since_us[Series.HOURS]) if bucket_us % HOUR_US == 0 else PositionSet()
    minutes = PositionSet()
    if bucket_us % MINUTE_US == 0:
        minutes = _whole(fit - hours, MINUTE_US, kept.since_us[Series.MINUTES])
    return Spans(rows=asked - hours - minutes, minutes=minutes, hours=hours)


def microseconds(instant: datetime) -> int:
    """`instant` in µs since the epoch."""
    since = instant - EPOCH
    return (since.days * 86_400 + since.seconds) * SECOND_US + since.microseconds


def _whole(spans: PositionSet, unit_us: int, since_us: int) -> PositionSet:
    """What of `spans` from `since_us` on is whole units."""
    later = spans & PositionSet([(since_us, ALWAYS_US)])
    return PositionSet((-(-low // unit_us) * unit_us, high // unit_us * unit_us) for low, high in later.ranges)
