"""A route as it is kept: with its history, what became of its last jobs, and how its destination is.

Header values and secrets are no part of it: they are written, used to send, and never told again.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from pulse.domain.route import Route


class StoredRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A route on record. `route.destination.headers` has the names of a webhook's headers, each with an empty value.

    `signed_since` is when its newest secret was made, None for a destination that is not signed; until
    `previous_secret_until` the one before is valid too. `disabled_reason` says why Pulse disabled it by itself, and is
    empty where somebody did, or nobody has.
    """

    route: Route
    created_at: datetime
    updated_at: datetime
    signed_since: datetime | None = None
    previous_secret_until: datetime | None = None
    disabled_reason: str = ""


class RouteAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at one job; `outcome` is what became of the job by it: `delivered`, `retry`, `dead`.

    `status` is None where there was no answer; then `failure` says why (`timeout`), and `error` in words. `excerpt` is
    the beginning of the answer's body.
    """

    at: datetime
    message_id: str
    device_id: str
    attempt: int
    outcome: str
    status: int | None = None
    failure: str = ""
    error: str = ""
    elapsed_ms: float = 0.0
    excerpt: str = ""


class RouteHealth(msgspec.Struct, frozen=True, kw_only=True):
    """How the destination of a route is, as the delivery role last told.

    `circuit` is that of its breaker: `closed`, `open`, `half_open`. `failures` are those since it last delivered, the
    first of them `failing_since`. The workers told how many `jobs` they made for it, how many more found no room in the
    queue, and of how many messages its expression had no answer (`unanswered`). Of an ordered route so many jobs stand
    `in_line`.
    """

    circuit: str = "closed"
    delivered: int = 0
    dead: int = 0
    failures: int = 0
    failing_since: datetime | None = None
    last_delivered_at: datetime | None = None
    last_failed_at: datetime | None = None
    told_at: datetime | None = None
    jobs: int = 0
    no_room: int = 0
    unanswered: int = 0
    in_line: int = 0
