"""What becomes of a job after an attempt: a table.

    the destination said       the job
    2xx                        delivered
    410                        dead, and its route is disabled: nobody is there any more
    408, 425, 429              tried again
    any other 4xx              dead: it would be refused again
    1xx, 3xx, 5xx, others      tried again; a redirect is not followed, so nothing was delivered
    nothing (Failure)          tried again; except that a target which is not allowed is dead

Tried again is: no earlier than `Retry-After` says, and after a backoff. A job that has had `attempts_max`, or whose
destination wants more time than a job has, is dead. Each job ends once; the driver executes what is decided here.
Source: RFC 9110 (15, 10.2.3), RFC 6585 (429), RFC 8470 (425), the Standard Webhooks specification.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum

import msgspec

from pulse.domain.retry import delay_s


class Failure(StrEnum):
    """Why an attempt has no status; the value stands in metrics and in the record of attempts."""

    RESOLVE = "resolve"
    """The host's name has no address now."""
    CONNECT = "connect"
    CONNECT_TIMEOUT = "connect_timeout"
    TLS = "tls"
    TIMEOUT = "timeout"
    """Connected, but no answer in time."""
    DISCONNECTED = "disconnected"
    PROTOCOL = "protocol"
    """The answer is no HTTP."""
    FORBIDDEN_TARGET = "forbidden_target"


class Attempted(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt: a `status`, or a `failure` with its `error`.

    `retry_after` is the header as it came; `excerpt` the beginning of the body; `elapsed_s` is the whole attempt,
    `connect_s` the part until there was a connection, None where one was there already or none came to be.
    """

    status: int | None = None
    failure: Failure | None = None
    error: str = ""
    retry_after: str = ""
    excerpt: bytes = b""
    elapsed_s: float = 0.0
    connect_s: float | None = None

    @property
    def name(self) -> str:
        """What it is counted and shown as: `200`, `timeout`."""
        return str(self.status) if self.failure is None else self.failure.value


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often, and how long apart; `retry_after_s_max` is below how long the queue keeps a job."""

    attempts_max: int = 3
    delay_s_min: float = 5.0
    delay_s_max: float = 300.0
    retry_after_s_max: float = 20 * 3600.0


class DeadReason(StrEnum):
    """Why a job is dead; the value stands in the dead letter."""

    REFUSED = "refused_by_destination"
    GONE = "destination_gone"
    FORBIDDEN_TARGET = "forbidden_target"
    ATTEMPTS = "delivery_attempts"
    TOO_LATE = "retry_after_too_long"


class Delivered(msgspec.Struct, frozen=True):
    """The destination has it."""


class RetryAt(msgspec.Struct, frozen=True):
    """Not before this moment, in seconds since the epoch."""

    at_s: float


class Dead(msgspec.Struct, frozen=True):
    """It goes to the dead letters; with `disable_route` its route takes nothing more."""

    reason: DeadReason
    disable_route: bool = False


Decision = Delivered | RetryAt | Dead

RETRIED_STATUSES = frozenset({408, 425, 429})
GONE = 410


def decide(attempted: Attempted, *, attempt: int, now_s: float, policy: RetryPolicy, random: float) -> Decision:
    """What becomes of the job after its attempt number `attempt` (from 1); `random` is uniform in [0, 1)."""
    if (final := _final(attempted)) is not None:
        return final
    if attempt >= policy.attempts_max:
        return Dead(DeadReason.ATTEMPTS)
    asked_s = retry_after_s(attempted.retry_after, now_s=now_s)
    if asked_s > policy.retry_after_s_max:
        return Dead(DeadReason.TOO_LATE)
    backoff_s = delay_s(attempt, minimum_s=policy.delay_s_min, maximum_s=policy.delay_s_max, random=random)
    return RetryAt(now_s + max(backoff_s, asked_s))


def _final(attempted: Attempted) -> Delivered | Dead | None:
    status = attempted.status
    if attempted.failure is Failure.FORBIDDEN_TARGET:
        return Dead(DeadReason.FORBIDDEN_TARGET)
    if attempted.failure is not None or status is None:
        return None
    if 200 <= status <= 299:
        return Delivered()
    if status == GONE:
        return Dead(DeadReason.GONE, disable_route=True)
    if 400 <= status <= 499 and status not in RETRIED_STATUSES:
        return Dead(DeadReason.REFUSED)
    return None


def is_unwell(attempted: Attempted) -> bool:
    """Whether this speaks against the destination itself, and not against the one job: what opens its circuit.

    429 does not: it is there, and says when.
    """
    if attempted.failure is not None:
        return attempted.failure is not Failure.FORBIDDEN_TARGET
    return attempted.status is None or not (200 <= attempted.status <= 299 or 400 <= attempted.status <= 499)


def retry_after_s(text: str, *, now_s: float) -> float:
    """How many seconds `Retry-After` asks for, in either of its forms; 0 where it is none, or is in the past."""
    text = text.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:18])
    try:
        at = parsedate_to_datetime(text)
        return max(0.0, (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now_s)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


class Endurance(msgspec.Struct, frozen=True, kw_only=True):
    """When a route is disabled by itself: nothing delivered for `failing_s`, in at least `failures_min` attempts."""

    failing_s: float = 5 * 86_400.0
    failures_min: int = 20


class Record(msgspec.Struct, frozen=True):
    """A route's failures since it last delivered; `since_s` is when the first of them was, 0 where there is none."""

    since_s: float = 0.0
    failures: int = 0

    def after(self, attempted: Attempted, *, now_s: float) -> Record:
        """The record with one more attempt in it; what the destination refuses counts, as nothing reaches it."""
        if attempted.failure is None and attempted.status is not None and 200 <= attempted.status <= 299:
            return GOOD_RECORD
        return Record(self.since_s or now_s, self.failures + 1)

    def exhausts(self, endurance: Endurance, *, now_s: float) -> bool:
        """Whether the route should be disabled now."""
        return self.failures >= endurance.failures_min and now_s - self.since_s >= endurance.failing_s

    def since(self) -> datetime | None:
        """When the failures began."""
        return datetime.fromtimestamp(self.since_s, UTC) if self.failures else None


GOOD_RECORD = Record()
