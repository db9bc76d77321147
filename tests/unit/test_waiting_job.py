"""A job that waits: its schedule, and what it says of its past."""

from __future__ import annotations

from datetime import UTC, datetime

from pulse.domain.dead_letter import Letter, Summary, replay_of
from pulse.domain.envelope import wrap
from pulse.domain.route import make_job, read_job
from pulse.domain.settlement import Message
from pulse.domain.subjects import MessageType
from pulse.domain.waiting_job import Past, later, origin_subject, past_of

ENVELOPE = wrap(
    tenant_id="acme",
    device_id="t-1",
    message_type=MessageType.TELEMETRY,
    received_ms=1_790_000_000_000,
    source="http",
    payload=b'{"metrics":{"n":1}}',
)
BODY = make_job(ENVELOPE, route_id="r-1", position=42)
JOB = read_job("routes.acme", BODY)


def message(subject: str, headers: bytes = b"") -> Message:
    return Message(subject, BODY, headers, "", 7, 1_790_000_000_500_000_000, 1)


def test_a_new_job_has_no_attempts_and_began_when_it_came() -> None:
    assert past_of(message("routes.acme")) == Past(0, 1_790_000_000_500)


def test_a_job_that_waited_knows_its_attempts_and_when_it_first_came() -> None:
    written = later(JOB, BODY, Past(2, 1_789_999_999_000), at_s=1_790_000_001.5, after="ROUTES/1/7")
    block = "NATS/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in written.headers.items()) + "\r\n"
    assert past_of(message("later.due.acme", block.encode())) == Past(2, 1_789_999_999_000)


def test_what_makes_no_sense_in_a_header_is_as_good_as_none() -> None:
    block = b"NATS/1.0\r\nPulse-Attempt: -1\r\nPulse-Since: soon\r\n\r\n"
    assert past_of(message("routes.acme", block)) == Past(0, 1_790_000_000_500)


def test_a_job_waits_once_under_a_subject_of_its_own_and_goes_where_its_time_has_come() -> None:
    written = later(JOB, BODY, Past(1, 5), at_s=1_790_000_001.5, after="ROUTES/1/7")
    assert written.subject == "later.at.acme.42-r-1"
    assert written.headers["Nats-Schedule"] == "@at 2026-09-21T14:13:21.500000Z"
    assert written.headers["Nats-Schedule-Target"] == "later.due.acme"
    assert written.headers["Nats-Msg-Id"] == "later/ROUTES/1/7"
    assert written.body == BODY


def test_a_job_that_waited_is_of_the_subject_under_which_it_first_came() -> None:
    assert origin_subject(message("later.due.acme")) == "routes.acme"
    assert origin_subject(message("routes.acme")) == "routes.acme"


def test_a_job_that_is_replayed_begins_anew() -> None:
    names = {"Pulse-Attempt": "3", "Pulse-Since": "5", "Other": "kept"}
    block = "NATS/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in names.items()) + "\r\n"
    at = datetime(2026, 9, 21, tzinfo=UTC)
    summary = Summary(
        id=1, stream="ROUTES", sequence=7, subject="routes.acme", tenant_id="acme", device_id="t-1",
        reason="delivery_attempts", error="500", body_bytes=len(BODY), attempts=3, published_at=at, died_at=at,
        replays=0, replayed_at=None, replayed_sequence=None, replay_of=None,
    )  # fmt: skip
    letter = Letter(summary=summary, headers=block.encode(), body=BODY)
    assert {"Pulse-Attempt", "Pulse-Since"} & set(replay_of(letter).headers) == set()
    assert replay_of(letter).headers["Other"] == "kept"
