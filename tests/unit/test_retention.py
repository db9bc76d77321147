"""What has had its time, and what retention says of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

from pulse.domain.retention import Dropped, Partition, cutoff
from pulse.domain.rollup import Series
from pulse.runtime.settings import Settings
from pulse.services.retention import LOTS_MAX, Retention
from pulse.wiring.process import payload_bounds

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


class FakeStore:
    """Partitions of one day each; those in `busy` cannot be dropped, those of telemetry are set apart first."""

    def __init__(self, *, busy: Sequence[str] = (), letters: int = 0, commands: int = 0) -> None:
        self.busy = busy
        self.letters = letters
        self.commands = commands
        self.asked: list[tuple[Series, date]] = []
        self.retired: list[Dropped] = []

    async def expired(self, series: Series, before: date) -> list[Partition]:
        self.asked.append((series, before))
        return [Partition(series, f"{series}_{n}", before - timedelta(days=n), before) for n in (1, 2)]

    async def drop(self, partition: Partition) -> Dropped | None:
        if partition.relation in self.busy:
            return None
        dropped = Dropped(series=partition.series, relation=partition.relation, rows=10, bytes=100)
        if partition.series is Series.ROWS:
            self.retired.append(dropped)
            return None
        return dropped

    async def drop_retired(self) -> Sequence[Dropped]:
        dropped, self.retired = self.retired, []
        return dropped

    async def drop_dead_letters(self, before: date) -> Dropped | None:
        self.letters -= 1
        return Dropped(series="dead_letters", relation="dead_letters", rows=1, bytes=1) if self.letters >= 0 else None

    async def drop_commands(self, before: date) -> Dropped | None:
        assert before == date(2026, 11, 14)
        self.commands -= 1
        return Dropped(series="commands", relation="commands", rows=2, bytes=1) if self.commands >= 0 else None


class Counts:
    """What was dropped, by series."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}

    def dropped(self, series: str, rows: int, size_bytes: int) -> None:
        self.rows[series] = self.rows.get(series, 0) + rows


def retention(store: FakeStore, counts: Counts, *, letter_days: int = 0, command_days: int = 0) -> Retention:
    return Retention(
        store=store,
        metrics=counts,
        days={Series.ROWS: 10, Series.MINUTES: 5, Series.HOURS: 0},
        dead_letter_days=letter_days,
        command_days=command_days,
        now=lambda: NOW,
    )


def test_a_day_is_kept_until_its_last_instant_has_had_its_time() -> None:
    midnight = datetime(2026, 11, 23, tzinfo=UTC)
    assert cutoff(midnight, 10) == date(2026, 11, 13)
    assert cutoff(midnight - timedelta(microseconds=1), 10) == date(2026, 11, 12)
    assert cutoff(midnight, 0) is None


async def test_each_series_has_its_own_time_and_zero_is_never_asked_for() -> None:
    store, counts = FakeStore(letters=3), Counts()
    assert await retention(store, counts).run_once() == 4
    assert store.asked == [(Series.ROWS, date(2026, 11, 13)), (Series.MINUTES, date(2026, 11, 18))]
    assert counts.rows == {"telemetry": 20, "telemetry_minutes": 20}
    assert store.letters == 3


async def test_what_cannot_be_dropped_now_is_not_counted() -> None:
    store, counts = FakeStore(busy=("telemetry_1", "telemetry_minutes_2")), Counts()
    await retention(store, counts).run_once()
    assert counts.rows == {"telemetry": 10, "telemetry_minutes": 10}


async def test_dead_letters_go_in_pieces_and_a_turn_has_an_end() -> None:
    store, counts = FakeStore(letters=1000), Counts()
    await retention(store, counts, letter_days=7).run_once()
    assert counts.rows["dead_letters"] == LOTS_MAX


async def test_commands_that_ended_go_in_lots_too_each_in_its_own_time() -> None:
    store, counts = FakeStore(letters=3, commands=5), Counts()
    assert await retention(store, counts, letter_days=7, command_days=9).run_once() == 12
    assert counts.rows["commands"] == 10
    assert counts.rows["dead_letters"] == 3


def test_a_reading_that_would_be_dropped_at_once_is_too_old_to_be_accepted() -> None:
    assert payload_bounds(Settings(telemetry_retention_days=30)).ts_past_s_max == 30 * 86_400
    assert payload_bounds(Settings(telemetry_retention_days=0)).ts_past_s_max == Settings().ts_past_s_max
    assert payload_bounds(Settings()).ts_past_s_max == Settings().ts_past_s_max
