"""Which part of a question rollups answer: all of it that they can answer as the rows would, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.ledger import PositionSet
from pulse.domain.query import Aggregate, BucketQuery
from pulse.domain.rollup import HOUR_US, MINUTE_US, SECOND_US, Kept, Series, Spans, microseconds, plan_spans

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
UNITS = {Series.MINUTES: MINUTE_US, Series.HOURS: HOUR_US}


def kept(*, rows: int = 0, minutes: int = 0, hours: int = 0, pending: PositionSet | None = None) -> Kept:
    """From which hour on each series is whole."""
    since = {Series.ROWS: rows * HOUR_US, Series.MINUTES: minutes * HOUR_US, Series.HOURS: hours * HOUR_US}
    return Kept(since_us=since, pending_hours=pending or PositionSet())


def ask(low_s: float, high_s: float, bucket_s: int, aggregate: Aggregate = Aggregate.AVG) -> BucketQuery:
    return BucketQuery(
        since=EPOCH + timedelta(seconds=low_s),
        until=EPOCH + timedelta(seconds=high_s),
        metrics=None,
        bucket_s=bucket_s,
        aggregate=aggregate,
    )


def seconds(spans: PositionSet) -> list[tuple[float, float]]:
    return [(low / SECOND_US, high / SECOND_US) for low, high in spans.ranges]


def test_whole_hours_come_from_hours_whole_minutes_from_minutes_and_what_is_cut_from_rows() -> None:
    spans = plan_spans(ask(3500, 11_000.5, 3600), kept())
    assert seconds(spans.hours) == [(3600, 10_800)]
    assert seconds(spans.minutes) == [(3540, 3600), (10_800, 10_980)]
    assert seconds(spans.rows) == [(3500, 3540), (10_980, 11_000.5)]


def test_buckets_of_minutes_come_from_minutes_and_of_seconds_from_rows() -> None:
    spans = plan_spans(ask(0, 7200, 300), kept())
    assert (seconds(spans.minutes), spans.rows, spans.hours) == ([(0, 7200)], PositionSet(), PositionSet())
    assert seconds(plan_spans(ask(0, 7200, 90), kept()).rows) == [(0, 7200)]


def test_an_hour_that_is_pending_comes_from_rows_as_long_as_there_are_any() -> None:
    pending = PositionSet([(1, 2), (5, 6)])
    spans = plan_spans(ask(0, 8 * 3600, 3600), kept(rows=3, pending=pending))
    assert seconds(spans.rows) == [(5 * 3600, 6 * 3600)]
    assert seconds(spans.hours) == [(0, 5 * 3600), (6 * 3600, 8 * 3600)]


def test_values_of_any_type_come_from_rows_and_from_rollups_only_where_the_rows_are_gone() -> None:
    for aggregate in (Aggregate.COUNT, Aggregate.LAST):
        spans = plan_spans(ask(0, 8 * 3600, 3600, aggregate), kept(rows=3))
        assert (seconds(spans.hours), seconds(spans.rows)) == ([(0, 3 * 3600)], [(3 * 3600, 8 * 3600)])


hours = st.integers(0, 40)
instants = st.integers(0, 40 * 3600 * 4).map(lambda quarter_s: quarter_s / 4)


@given(
    ends=st.tuples(instants, instants).filter(lambda ends: ends[0] < ends[1]),
    bucket_s=st.sampled_from((1, 7, 60, 90, 300, 3600, 5400, 7200, 86_400)),
    aggregate=st.sampled_from(Aggregate),
    since=st.tuples(hours, hours, hours),
    pending=st.lists(st.tuples(hours, hours), max_size=4),
)
def test_the_spans_are_the_range_each_instant_once_and_rollups_only_where_they_are_right(
    ends: tuple[float, float],
    bucket_s: int,
    aggregate: Aggregate,
    since: tuple[int, int, int],
    pending: list[tuple[int, int]],
) -> None:
    query = ask(*ends, bucket_s, aggregate)
    there = kept(rows=since[0], minutes=since[1], hours=since[2], pending=PositionSet(pending))
    spans = plan_spans(query, there)
    asked = PositionSet([(microseconds(query.since), microseconds(query.until))])
    assert spans.rows | spans.minutes | spans.hours == asked
    assert len(spans.rows) + len(spans.minutes) + len(spans.hours) == len(asked)
    for series, part in ((Series.MINUTES, spans.minutes), (Series.HOURS, spans.hours)):
        check_rollups(query, there, series, part)
    assert isinstance(spans, Spans)


def check_rollups(query: BucketQuery, there: Kept, series: Series, part: PositionSet) -> None:
    unit_us = UNITS[series]
    for low, high in part.ranges:
        assert low % unit_us == high % unit_us == 0
        assert low >= there.since_us[series]
        assert query.bucket_s * SECOND_US % unit_us == 0
    still_rows = PositionSet([(there.since_us[Series.ROWS], 2**60)])
    pending = PositionSet((low * HOUR_US, high * HOUR_US) for low, high in there.pending_hours.ranges)
    assert not part & pending & still_rows
    if query.aggregate in (Aggregate.COUNT, Aggregate.LAST):
        assert not part & still_rows
