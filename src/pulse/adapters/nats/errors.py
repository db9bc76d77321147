"""What a failed call to NATS says: the system is away, the operator has to change something, or the code is wrong.

    nats-py's type                                                          becomes
    timeout, closed, stale, reconnecting, draining, no servers,
    no responders, outbound buffer full, OSError                            Outage
    authorization, TLS wanted or required                                   ConfigurationError
    JetStream's answer, by its `err_code`, else by its `code`               see `from_jetstream`
    all others (bad subject, bad header, payload too large, …)              raised as they are: a bug

    JetStream's err_code                                                    becomes
    code 503, and CLUSTER_AWAY below                                        Outage
    HINTS below, and all others                                             ConfigurationError

The codes: `server/errors.json` of nats-server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import nats.errors
import nats.js.errors

from pulse.domain.errors import ConfigurationError, Outage, PulseError

SYSTEM = "nats"
IS_IT_RUNNING = "is it running? `pulse up` starts one"
SERVICE_UNAVAILABLE = 503


class ErrorCode(IntEnum):
    """JetStream's `err_code`, as far as Pulse tells them apart."""

    CONSUMER_NOT_FOUND = 10014
    INVALID_JSON = 10025
    JETSTREAM_NOT_ENABLED_FOR_ACCOUNT = 10039
    NO_MESSAGE_FOUND = 10037
    SEQUENCE_NOT_FOUND = 10043
    INSUFFICIENT_STORAGE = 10047
    STREAM_NOT_FOUND = 10059
    SUBJECTS_OVERLAP = 10065
    REPLICAS_NOT_SUPPORTED = 10074
    JETSTREAM_NOT_ENABLED = 10076


CLUSTER_AWAY = frozenset({10008, 10009, 10118, 10119, 10194, 10195})
"""Cluster not available, not the leader, stream or consumer offline: it comes back by itself."""

HINTS = {
    ErrorCode.INVALID_JSON: "the server does not know a field: nats-server 2.12 or newer is needed",
    ErrorCode.JETSTREAM_NOT_ENABLED_FOR_ACCOUNT: "enable `jetstream` for the account in nats.conf",
    ErrorCode.JETSTREAM_NOT_ENABLED: "enable `jetstream` in nats.conf",
    ErrorCode.INSUFFICIENT_STORAGE: "raise `max_file_store` in nats.conf above the sum of the streams' max_bytes",
    ErrorCode.STREAM_NOT_FOUND: "`pulse streams apply` makes it",
    ErrorCode.CONSUMER_NOT_FOUND: "`pulse streams apply` makes it",
    ErrorCode.SUBJECTS_OVERLAP: "`pulse streams plan` names the other stream",
    ErrorCode.REPLICAS_NOT_SUPPORTED: "set stream_replicas to 1, or connect to a cluster",
}

OUTAGES = (
    OSError,  # TimeoutError, which is asyncio's as well, is one
    nats.errors.TimeoutError,
    nats.errors.ConnectionClosedError,
    nats.errors.ConnectionDrainingError,
    nats.errors.ConnectionReconnectingError,
    nats.errors.NoRespondersError,
    nats.errors.NoServersError,
    nats.errors.OutboundBufferLimitError,
    nats.errors.StaleConnectionError,
)
MISCONFIGURED = (
    nats.errors.AuthorizationError,
    nats.errors.SecureConnFailedError,
    nats.errors.SecureConnRequiredError,
    nats.errors.SecureConnWantedError,
)


class JetStreamRefusal(Exception):
    """JetStream's error answer to an API call; `doing` says to which. Caught, or mapped, inside this package."""

    def __init__(self, *, code: int, err_code: int, description: str, doing: str) -> None:
        super().__init__(f"{doing}: {description} ({err_code or code})")
        self.code = code
        self.err_code = err_code
        self.description = description
        self.doing = doing

    def mapped(self) -> PulseError:
        """The error of ours that it is."""
        return from_jetstream(self.code, self.err_code, self.description, doing=self.doing)


def from_jetstream(code: int, err_code: int, description: str, *, doing: str) -> PulseError:
    """The error of ours for a JetStream error answer; `doing` begins the sentence ("cannot create stream ROUTES")."""
    message = f"{doing}: {description} ({err_code or code})"
    if code == SERVICE_UNAVAILABLE or err_code in CLUSTER_AWAY:
        return Outage(SYSTEM, message)
    return ConfigurationError(message, hint=HINTS[ErrorCode(err_code)] if err_code in HINTS else "")


def to_pulse_error(error: BaseException, *, doing: str) -> PulseError | None:
    """The error of ours that `error` is, or None where it is a bug."""
    if isinstance(error, JetStreamRefusal):
        return error.mapped()
    if isinstance(error, nats.js.errors.APIError):
        return from_jetstream(
            error.code or 0, error.err_code or 0, error.description or type(error).__name__, doing=doing
        )
    if isinstance(error, MISCONFIGURED):
        return ConfigurationError(f"{doing}: {_what(error)}", hint="check nats_url")
    if isinstance(error, OUTAGES):
        return Outage(SYSTEM, f"{doing}: {_what(error)}", hint=IS_IT_RUNNING)
    return None


@contextmanager
def mapped(doing: str) -> Iterator[None]:
    """Raise what `to_pulse_error` says; a bug as it is. Wrap calls to NATS only: any OSError within counts as its."""
    try:
        yield
    except (nats.errors.Error, JetStreamRefusal, OSError) as error:
        mine = to_pulse_error(error, doing=doing)
        if mine is None:
            raise
        raise mine from error


def _what(error: BaseException) -> str:
    if isinstance(error, nats.errors.NoRespondersError):
        return "JetStream does not answer: it is not enabled there, or not ready yet"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return str(error).removeprefix("nats: ") or type(error).__name__
