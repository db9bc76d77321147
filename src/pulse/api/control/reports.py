"""The answers of the control API about what devices have sent, and about the streams."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pulse.api.control.models import Answer
from pulse.domain.presence import Presence


class Reading(Answer):
    """One row of telemetry."""

    ts: datetime
    seq: int | None
    site_id: str | None
    metrics: dict[str, Any]
    position: int


class ReadingPage(Answer):
    """Rows in the order of (ts, position); `next` is the `cursor` of the next page."""

    readings: list[Reading]
    next: str | None


class Bucket(Answer):
    """One bucket that is not empty, by its first instant."""

    ts: datetime
    metrics: dict[str, Any]


class BucketPage(Answer):
    """All buckets that are not empty."""

    bucket_s: int
    aggregate: str
    buckets: list[Bucket]


class LatestValue(Answer):
    """The latest value of one metric, and as of when."""

    ts: datetime
    value: Any


class LatestReading(Answer):
    """When the device was last heard of, the latest value of each metric, and the newest row (null: there is none).

    A metric may be up to a second behind the rows.
    """

    last_seen: datetime | None
    presence: Presence
    metrics: dict[str, LatestValue]
    reading: Reading | None


class ConsumerStatus(Answer):
    """One consumer; `lag` is what it has not settled, `lost` what left the stream before it was delivered."""

    name: str
    pending: int
    ack_pending: int
    redelivered: int
    lag: int
    lost: int
    waiting_pulls: int
    paused: bool


class StreamStatus(Answer):
    """One stream that is there; a limit is null where there is none. `keeps_acked`: what is acknowledged stays."""

    name: str
    messages: int
    bytes: int
    bytes_max: int | None
    keeps_acked: bool
    age_s_max: float | None
    oldest_age_s: float | None
    first_seq: int
    last_seq: int
    deleted: int
    replicas: int
    created: str
    consumers: list[ConsumerStatus]


class Difference(Answer):
    """One field that is other than declared."""

    field: str
    declared: Any
    actual: Any


class Drift(Answer):
    """A stream or consumer that is not as declared, and what `pulse streams apply` would do about it."""

    target: str
    action: str
    differences: list[Difference]


class StreamsStatus(Answer):
    """All declared streams: those that are there, and all that differs from what is declared."""

    as_declared: bool
    drift: list[Drift]
    streams: list[StreamStatus]


class StreamEquation(Answer):
    """accepted = stored + dead + in_flight + expired, of one making of a stream."""

    stream: str
    epoch: int
    accepted: int
    stored: int
    dead: int
    in_flight: int
    expired: int


class AuditReport(Answer):
    """`ok` is false where the equation does not add up, or messages expired unprocessed."""

    ok: bool
    audits: list[StreamEquation]
