"""Every error that Pulse raises on purpose.

    PulseError
     ├── Refusal               the sender is at fault: a 4xx at the edge, a dead letter at a worker
     │    ├── LimitExceeded    it is larger, or comes more often, than a limit of ours allows
     │    └── VersionConflict  it was meant for another version of what it changes
     ├── Outage                a system is away: wait, retry; nobody's message is at fault
     │    ├── Overloaded       it is there, but what waits for it has reached its bound
     │    └── StreamFull       it is there, but the stream has reached its limits
     ├── ConfigurationError    the operator can mend it: settings, topology, ports        (exit code 2)
     └── CheckFailed           a check that ran to its end and found something wrong      (exit code 1)

A foreign error (asyncpg, nats, OSError) is mapped to one of these at the edge of its adapter, by type or
code and never by its text. Whatever is not in this tree is a bug and ends the process.
"""

from __future__ import annotations

from enum import StrEnum


class PulseError(Exception):
    """The root: `message` says in one line what is wrong, `hint` what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Reason(StrEnum):
    """Why a message was refused; the value is the contract: it stands in problem+json and in `dead_letters.reason`."""

    INVALID_IDENTITY = "invalid_identity"
    INVALID_JSON = "invalid_json"
    INVALID_ENVELOPE = "invalid_envelope"
    INVALID_PAYLOAD = "invalid_payload"
    INVALID_SUBJECT = "invalid_subject"
    INVALID_TOPIC = "invalid_topic"
    INVALID_REQUEST = "invalid_request"
    TIMESTAMP_OUT_OF_RANGE = "timestamp_out_of_range"
    INVALID_ENCODING = "invalid_encoding"
    TOO_LARGE = "too_large"
    RATE_LIMITED = "rate_limited"
    UNSUPPORTED_TYPE = "unsupported_type"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    UNKNOWN_COMMAND = "unknown_command"
    REFUSED_BY_DATABASE = "refused_by_database"
    MAX_DELIVERIES = "max_deliveries"
    REFUSED_BY_DESTINATION = "refused_by_destination"
    DESTINATION_GONE = "destination_gone"
    FORBIDDEN_TARGET = "forbidden_target"
    DELIVERY_ATTEMPTS = "delivery_attempts"
    RETRY_AFTER_TOO_LONG = "retry_after_too_long"
    EXPIRED = "expired"
    ROUTE_GONE = "route_gone"
    ROUTES_FULL = "routes_full"


class Refusal(PulseError):
    """A message or request that can never be accepted as it is.

    `field` is the path of the value at fault (`metrics.temp`), empty where it is the whole body; `position` is the
    offset in bytes at which reading the body as JSON stopped.
    """

    def __init__(self, reason: Reason, message: str, *, field: str = "", position: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.position = position


class LimitExceeded(Refusal):
    """A bound of ours: `limit` is the name of its setting, `value` what that allows.

    A bound of rate, which ends by itself, has a `retry_after_s`.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        limit: str,
        value: float,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason, message, field=field)
        self.limit = limit
        self.value = value
        self.retry_after_s = retry_after_s


class VersionConflict(Refusal):
    """A change was meant for another version than there is: `version`."""

    def __init__(self, version: int, *, what: str = "shadow") -> None:
        super().__init__(Reason.CONFLICT, f"the {what} is at version {version}", field="version")
        self.version = version


class Outage(PulseError):
    """A system that Pulse needs is away; `system` is `nats`, `postgresql` or `mqtt`.

    `retry_after_s` is how long the sender should wait before its next try: the `Retry-After` of a 503.
    """

    def __init__(self, system: str, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.system = system
        self.retry_after_s = retry_after_s


class Overloaded(Outage):
    """The system is there, but as much waits for it as may wait: nothing of this message was sent."""


class StreamFull(Outage):
    """JetStream is there, but the stream takes nothing more: what it holds has reached its limits."""


class ConfigurationError(PulseError):
    """Something that the operator has to change before this can work."""


class CheckFailed(PulseError):
    """A check that ran and failed: drift, an audit that does not add up, messages lost to a limit."""
