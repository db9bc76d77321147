"""Error answers: every reason has a status, and what a sender is told is what it can use."""

from __future__ import annotations

import msgspec
import pytest

from pulse.api.problem import STATUS, TITLE, UNPROCESSABLE, answer_to, problem, problem_of
from pulse.domain.errors import LimitExceeded, Outage, Overloaded, Reason, Refusal


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_status_and_a_title(reason: Reason) -> None:
    status, headers, body = answer_to(Refusal(reason, "why", field="metrics.a"))
    told = msgspec.json.decode(body)
    assert 400 <= status < 500
    assert (b"content-type", b"application/problem+json") in headers
    assert told == {
        "status": status, "title": TITLE[status], "detail": "why", "reason": reason.value, "field": "metrics.a",
    }  # fmt: skip
    assert status == STATUS.get(reason, UNPROCESSABLE)


def test_a_position_is_told_even_where_it_is_zero() -> None:
    _, _, body = answer_to(Refusal(Reason.INVALID_JSON, "why", position=0))
    assert msgspec.json.decode(body)["position"] == 0


@pytest.mark.parametrize(("after_s", "told"), [(0.0, b"1"), (0.2, b"1"), (1.0, b"1"), (1.2, b"2"), (90.0, b"90")])
def test_a_limit_of_rate_says_when_to_come_again(after_s: float, told: bytes) -> None:
    status, headers, body = answer_to(
        LimitExceeded(Reason.RATE_LIMITED, "why", limit="device_messages_per_s", value=2.5, retry_after_s=after_s)
    )
    decoded = msgspec.json.decode(body)
    assert status == 429
    assert dict(headers)[b"retry-after"] == told
    assert (decoded["limit"], decoded["limit_value"]) == ("device_messages_per_s", 2.5)


def test_a_limit_of_size_does_not() -> None:
    status, headers, body = answer_to(LimitExceeded(Reason.TOO_LARGE, "why", limit="body_bytes_max", value=10))
    assert status == 413
    assert b"retry-after" not in dict(headers)
    assert msgspec.json.decode(body)["limit_value"] == 10


@pytest.mark.parametrize(("kind", "reason"), [(Outage, "unavailable"), (Overloaded, "overloaded")])
def test_an_outage_is_503_with_its_own_retry_after_and_none_of_its_words(kind: type[Outage], reason: str) -> None:
    status, headers, body = answer_to(kind("nats", "10.0.0.7 refuses pulse:secret", hint="look", retry_after_s=2.5))
    assert status == 503
    assert dict(headers)[b"retry-after"] == b"3"
    assert b"secret" not in body
    assert b"look" not in body
    assert msgspec.json.decode(body)["reason"] == reason


def test_401_names_the_scheme_and_415_the_codings() -> None:
    assert dict(answer_to(Refusal(Reason.UNAUTHENTICATED, "no"))[1])[b"www-authenticate"] == b'Bearer realm="pulse"'
    coding = dict(answer_to(Refusal(Reason.UNSUPPORTED_TYPE, "no", field="Content-Encoding"))[1])
    assert coding[b"accept-encoding"] == b"gzip, zstd"
    assert b"accept-encoding" not in dict(answer_to(Refusal(Reason.UNSUPPORTED_TYPE, "no", field="Content-Type"))[1])


def test_a_problem_without_extensions_has_none() -> None:
    assert msgspec.json.decode(problem(404, "nothing here")[2]) == {
        "status": 404, "title": "Not Found", "detail": "nothing here",
    }  # fmt: skip
    assert problem_of(Refusal(Reason.FORBIDDEN, "no")).limit_value is None
