"""A job that waits: what the stream LATER keeps of it, and what a job says of its own past.

    routes.{tenant}                            ROUTES: a new job, or one that is replayed
    later.at.{tenant}.{position}-{route_id}    LATER: waits until its time; the server moves it, then, to
    later.due.{tenant}                         LATER: its time has come

One job waits once: a second schedule of it, such as a worker makes that was killed before its ack, takes the place of
the first. JetStream takes a schedule only into a stream that discards what is old, which ROUTES must not: hence two.
Source: ADR-51 of nats-architecture-and-design, "JetStream Message Scheduler".
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from pulse.domain.dead_letter import ATTEMPT, SINCE, parse_headers
from pulse.domain.route import Job
from pulse.domain.settlement import Message

DUE_PREFIX = "later.due."
AT_PREFIX = "later.at."
NS_PER_MS = 1_000_000


class Past(msgspec.Struct, frozen=True):
    """Of a job: how many attempts were made at it, and when it first came, in ms since the epoch."""

    attempts: int
    since_ms: int


class Later(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule as it is published: `headers` say when (`at_s`, since the epoch) it goes where."""

    subject: str
    headers: Mapping[str, str]
    body: bytes


def past_of(message: Message) -> Past:
    """What `message` says of its past; without such headers it is new."""
    headers = parse_headers(message.headers) if message.headers else {}
    published_ms = message.published_ns // NS_PER_MS
    return Past(_number(headers.get(ATTEMPT, ""), 0), _number(headers.get(SINCE, ""), published_ms))


def _number(text: str, otherwise: int) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 15 else otherwise


def origin_subject(message: Message) -> str:
    """The subject under which the job of `message` first came."""
    subject = message.subject
    return f"routes.{subject.removeprefix(DUE_PREFIX)}" if subject.startswith(DUE_PREFIX) else subject


def later(job: Job, body: bytes, past: Past, *, at_s: float, after: str) -> Later:
    """`job` as it waits until `at_s`; `after` names the message whose place it takes, so that it does so once."""
    at = datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return Later(
        subject=f"{AT_PREFIX}{job.tenant_id}.{job.position}-{job.route_id}",
        headers={
            "Nats-Schedule": f"@at {at}",
            "Nats-Schedule-Target": f"{DUE_PREFIX}{job.tenant_id}",
            "Nats-Msg-Id": f"later/{after}",
            ATTEMPT: str(past.attempts),
            SINCE: str(past.since_ms),
        },
        body=body,
    )
