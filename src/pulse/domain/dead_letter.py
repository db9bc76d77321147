"""Dead letters: what stands in the stream DEAD_LETTERS, and what is kept of each, listed, replayed.

Two kinds of message stand in DEAD_LETTERS:

    $JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{stream}.{consumer}    Exhausted: JetStream gave a message up; no body
    dead.{stream}                                                     Condemned: a role gave it up, whole, in JSON

A replay is a new message with the old body. It says where it comes from by the header `Pulse-Replay-Of`, so that one
that fails again can be traced to its origin.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import ID_PATTERN, is_id
from pulse.domain.ledger import SEQUENCE_MAX
from pulse.domain.settlement import REPLAY_FOR, DeadLetter, Message
from pulse.domain.subjects import tenant_of

T = TypeVar("T")

ADVISORY_PREFIX = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES."
CONDEMNED_PREFIX = "dead."
REPLAY_OF = "Pulse-Replay-Of"
ATTEMPT = "Pulse-Attempt"
SINCE = "Pulse-Since"
"""Of a job of a route: how many attempts were made at it, and when it first came, in ms since the epoch."""
MESSAGE_ID = "Nats-Msg-Id"

StreamName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
Sequence = Annotated[int, Meta(gt=0, le=SEQUENCE_MAX)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Nanoseconds = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Identity = Annotated[str, Meta(pattern=rf"^{ID_PATTERN}\Z")]


class Exhausted(msgspec.Struct, frozen=True):
    """A message that a consumer delivered as often as it may. Source: io.nats.jetstream.advisory.v1.max_deliver."""

    stream: StreamName
    consumer: str
    stream_seq: Sequence
    deliveries: Count
    timestamp: Annotated[datetime, Meta(tz=True)]


class Condemned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dead letter on its way to the table, for a role that cannot reach PostgreSQL, or has no ledger of its own.

    `body` and `headers` are base64 in JSON. `stream_seq` and `created_ns` (when that stream was made) name the message
    that is settled by this; a message that never came into its stream has neither.
    """

    v: Literal[1] = 1
    stream: StreamName
    subject: str
    reason: Reason
    error: str
    body: bytes
    headers: bytes = b""
    tenant_id: Identity | None = None
    device_id: Identity | None = None
    attempts: Count = 0
    published_ns: Nanoseconds
    stream_seq: Sequence | None = None
    created_ns: Nanoseconds | None = None

    @property
    def carrier(self) -> str:
        """The subject that it travels on."""
        return f"{CONDEMNED_PREFIX}{self.stream}"


def unpack(subject: str, body: bytes) -> Exhausted | Condemned:
    """Read a message of DEAD_LETTERS; Refusal INVALID_ENVELOPE where it is neither kind."""
    if subject.startswith(ADVISORY_PREFIX):
        return _decode(body, Exhausted)
    letter = _decode(body, Condemned)
    if subject != letter.carrier:
        raise Refusal(Reason.INVALID_ENVELOPE, f"a letter of {letter.stream} does not belong on subject {subject!r}")
    return letter


def _decode(body: bytes, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(Reason.INVALID_ENVELOPE, str(error)) from error


def unread(position: int, message: Message, reason: Reason, error: str) -> DeadLetter:
    """One message as a dead letter, without a look at its body, which may be what kills whoever looks."""
    tenant_id = tenant_of(message.subject)
    return DeadLetter(position, message, reason, error, tenant_id=tenant_id if is_id(tenant_id) else None)


def condemned(position: int, letter: Condemned) -> DeadLetter:
    """The message of `letter`, at `position`, as the dead letter that it says."""
    message = Message(
        subject=letter.subject,
        body=letter.body,
        headers=letter.headers,
        reply="",
        sequence=letter.stream_seq or 0,
        published_ns=letter.published_ns,
        attempts=letter.attempts,
    )
    return DeadLetter(
        position, message, letter.reason, letter.error, tenant_id=letter.tenant_id, device_id=letter.device_id
    )


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters; what is None does not matter. They died at `since` or later, and before `until`."""

    letter_id: int | None = None
    stream: str | None = None
    reason: str | None = None
    tenant_id: str | None = None
    device_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    replayed: bool | None = None
    route_id: str | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One dead letter in a list; `sequence` is its own in the stream, `replayed_sequence` that of its last replay.

    One that never came into its stream has no sequence there. `replay_of` is the id of the dead letter that was
    replayed as this one, and died again; `route_id` the route that wanted it, of a job that stands as we made it.
    """

    id: int
    stream: str
    sequence: int | None
    subject: str
    tenant_id: str | None
    device_id: str | None
    reason: str
    error: str
    body_bytes: int
    attempts: int
    published_at: datetime
    died_at: datetime
    replays: int
    replayed_at: datetime | None
    replayed_sequence: int | None
    replay_of: int | None
    route_id: str | None = None


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter whole; `died_again_as` are the ids of those that its replays became."""

    summary: Summary
    headers: bytes
    body: bytes
    died_again_as: tuple[int, ...] = ()


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The message that a replay publishes, to `stream` and nowhere else."""

    letter_id: int
    stream: str
    subject: str
    headers: Mapping[str, str]
    body: bytes


class Replayed(NamedTuple):
    """One letter that was published again: as which message of its stream, or why not."""

    letter_id: int
    stream: str
    sequence: int | None
    refusal: Refusal | None = None


_HEADER = re.compile(r"([!-9;-~]+):[ \t]*([^\r\n]*)\r\n")


def parse_headers(block: bytes) -> dict[str, str]:
    """The headers of a raw NATS header block by name; of several of one name the last. Source: NATS ADR-4."""
    return dict(_HEADER.findall(block.decode("utf-8", "surrogateescape").partition("\r\n")[2]))


def replay_of(letter: Letter, *, body: bytes | None = None) -> Replay:
    """The message that replays `letter`, with another `body` where one is given.

    Its message id follows from the letter, the count of its replays and the other body: a replay that was cut off and
    is repeated within the stream's duplicate window is one message, the next replay is another. Headers that instruct
    the server (Nats-…) belonged to the first publish and stay behind; a job begins anew, with all its attempts. Whose
    it was goes with it, for a body of which that cannot be read.
    """
    one = letter.summary
    kept = {name: value for name, value in parse_headers(letter.headers).items() if not _instructs(name)}
    edited = "" if body is None else f"-{hashlib.sha256(body).hexdigest()[:16]}"
    whose = {REPLAY_FOR: f"{one.tenant_id}/{one.device_id}"} if one.tenant_id and one.device_id else {}
    return Replay(
        letter_id=one.id,
        stream=one.stream,
        subject=one.subject,
        headers=kept | whose | {MESSAGE_ID: f"dead-letter-{one.id}-{one.replays + 1}{edited}", REPLAY_OF: str(one.id)},
        body=letter.body if body is None else body,
    )


def _instructs(name: str) -> bool:
    return name.lower().startswith("nats-") or name in (REPLAY_OF, ATTEMPT, SINCE)
