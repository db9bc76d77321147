"""Questions about telemetry: instants, buckets, cursors, bounds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.errors import Reason, Refusal
from pulse.domain.query import (
    RANGE_S_DEFAULT,
    TS_US_MAX,
    TS_US_MIN,
    Aggregate,
    BucketQuery,
    Cursor,
    Query,
    QueryBounds,
    Question,
    bucket_count,
    parse_bucket,
    parse_instant,
    parse_question,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BOUNDS = QueryBounds(range_s_max=366 * 86_400, rows_max=10_000, buckets_max=1000)


def ask(question: Question) -> Query | BucketQuery:
    return parse_question(question, now=NOW, bounds=BOUNDS)


def test_a_question_without_words_is_about_the_last_day() -> None:
    query = ask(Question())
    assert isinstance(query, Query)
    assert (query.since, query.until) == (NOW - timedelta(seconds=RANGE_S_DEFAULT), NOW)
    assert (query.metrics, query.limit, query.cursor, query.descending) == (None, 1000, None, False)


@pytest.mark.parametrize(
    "text",
    [
        "2026-03-01T12:00:00Z",
        "2026-03-01T14:00:00+02:00",
        "2026-03-01T14:00:00 02:00",
        "2026-03-01T04:00:00-0800",
        "1772366400",
        "1772366400.0",
        "1772366400000",
    ],
)
def test_an_instant_may_be_written_in_many_ways(text: str) -> None:
    assert parse_instant(text, field="from") == NOW


@given(st.text(max_size=40))
def test_any_text_is_an_instant_or_a_refusal(text: str) -> None:
    try:
        assert parse_instant(text, field="to").tzinfo is UTC
    except Refusal as refused:
        told = refused
    else:
        return
    assert (told.reason, told.field) == (Reason.INVALID_REQUEST, "to")


@given(st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))])))
def test_an_instant_survives_its_own_writing(instant: datetime) -> None:
    try:
        assert parse_instant(instant.isoformat(), field="from") == instant
    except Refusal:
        assert instant.year in {1, 9999}


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5m", 300), ("1h", 3600), ("7d", 604_800)])
def test_a_bucket_is_a_count_and_a_unit(text: str, seconds: int) -> None:
    assert parse_bucket(text) == seconds
    for wrong in (text[:-1], f" {text}", f"{text} ", f"0{text}", f"-{text}", f"{text}s", text.upper()):
        with pytest.raises(Refusal):
            parse_bucket(wrong)
    with pytest.raises(Refusal):
        parse_bucket("1000000d")


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 5000))
def test_buckets_are_counted_as_they_are_cut(start: int, length: int, width: int) -> None:
    since = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=start)
    counted = len({second // width for second in range(start, start + length)})
    assert bucket_count(since, since + timedelta(seconds=length), width) == counted


def test_no_more_buckets_than_the_bound() -> None:
    since = NOW - timedelta(seconds=1000)
    allowed = ask(Question(since=since.isoformat(), bucket="1s"))
    assert isinstance(allowed, BucketQuery)
    assert (allowed.bucket_s, allowed.aggregate) == (1, Aggregate.AVG)
    with pytest.raises(Refusal, match="1001 buckets") as raised:
        ask(Question(since=(since - timedelta(seconds=1)).isoformat(), bucket="1s"))
    assert raised.value.field == "bucket"


@given(st.integers(TS_US_MIN, TS_US_MAX), st.integers(0, 2**63 - 1))
def test_a_cursor_survives_its_own_writing(ts_us: int, position: int) -> None:
    cursor = Cursor(ts_us, position)
    assert Cursor.parse(str(cursor)) == cursor


@given(st.text(max_size=45))
def test_any_text_is_a_cursor_or_a_refusal(text: str) -> None:
    try:
        assert TS_US_MIN <= Cursor.parse(text).ts_us <= TS_US_MAX
    except Refusal as refused:
        told = refused
    else:
        return
    assert told.field == "cursor"


def test_metrics_may_come_with_commas_and_repeated_and_count_once() -> None:
    query = ask(Question(metrics=["a,b", "c", "a"]))
    assert query.metrics == ("a", "b", "c")


def test_the_range_has_a_bound_and_a_direction() -> None:
    year = timedelta(days=366)
    ask(Question(since=(NOW - year).isoformat()))
    for since in (NOW - year - timedelta(seconds=1), NOW, NOW + timedelta(seconds=1)):
        with pytest.raises(Refusal) as raised:
            ask(Question(since=since.isoformat()))
        assert raised.value.field == "from"
    with pytest.raises(Refusal):
        ask(Question(until="0001-01-01T00:00:00Z"))
