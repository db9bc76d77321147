"""Dead letters: what stands in DEAD_LETTERS is read or refused; a replay is one message however often it is cut off."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.dead_letter import (
    ADVISORY_PREFIX,
    MESSAGE_ID,
    REPLAY_OF,
    Condemned,
    Exhausted,
    Letter,
    Summary,
    condemned,
    parse_headers,
    replay_of,
    unpack,
    unread,
)
from pulse.domain.errors import Reason, Refusal
from pulse.domain.settlement import Message

ADVISORY = (
    b'{"type":"io.nats.jetstream.advisory.v1.max_deliver","id":"p2FvUWMvTkJ1QTlRQ3hkVFhHWjdFcg",'
    b'"timestamp":"2026-11-23T15:51:33.123456789Z","stream":"TELEMETRY","consumer":"ingest-workers","stream_seq":17,'
    b'"deliveries":3}'
)
NOW = datetime(2026, 11, 23, tzinfo=UTC)
CONDEMNED = Condemned(
    stream="ROUTES",
    subject="routes.t1",
    reason=Reason.CONFLICT,
    error="full",
    body=b"\xff\x00",
    published_ns=1,
    tenant_id="t1",
)


def letter(*, headers: bytes = b"", replays: int = 0, letter_id: int = 7) -> Letter:
    summary = Summary(
        id=letter_id,
        stream="TELEMETRY",
        sequence=5,
        subject="telemetry.t1",
        tenant_id=None,
        device_id=None,
        reason="invalid_json",
        error="no",
        body_bytes=4,
        attempts=1,
        published_at=NOW,
        died_at=NOW,
        replays=replays,
        replayed_at=None,
        replayed_sequence=None,
        replay_of=None,
    )
    return Letter(summary=summary, headers=headers, body=b"body")


def test_the_servers_advisory_is_read() -> None:
    found = unpack(f"{ADVISORY_PREFIX}TELEMETRY.ingest-workers", ADVISORY)
    assert isinstance(found, Exhausted)
    assert (found.stream, found.consumer, found.stream_seq, found.deliveries) == ("TELEMETRY", "ingest-workers", 17, 3)
    assert found.timestamp == datetime(2026, 11, 23, 15, 51, 33, 123457, UTC)


def test_a_letter_comes_back_as_it_was_sent() -> None:
    assert unpack(CONDEMNED.carrier, msgspec.json.encode(CONDEMNED)) == CONDEMNED
    dead = condemned(99, CONDEMNED)
    assert (dead.position, dead.reason, dead.message.body, dead.tenant_id) == (99, Reason.CONFLICT, b"\xff\x00", "t1")


@pytest.mark.parametrize(
    ("subject", "body"),
    [
        ("dead.ROUTES", b""),
        ("dead.ROUTES", b"\xff"),
        ("dead.ROUTES", b"[" * 10_000),
        ("dead.ROUTES", ADVISORY),
        ("dead.SHADOW", msgspec.json.encode(CONDEMNED)),
        ("dead.ROUTES.more", msgspec.json.encode(CONDEMNED)),
        (f"{ADVISORY_PREFIX}A.b", b"{}"),
        (f"{ADVISORY_PREFIX}A.b", ADVISORY.replace(b":17", b":0")),
        (f"{ADVISORY_PREFIX}A.b", ADVISORY.replace(b":17", b":70368744177664")),
        ("dead.ROUTES", msgspec.json.encode({**msgspec.to_builtins(CONDEMNED), "attempts": 2**40})),
        ("dead.ROUTES", msgspec.json.encode({**msgspec.to_builtins(CONDEMNED), "stream_seq": 2**50, "created_ns": 1})),
        ("dead.ROUTES", msgspec.json.encode({**msgspec.to_builtins(CONDEMNED), "stream_seq": 1, "created_ns": 2**63})),
    ],
)
def test_what_is_neither_is_refused(subject: str, body: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        unpack(subject, body)
    assert refused.value.reason is Reason.INVALID_ENVELOPE


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    for subject in ("dead.ROUTES", f"{ADVISORY_PREFIX}A.b"):
        with pytest.raises(Refusal):
            unpack(subject, body)


@pytest.mark.parametrize(("subject", "tenant_id"), [("telemetry.t1", "t1"), ("telemetry.a b", None), ("x", None)])
def test_who_is_buried_unread_belongs_to_the_tenant_of_its_subject(subject: str, tenant_id: str | None) -> None:
    message = Message(subject, b"body", b"", "", 5, 1, 3)
    dead = unread(9, message, Reason.MAX_DELIVERIES, "why")
    assert (dead.tenant_id, dead.device_id, dead.message) == (tenant_id, None, message)


def test_a_replay_is_the_same_message_until_it_is_recorded() -> None:
    first, again = replay_of(letter()), replay_of(letter())
    assert first == again
    assert (first.subject, first.stream, first.body) == ("telemetry.t1", "TELEMETRY", b"body")
    others = [
        replay_of(letter(replays=1)),
        replay_of(letter(letter_id=8)),
        replay_of(letter(), body=b"mended"),
        replay_of(letter(), body=b"mended otherwise"),
        replay_of(letter(letter_id=71)),
    ]
    ids = {each.headers[MESSAGE_ID] for each in (first, *others)}
    assert len(ids) == 6


def test_of_the_headers_all_are_kept_but_those_that_instruct_the_server() -> None:
    block = b"NATS/1.0\r\nNats-Msg-Id: old\r\nnats-batch-id: b\r\nPulse-Replay-Of: 3\r\nTrace: a: b\r\nEmpty: \r\n\r\n"
    headers = replay_of(letter(headers=block)).headers
    assert dict(headers) == {MESSAGE_ID: "dead-letter-7-1", REPLAY_OF: "7", "Trace": "a: b", "Empty": ""}


@given(st.binary(max_size=200))
def test_any_header_block_can_be_parsed(block: bytes) -> None:
    for name, value in parse_headers(b"NATS/1.0\r\n" + block).items():
        assert name.isascii()
        assert "\r" not in value
        assert "\n" not in value
