"""The way of all messages: what is read of its parts, and what is drawn of them.

devices ─► http ─┐               ┌─► TELEMETRY ─► ingest-workers ─► postgresql
           mqtt ─┴─► streams ────┼─► SHADOW ─► shadow-workers ─► …
                                 ├─► ROUTES ─► route-delivery ─► destinations
                                 └─► DEAD_LETTERS ─► rescue-workers ─► dead letters
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from pulse.domain.audit import StreamAudit

SPARK_POINTS = 60


class Health(StrEnum):
    """How a stage stands; `quiet` is well, without traffic, and `absent` has nothing that would work on it."""

    FLOWING = "flowing"
    QUIET = "quiet"
    WARNING = "warning"
    STUCK = "stuck"
    DOWN = "down"
    ABSENT = "absent"
    UNKNOWN = "unknown"


class SystemState(msgspec.Struct, frozen=True, kw_only=True):
    """NATS or PostgreSQL as this process sees it; `since` is Unix time in seconds."""

    name: str
    ok: bool
    since: float
    detail: str = ""


class StreamLevel(msgspec.Struct, frozen=True, kw_only=True):
    """One stream and the consumer that works on it; a limit, or a consumer, that is not there is None."""

    name: str
    created: str
    messages: int
    bytes: int
    bytes_max: int | None
    last_seq: int
    oldest_age_s: float | None
    consumer: str | None = None
    pending: int = 0
    ack_pending: int = 0
    redelivered: int = 0
    waiting_pulls: int = 0

    @property
    def lag(self) -> int:
        """What the consumer has not settled."""
        return self.pending + self.ack_pending

    @property
    def settled(self) -> int:
        """What it has; counts up while it works."""
        return self.last_seq - self.lag


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """What the roles' own metrics say, summed over those that answered; None where none of that kind did.

    `latency` is the histogram of received-to-stored: upper bound in seconds to cumulative count.
    `delivered` counts what destinations of routes have taken.
    """

    http: int | None = None
    mqtt: int | None = None
    delivered: int | None = None
    latency: Mapping[float, int] | None = None


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """Devices by whether they are there, dead letters that wait, and enabled routes, some of which deliver nothing."""

    online: int
    stale: int
    offline: int
    dead_letters: int
    routes: int = 0
    routes_failing: int = 0

    @property
    def devices(self) -> int:
        """All of them."""
        return self.online + self.stale + self.offline


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """All parts at one moment (`at_s`: Unix time); what could not be read is None."""

    at_s: float
    systems: tuple[SystemState, ...]
    streams: Mapping[str, StreamLevel] | None = None
    edge: Edge = Edge()
    fleet: Fleet | None = None
    audit: StreamAudit | None = None


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the picture; rates are messages a second, `why` says what is the matter."""

    health: Health
    why: str = ""
    rate: float | None = None
    lag: int | None = None
    messages: int | None = None
    age_s: float | None = None
    fill: float | None = None


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """What the console draws. `sparks` are the last SPARK_POINTS values of each figure, None where there was none."""

    at_ms: int
    systems: tuple[SystemState, ...]
    stages: Mapping[str, Stage]
    figures: Mapping[str, float | None]
    sparks: Mapping[str, Sequence[float | None]]
    audit: StreamAudit | None
    fleet: Fleet | None
