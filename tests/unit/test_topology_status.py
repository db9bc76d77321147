"""What `pulse streams status` makes of a survey, and of numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pulse.adapters.nats.jetstream import time_ns
from pulse.adapters.nats.streams import ConsumerState, StreamState, StreamSurvey
from pulse.cli.streams_status import bytes_text, duration_text, status_of

NOW_NS = 1_800_000_000 * 10**9
CONSUMER = ConsumerState(
    name="ingest-workers", pending=0, ack_pending=0, redelivered=0, waiting_pulls=2,
    delivered_stream_seq=1000, ack_floor_stream_seq=1000, filtered=False, paused=False,
)  # fmt: skip
STATE = StreamState(
    name="TELEMETRY", created="", created_ns=0, now_ns=NOW_NS, replicas=1, messages=1000, bytes=100_000, first_seq=1,
    last_seq=1000, first_ts_ns=NOW_NS - 600 * 10**9, last_ts_ns=NOW_NS, deleted_count=0,
)  # fmt: skip
HEALTHY = StreamSurvey(
    config={"max_bytes": 1_000_000, "max_age": 3600 * 10**9, "max_msgs_per_subject": 10_000, "discard": "old"},
    state=STATE,
    subject_messages={"telemetry.a": 600, "telemetry.b": 400},
    consumers=(CONSUMER,),
)


def with_consumer(**changes: Any) -> StreamSurvey:
    return replace(HEALTHY, consumers=(replace(CONSUMER, **changes),))


def with_state(survey: StreamSurvey = HEALTHY, **changes: Any) -> StreamSurvey:
    return replace(survey, state=replace(survey.state, **changes))


def test_a_healthy_stream_has_shares_and_no_warning() -> None:
    status = status_of(HEALTHY)
    assert (status.bytes_share, status.fullest_subject, status.fullest_subject_share) == (0.1, "telemetry.a", 0.06)
    assert status.oldest_age_s == 600
    assert status.age_share == pytest.approx(1 / 6)
    assert status.warnings == ()


def test_an_empty_stream_has_no_age() -> None:
    empty = replace(with_state(messages=0, bytes=0, first_ts_ns=None, last_ts_ns=None), subject_messages={})
    status = status_of(empty)
    assert (status.oldest_age_s, status.age_share, status.fullest_subject) == (None, None, None)
    assert status.warnings == ()


@pytest.mark.parametrize(
    ("survey", "warning"),
    [
        (with_state(bytes=900_000), "90% of its bytes are used; at 100% old messages give way to new ones"),
        (
            replace(with_state(bytes=900_000), config={**HEALTHY.config, "discard": "new"}),
            "90% of its bytes are used; at 100% publishers are refused",
        ),
        (
            replace(HEALTHY, subject_messages={"telemetry.a": 9000}),
            "telemetry.a holds 90% of its limit; at 100% its old messages give way",
        ),
        (
            with_consumer(delivered_stream_seq=400, pending=500),
            "100 messages were gone before ingest-workers got them",
        ),
        (
            with_consumer(delivered_stream_seq=0, pending=1000, waiting_pulls=0),
            "nobody pulls from ingest-workers, and 1,000 messages wait",
        ),
        (with_consumer(paused=True), "ingest-workers is paused"),
        (
            with_state(with_consumer(ack_floor_stream_seq=0, ack_pending=1000), first_ts_ns=NOW_NS - 3400 * 10**9),
            "ingest-workers has not processed the oldest message, at 94% of its life",
        ),
    ],
)
def test_each_danger_is_named(survey: StreamSurvey, warning: str) -> None:
    assert status_of(survey).warnings == (warning,)


@pytest.mark.parametrize(
    "survey",
    [
        # processed messages may grow old, a bucket's key is always at its limit of one, a filter hides messages
        with_state(first_ts_ns=NOW_NS - 3599 * 10**9),
        replace(HEALTHY, config={"discard": "new", "max_msgs_per_subject": 1}),
        with_consumer(filtered=True, delivered_stream_seq=10),
        # the consumer was read after the stream, and is ahead of it
        with_consumer(delivered_stream_seq=1200, ack_floor_stream_seq=1100, pending=50),
    ],
)
def test_what_is_in_order_raises_no_alarm(survey: StreamSurvey) -> None:
    assert status_of(survey).warnings == ()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5s"), (59, "59s"), (3600, "1h"), (3661, "1h 1m"), (90_000, "1d 1h"), (120, "2m"), (0, "0s")],
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (17, "17 B"), (1 << 30, "1 GiB"), (256 << 20, "256 MiB"), (1536, "1.5 KiB")]
)
def test_bytes_are_short(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("2026-11-23T14:59:44.253314006Z", 1_795_445_984_253_314_006),
        ("2026-11-23T14:59:45.08385338Z", 1_795_445_985_083_853_380),
        ("2026-11-23T14:59:45Z", 1_795_445_985_000_000_000),
        ("2026-11-23T16:59:45.5+02:00", 1_795_445_985_500_000_000),
        ("1970-01-01T00:00:00.000000001Z", 1),
    ],
)
def test_a_time_of_the_server_is_exact_to_the_nanosecond(text: str, nanoseconds: int) -> None:
    assert time_ns(text) == nanoseconds
