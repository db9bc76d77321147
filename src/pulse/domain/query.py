"""Questions about telemetry: which range, which metrics, as they are or in buckets; and where the next page begins.

    from ≤ ts < to     both RFC 3339 with an offset, or a number: seconds, or milliseconds from 1e11 on
    bucket             `30s`, `5m`, `1h`, `1d`: whole multiples counted from 1970-01-01T00:00Z
    cursor             `{ts in µs}_{position}` of the last row that was given, opaque to whoever sends it back

Rows are ordered by (ts, position), which no two rows share. A row that is stored later with an earlier ts is not seen
by a reader whose cursor is past it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Literal

import msgspec

from pulse.domain.errors import Reason, Refusal
from pulse.domain.labels import check_text
from pulse.domain.presence import Presence
from pulse.domain.telemetry import EPOCH, MILLISECONDS_FROM

SECOND_US = 1_000_000
RANGE_S_DEFAULT = 24 * 3600
ROWS_DEFAULT = 1000
METRIC_NAMES_MAX = 50
METRIC_NAME_LENGTH_MAX = 1024
UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
BUCKET_S_MAX = 3660 * UNIT_S["d"]
TS_US_MIN = -62_135_596_800 * SECOND_US
TS_US_MAX = 253_402_300_799 * SECOND_US
"""The years 1 to 9999, which is what a datetime holds."""

BUCKET_PATTERN = "^([1-9][0-9]{0,7})([smhd])$"
CURSOR_PATTERN = "^(-?[0-9]{1,18})_([0-9]{1,19})$"
_BUCKET = re.compile(BUCKET_PATTERN)
_CURSOR = re.compile(CURSOR_PATTERN)
_NUMBER = re.compile(r"-?[0-9]{1,17}(\.[0-9]{1,9})?")
_LOST_PLUS = re.compile(r" (\d\d:?\d\d)$")


class Aggregate(StrEnum):
    """What becomes of the values of one metric in one bucket; all but `count` and `last` are of numbers alone."""

    AVG = "avg"
    MIN = "min"
    MAX = "max"
    SUM = "sum"
    COUNT = "count"
    LAST = "last"


class Cursor(msgspec.Struct, frozen=True):
    """A place between two rows: behind the one with this ts (µs) and position."""

    ts_us: int
    position: int

    def __str__(self) -> str:
        return f"{self.ts_us}_{self.position}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read what `str` made. Raises Refusal INVALID_REQUEST."""
        found = _CURSOR.fullmatch(text)
        ts_us, position = (int(found[1]), int(found[2])) if found else (TS_US_MIN - 1, 0)
        if not TS_US_MIN <= ts_us <= TS_US_MAX or position >= 2**63:
            raise Refusal(Reason.INVALID_REQUEST, "not a cursor of ours: send back `next` as it came", field="cursor")
        return cls(ts_us, position)


class QueryBounds(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one question."""

    range_s_max: int
    rows_max: int
    buckets_max: int


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What a sender asks, word for word; None and empty where a word is absent."""

    since: str | None = None
    until: str | None = None
    metrics: Sequence[str] = ()
    bucket: str | None = None
    aggregate: Aggregate | None = None
    limit: int | None = None
    cursor: str | None = None
    order: Literal["asc", "desc"] = "asc"


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """A checked question about rows: `since ≤ ts < until`, the metrics (None: all), at most `limit` behind `cursor`."""

    since: datetime
    until: datetime
    metrics: tuple[str, ...] | None
    limit: int
    cursor: Cursor | None
    descending: bool


class BucketQuery(msgspec.Struct, frozen=True, kw_only=True):
    """A checked question about buckets of `bucket_s` seconds."""

    since: datetime
    until: datetime
    metrics: tuple[str, ...] | None
    bucket_s: int
    aggregate: Aggregate


class StoredReading(msgspec.Struct, frozen=True, kw_only=True):
    """One row of telemetry; `metrics` is the JSON as the database has it, so no number loses a digit."""

    ts: datetime
    seq: int | None
    site_id: str | None
    metrics: msgspec.Raw
    position: int

    @property
    def cursor(self) -> Cursor:
        """The place behind this row."""
        return Cursor(_microseconds(self.ts), self.position)


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """One bucket that is not empty, by its first instant; a value for each metric that has one in it."""

    ts: datetime
    metrics: dict[str, msgspec.Raw]


class LatestValue(msgspec.Struct, frozen=True, kw_only=True):
    """The latest value of one metric, and as of when."""

    ts: datetime
    value: msgspec.Raw


class Latest(msgspec.Struct, frozen=True, kw_only=True):
    """When a device was last heard of, its latest values, and its newest row (None where there is none)."""

    last_seen: datetime | None
    presence: Presence
    metrics: dict[str, LatestValue]
    reading: StoredReading | None


def parse_question(question: Question, *, now: datetime, bounds: QueryBounds) -> Query | BucketQuery:
    """Check `question`; a BucketQuery where it names a bucket. Raises Refusal INVALID_REQUEST with the field."""
    until = now if question.until is None else parse_instant(question.until, field="to")
    since = _default_since(until) if question.since is None else parse_instant(question.since, field="from")
    if since >= until:
        raise Refusal(Reason.INVALID_REQUEST, "from must be before to", field="from")
    if until - since > timedelta(seconds=bounds.range_s_max):
        message = f"the range may be {bounds.range_s_max} s long; ask for it in parts"
        raise Refusal(Reason.INVALID_REQUEST, message, field="from")
    metrics = _metrics(question.metrics)
    if question.bucket is not None:
        return _bucket_query(question, since, until, metrics, bounds)
    if question.aggregate is not None:
        raise Refusal(Reason.INVALID_REQUEST, "an aggregate needs a bucket, like bucket=5m", field="bucket")
    limit = min(ROWS_DEFAULT, bounds.rows_max) if question.limit is None else question.limit
    if not 1 <= limit <= bounds.rows_max:
        raise Refusal(Reason.INVALID_REQUEST, f"must be 1 to {bounds.rows_max}", field="limit")
    return Query(
        since=since,
        until=until,
        metrics=metrics,
        limit=limit,
        cursor=None if question.cursor is None else Cursor.parse(question.cursor),
        descending=question.order == "desc",
    )


def parse_instant(text: str, *, field: str) -> datetime:
    """The instant that `text` names, in UTC. Raises Refusal INVALID_REQUEST that names `field`."""
    try:
        if _NUMBER.fullmatch(text):
            number = float(text)
            return EPOCH + timedelta(seconds=number if abs(number) < MILLISECONDS_FROM else number / 1000)
        # A plus that was not percent-encoded arrives as a space.
        instant = datetime.fromisoformat(_LOST_PLUS.sub(r"+\1", text))
        if instant.tzinfo is not None:
            return instant.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    message = "must be RFC 3339 with an offset, or seconds or milliseconds since 1970"
    raise Refusal(Reason.INVALID_REQUEST, message, field=field)


def parse_bucket(text: str) -> int:
    """Seconds of `30s`, `5m`, `1h`, `1d`. Raises Refusal INVALID_REQUEST."""
    found = _BUCKET.fullmatch(text)
    if found is None:
        raise Refusal(Reason.INVALID_REQUEST, "must be a count and a unit: 30s, 5m, 1h, 1d", field="bucket")
    bucket_s = int(found[1]) * UNIT_S[found[2]]
    if bucket_s > BUCKET_S_MAX:
        raise Refusal(Reason.INVALID_REQUEST, f"may be {BUCKET_S_MAX // UNIT_S['d']}d at most", field="bucket")
    return bucket_s


def bucket_count(since: datetime, until: datetime, bucket_s: int) -> int:
    """How many buckets [since, until) touches; the first and the last may be cut."""
    width_us = bucket_s * SECOND_US
    return (_microseconds(until) - 1) // width_us - _microseconds(since) // width_us + 1


def _bucket_query(
    question: Question, since: datetime, until: datetime, metrics: tuple[str, ...] | None, bounds: QueryBounds
) -> BucketQuery:
    bucket_s = parse_bucket(question.bucket or "")
    for name, value in (("cursor", question.cursor), ("limit", question.limit)):
        if value is not None:
            raise Refusal(Reason.INVALID_REQUEST, "buckets come in one answer, without pages", field=name)
    if question.order == "desc":
        raise Refusal(Reason.INVALID_REQUEST, "buckets come in the order of time", field="order")
    count = bucket_count(since, until, bucket_s)
    if count > bounds.buckets_max:
        message = f"that is {count} buckets, of {bounds.buckets_max} at most: a longer bucket, or a shorter range"
        raise Refusal(Reason.INVALID_REQUEST, message, field="bucket")
    return BucketQuery(
        since=since,
        until=until,
        metrics=metrics,
        bucket_s=bucket_s,
        aggregate=question.aggregate or Aggregate.AVG,
    )


def _metrics(given: Sequence[str]) -> tuple[str, ...] | None:
    """The names in `given`, each of which may be several with commas between; None where there are none."""
    if not given:
        return None
    names = tuple(dict.fromkeys(name for part in given for name in part.split(",")))
    if len(names) > METRIC_NAMES_MAX:
        raise Refusal(Reason.INVALID_REQUEST, f"names {METRIC_NAMES_MAX} metrics at most", field="metrics")
    for name in names:
        check_text(name, field="metrics", length_min=1, length_max=METRIC_NAME_LENGTH_MAX)
    return names


def _default_since(until: datetime) -> datetime:
    try:
        return until - timedelta(seconds=RANGE_S_DEFAULT)
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def _microseconds(instant: datetime) -> int:
    since = instant - EPOCH
    return (since.days * 86_400 + since.seconds) * SECOND_US + since.microseconds
