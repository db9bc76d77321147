"""How long what is stored is kept, and what of it has had its time.

A partition is dropped when all of it is older than its series is kept: a day that was kept for `days` days is dropped
between midnight and midnight, a month once its last hour has had its time.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta

import msgspec

from pulse.domain.rollup import Series


class Partition(msgspec.Struct, frozen=True):
    """A table with what of `series` falls into [low, high), in UTC."""

    series: Series
    relation: str
    low: date
    high: date


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """What is gone: the rows of a partition, or of a series without any (`relation` is its table), and their bytes."""

    series: str
    relation: str
    rows: int
    bytes: int


def cutoff(now: datetime, days: int) -> date | None:
    """The day before which nothing is kept; None where `days` is 0, which is for ever."""
    return (now - timedelta(days=days)).date() if days else None
