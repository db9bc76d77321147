"""Retention: drops what has had its time, and says what and how much.

Nobody acks anything here. A partition that cannot be dropped at this turn is dropped at a later one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from typing import Protocol

import structlog

from pulse.domain.retention import Dropped, Partition, cutoff
from pulse.domain.rollup import Series

log = structlog.get_logger()

LOTS_MAX = 100
"""Lots of dead letters, and of commands, in one turn."""


class Store(Protocol):
    """Where things are kept; each call raises Outage where it is away."""

    async def expired(self, series: Series, before: date) -> list[Partition]:
        """The partitions of `series` that end with `before` or earlier, oldest first."""

    async def drop(self, partition: Partition) -> Dropped | None:
        """Drop it, or set it apart to be dropped; None where it is only set apart, or cannot be dropped now."""

    async def drop_retired(self) -> Sequence[Dropped]:
        """Drop what was set apart."""

    async def drop_dead_letters(self, before: date) -> Dropped | None:
        """Delete some of the dead letters from before that day; None where there are none."""

    async def drop_commands(self, before: date) -> Dropped | None:
        """Delete some of the commands that ended before that day; None where there are none."""


class RetentionCounts(Protocol):
    """What is counted."""

    def dropped(self, series: str, rows: int, size_bytes: int) -> None:
        """That much of `series` (of a bounded set) is gone."""


class Retention:
    """Drops what is older than its series is kept; `days`, `dead_letter_days`, `command_days` of 0 are for ever."""

    def __init__(
        self,
        *,
        store: Store,
        metrics: RetentionCounts,
        days: Mapping[Series, int],
        dead_letter_days: int,
        command_days: int,
        now: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._days = days
        self._in_lots = ((dead_letter_days, store.drop_dead_letters), (command_days, store.drop_commands))
        self._now = now

    async def run_once(self) -> int:
        """Drop all that can be dropped now; returns how many partitions and lots that was."""
        now = self._now()
        count = 0
        for series, days in self._days.items():
            before = cutoff(now, days)
            for partition in await self._store.expired(series, before) if before else ():
                count += self._tell(await self._store.drop(partition))
        for dropped in await self._store.drop_retired():
            count += self._tell(dropped)
        for days, drop in self._in_lots:
            before = cutoff(now, days)
            for _ in range(LOTS_MAX if before else 0):
                assert before, "there are lots only before a day"
                if not self._tell(await drop(before)):
                    break
                count += 1
        return count

    def _tell(self, dropped: Dropped | None) -> bool:
        if dropped is None:
            return False
        self._metrics.dropped(dropped.series, dropped.rows, dropped.bytes)
        log.info(
            "dropped after its time",
            series=dropped.series,
            table=dropped.relation,
            rows=dropped.rows,
            bytes=dropped.bytes,
        )
        return True
