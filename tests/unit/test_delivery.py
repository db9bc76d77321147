"""The table of deliveries holds for every status, every failure and every Retry-After."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.delivery import (
    GOOD_RECORD,
    Attempted,
    Dead,
    DeadReason,
    Delivered,
    Endurance,
    Failure,
    Record,
    RetryAt,
    RetryPolicy,
    decide,
    is_unwell,
    retry_after_s,
)

NOW_S = 1_790_000_000.0
POLICY = RetryPolicy()
statuses = st.integers(100, 999)
attempted = st.one_of(
    st.builds(Attempted, status=statuses, retry_after=st.text(max_size=30) | st.integers(0, 10**6).map(str)),
    st.builds(Attempted, failure=st.sampled_from(Failure)),
)


def after(said: Attempted, *, attempt: int = 1, random: float = 0.5) -> Delivered | RetryAt | Dead:
    return decide(said, attempt=attempt, now_s=NOW_S, policy=POLICY, random=random)


@pytest.mark.parametrize("status", range(100, 600))
def test_every_status_has_its_line_in_the_table(status: int) -> None:
    decision = after(Attempted(status=status))
    if 200 <= status <= 299:
        assert decision == Delivered()
    elif status == 410:
        assert decision == Dead(DeadReason.GONE, disable_route=True)
    elif 400 <= status <= 499 and status not in (408, 425, 429):
        assert decision == Dead(DeadReason.REFUSED)
    else:
        assert isinstance(decision, RetryAt)


@pytest.mark.parametrize("failure", Failure)
def test_every_failure_is_tried_again_but_a_forbidden_target(failure: Failure) -> None:
    decision = after(Attempted(failure=failure))
    if failure is Failure.FORBIDDEN_TARGET:
        assert decision == Dead(DeadReason.FORBIDDEN_TARGET)
    else:
        assert isinstance(decision, RetryAt)


@given(attempted, st.integers(1, 100), st.floats(0, 1, exclude_max=True))
def test_a_job_is_never_tried_for_ever_nor_before_its_time(said: Attempted, attempt: int, random: float) -> None:
    decision = after(said, attempt=attempt, random=random)
    if isinstance(decision, RetryAt):
        assert attempt < POLICY.attempts_max
        assert NOW_S + POLICY.delay_s_min / 2 <= decision.at_s <= NOW_S + POLICY.retry_after_s_max
        assert decision.at_s >= NOW_S + retry_after_s(said.retry_after, now_s=NOW_S)
    else:
        assert attempt >= POLICY.attempts_max or decision != Dead(DeadReason.ATTEMPTS)


def test_the_last_attempt_is_the_last() -> None:
    decisions = [after(Attempted(status=503), attempt=attempt) for attempt in (1, 2, 3)]
    assert [type(decision) for decision in decisions] == [RetryAt, RetryAt, Dead]
    assert decisions[-1] == Dead(DeadReason.ATTEMPTS)


@given(attempted)
def test_only_410_disables_a_route_at_once(said: Attempted) -> None:
    decision = after(said)
    assert (isinstance(decision, Dead) and decision.disable_route) is (said.status == 410)


@pytest.mark.parametrize("status", [408, 425, 429, 503])
def test_retry_after_is_waited_in_full(status: int) -> None:
    assert after(Attempted(status=status, retry_after="7200")) == RetryAt(NOW_S + 7200)
    at = format_datetime(datetime.fromtimestamp(NOW_S + 7200, UTC), usegmt=True)
    assert after(Attempted(status=status, retry_after=at)) == RetryAt(NOW_S + 7200)


def test_more_time_than_a_job_has_ends_it() -> None:
    assert after(Attempted(status=503, retry_after="86400")) == Dead(DeadReason.TOO_LATE)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", 0),
        ("0", 0),
        ("120", 120),
        (" 120 ", 120),
        ("-5", 0),
        ("1.5", 0),
        ("soon", 0),
        ("١٢", 0),
        ("9" * 4000, 999_999_999_999_999_999),
        ("Mon, 21 Sep 2026 14:15:20 GMT", 1_790_000_120 - NOW_S),
        ("Monday, 21-Sep-26 14:15:20 GMT", 1_790_000_120 - NOW_S),
        ("Mon Sep 21 14:15:20 2026", 1_790_000_120 - NOW_S),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Mon, 99 Foo 2026 25:61:61 GMT", 0),
    ],
)
def test_retry_after_is_read_in_all_its_forms(text: str, seconds: float) -> None:
    assert retry_after_s(text, now_s=NOW_S) == pytest.approx(seconds)


@given(st.text())
def test_any_retry_after_is_read_as_a_wait(text: str) -> None:
    assert retry_after_s(text, now_s=NOW_S) >= 0


def test_what_the_destination_refuses_does_not_make_it_unwell() -> None:
    unwell = [status for status in (200, 301, 400, 404, 408, 410, 429, 500, 503) if is_unwell(Attempted(status=status))]
    assert unwell == [301, 500, 503]
    assert not is_unwell(Attempted(failure=Failure.FORBIDDEN_TARGET))
    assert is_unwell(Attempted(failure=Failure.TIMEOUT))


def test_a_route_is_disabled_after_days_without_a_delivery() -> None:
    endurance = Endurance(failing_s=86_400.0, failures_min=3)
    record = GOOD_RECORD
    for hour in range(25):
        record = record.after(Attempted(status=500), now_s=NOW_S + hour * 3600)
        assert record.exhausts(endurance, now_s=NOW_S + hour * 3600) is (hour >= 24)
    assert record.since() == datetime.fromtimestamp(NOW_S, UTC)
    assert record.after(Attempted(status=204), now_s=NOW_S) == GOOD_RECORD


def test_days_with_few_attempts_disable_nothing() -> None:
    assert not Record(NOW_S, 2).exhausts(Endurance(failing_s=1.0, failures_min=3), now_s=NOW_S + 10**6)
