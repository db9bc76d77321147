"""What a device may say: each bound, each type, each spelling of a time."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.errors import Reason, Refusal
from pulse.domain.telemetry import Bounds, PayloadDecoder

BOUNDS = Bounds(
    metric_count_max=3,
    metric_name_length_max=8,
    metric_string_length_max=10,
    ts_past_s_max=30 * 86_400,
    ts_future_s_max=3600,
)
NOW_MS = 1_790_000_000_000
decoder = PayloadDecoder(BOUNDS)


def refusal(payload: bytes) -> Refusal:
    with pytest.raises(Refusal) as refused:
        decoder.telemetry(payload, received_ms=NOW_MS, unique_keys=True)
    return refused.value


metrics = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8),
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=10),
    min_size=1,
    max_size=3,
)


@given(metrics, st.booleans())
def test_every_payload_within_the_bounds_reads_back(sent: dict[str, object], as_ascii: bool) -> None:
    """Whatever writes the JSON: with escapes or without, with spaces or without."""
    payload = json.dumps({"metrics": sent, "seq": 7}, ensure_ascii=as_ascii).encode()
    reading = decoder.telemetry(payload, received_ms=NOW_MS, unique_keys=True)
    assert reading.metrics == sent
    assert reading.seq == 7
    assert reading.ts_us == NOW_MS * 1000


@pytest.mark.parametrize(
    ("payload", "reason", "field"),
    [
        (b"", Reason.INVALID_JSON, ""),
        (b"{", Reason.INVALID_JSON, ""),
        (b'{"metrics":{"a":NaN}}', Reason.INVALID_JSON, ""),
        (b'{"metrics":{"a":Infinity}}', Reason.INVALID_JSON, ""),
        (b'{"metrics":{"a":"\\ud800"}}', Reason.INVALID_JSON, ""),
        (b'{"metrics":{"a":"\xff"}}', Reason.INVALID_JSON, ""),
        (b'{"metrics":{"a":1}} trailing', Reason.INVALID_JSON, ""),
        (b"[" * 100_000, Reason.INVALID_PAYLOAD, ""),
        (b'{"metrics":{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}}", Reason.INVALID_PAYLOAD, "metrics"),
        (b"[]", Reason.INVALID_PAYLOAD, ""),
        (b"5", Reason.INVALID_PAYLOAD, ""),
        (b"{}", Reason.INVALID_PAYLOAD, "metrics"),
        (b'{"metrics":{}}', Reason.INVALID_PAYLOAD, "metrics"),
        (b'{"metrics":[]}', Reason.INVALID_PAYLOAD, "metrics"),
        (b'{"metrics":{"a":1,"b":null}}', Reason.INVALID_PAYLOAD, "metrics.b"),
        (b'{"metrics":{"a":{"b":1}}}', Reason.INVALID_PAYLOAD, "metrics.a"),
        (b'{"metrics":{"a":1e999}}', Reason.INVALID_PAYLOAD, "metrics.a"),
        (b'{"metrics":{"a":9223372036854775808}}', Reason.INVALID_PAYLOAD, "metrics.a"),
        (b'{"metrics":{"a":"12345678901"}}', Reason.INVALID_PAYLOAD, "metrics.a"),
        (b'{"metrics":{"123456789":1}}', Reason.INVALID_PAYLOAD, "metrics"),
        (b'{"metrics":{"":1}}', Reason.INVALID_PAYLOAD, "metrics"),
        (b'{"metrics":{"a":1,"b":1,"c":1,"d":1}}', Reason.INVALID_PAYLOAD, "metrics"),
        (b'{"metrics":{"a":"\\u0000"}}', Reason.INVALID_PAYLOAD, "metrics.a"),
        (b'{"metrics":{"a\\u0000":1}}', Reason.INVALID_PAYLOAD, "metrics.a\0"),
        (b'{"metrics":{"a":1,"a":2}}', Reason.INVALID_PAYLOAD, ""),
        (b'{"metrics":{"a":1},"metrics":{"a":1}}', Reason.INVALID_PAYLOAD, ""),
        (b'{"metrics":{"a":1},"ts":1790000000,"ts":1790000000}', Reason.INVALID_PAYLOAD, ""),
        (b'{"metrics":{"a":1},"extra":1}', Reason.INVALID_PAYLOAD, "extra"),
        (b'{"metrics":{"a":1},"seq":-1}', Reason.INVALID_PAYLOAD, "seq"),
        (b'{"metrics":{"a":1},"seq":1.5}', Reason.INVALID_PAYLOAD, "seq"),
        (b'{"metrics":{"a":1},"seq":"1"}', Reason.INVALID_PAYLOAD, "seq"),
        (b'{"metrics":{"a":1},"site_id":""}', Reason.INVALID_PAYLOAD, "site_id"),
        (b'{"metrics":{"a":1},"site_id":"\\u0000"}', Reason.INVALID_PAYLOAD, "site_id"),
        (b'{"metrics":{"a":1},"ts":null}', Reason.INVALID_PAYLOAD, "ts"),
        (b'{"metrics":{"a":1},"ts":true}', Reason.INVALID_PAYLOAD, "ts"),
        (b'{"metrics":{"a":1},"ts":"yesterday"}', Reason.INVALID_PAYLOAD, "ts"),
        (b'{"metrics":{"a":1},"ts":"2026-09-21T12:00:00"}', Reason.INVALID_PAYLOAD, "ts"),
        (b'{"metrics":{"a":1},"ts":"2020-01-01T00:00:00Z"}', Reason.TIMESTAMP_OUT_OF_RANGE, "ts"),
        (b'{"metrics":{"a":1},"ts":0}', Reason.TIMESTAMP_OUT_OF_RANGE, "ts"),
        (b'{"metrics":{"a":1},"ts":-1e308}', Reason.TIMESTAMP_OUT_OF_RANGE, "ts"),
        (b'{"metrics":{"a":1},"ts":1e308}', Reason.TIMESTAMP_OUT_OF_RANGE, "ts"),
    ],
)
def test_each_fault_is_refused_with_its_reason_and_field(payload: bytes, reason: Reason, field: str) -> None:
    refused = refusal(payload)
    assert (refused.reason, refused.field) == (reason, field)


@pytest.mark.parametrize(
    ("ts", "expected_us"),
    [
        (b"1790000000", NOW_MS * 1000),
        (b"1790000000.25", NOW_MS * 1000 + 250_000),
        (b"1790000000250", NOW_MS * 1000 + 250_000),
        (b'"2026-09-21T14:13:20Z"', NOW_MS * 1000),
        (b'"2026-09-21T16:13:20.000001+02:00"', NOW_MS * 1000 + 1),
    ],
)
def test_a_time_is_rfc_3339_or_seconds_or_milliseconds(ts: bytes, expected_us: int) -> None:
    reading = decoder.telemetry(b'{"metrics":{"a":1},"ts":' + ts + b"}", received_ms=NOW_MS)
    assert reading.ts_us == expected_us


@given(st.timedeltas(timedelta(days=-20), timedelta(minutes=59)))
def test_a_time_keeps_its_microseconds(ago: timedelta) -> None:
    ts = datetime.fromtimestamp(NOW_MS / 1000, UTC) + ago
    payload = msgspec.json.encode({"metrics": {"a": 1}, "ts": ts})
    reading = decoder.telemetry(payload, received_ms=NOW_MS)
    assert reading.ts_us == NOW_MS * 1000 + ago // timedelta(microseconds=1)


def test_the_bounds_of_time_are_inclusive() -> None:
    for at_s in (-BOUNDS.ts_past_s_max, BOUNDS.ts_future_s_max):
        decoder.heartbeat(b'{"ts":%d}' % (NOW_MS + at_s * 1000), received_ms=NOW_MS)
    for at_s in (-BOUNDS.ts_past_s_max - 1, BOUNDS.ts_future_s_max + 1):
        with pytest.raises(Refusal):
            decoder.heartbeat(b'{"ts":%d}' % (NOW_MS + at_s * 1000), received_ms=NOW_MS)


def test_a_key_like_text_in_a_value_is_not_taken_for_a_repeated_key() -> None:
    payload = b'{"metrics":{"a":"\\"a\\":1","b":"a: "}, "seq" : 1}'
    assert decoder.telemetry(payload, received_ms=NOW_MS, unique_keys=True).metrics == {"a": '"a":1', "b": "a: "}


@given(st.binary(max_size=100).filter(lambda payload: payload.strip() != b"{}"))
def test_no_bytes_do_worse_than_a_refusal(payload: bytes) -> None:
    for read in (decoder.telemetry, decoder.heartbeat):
        with pytest.raises(Refusal):
            read(payload, received_ms=NOW_MS)
