"""What a server has: configurations as it reports them, and the state that the cost of a change is derived from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ActualConsumer:
    """A consumer; `config` is the API's own object, fields that Pulse does not know included."""

    config: Mapping[str, object]
    delivered_stream_seq: int = 0
    ack_pending: int = 0
    redelivered: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ActualStream:
    """A stream; `config` is the API's own object, fields that Pulse does not know included.

    `subject_messages` (the number of messages of each subject) and `first_kept_seq` (the first sequence that is
    younger than the declared `max_age`) are evidence that costs extra calls: None where nobody had to look.
    """

    config: Mapping[str, object]
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    first_ts_ns: int = 0
    last_ts_ns: int = 0
    deleted: int = 0
    subjects: int = 0
    consumers: Mapping[str, ActualConsumer] = field(default_factory=dict)
    subject_messages: tuple[int, ...] | None = None
    first_kept_seq: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Actual:
    """One JetStream account at the server's time `now_ns` (nanoseconds since 1970)."""

    streams: Mapping[str, ActualStream]
    now_ns: int
    api_level: int
    """JetStream's API level: 1 since nats-server 2.11, 2 since 2.12, which brought atomic batches; 0 before."""
    clustered: bool
