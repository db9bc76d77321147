"""How streams stand: what is declared, what is there, how far their consumers are behind."""

from __future__ import annotations

import msgspec


class ConsumerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One consumer; `lag` is what it has not settled, `lost` what left the stream before it was delivered."""

    name: str
    pending: int
    ack_pending: int
    redelivered: int
    lag: int
    lost: int
    waiting_pulls: int
    paused: bool


class StreamStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One stream that is there; a limit is None where there is none. `keeps_acked`: what is acknowledged stays."""

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
    consumers: tuple[ConsumerStatus, ...]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One field that is other than declared."""

    field: str
    declared: object
    actual: object


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """A stream or consumer that is not as declared; `action` and `cost`: what `pulse streams apply` would do."""

    target: str
    action: str
    differences: tuple[Difference, ...]
    cost: str = ""


class StreamsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All declared streams: those that are there, and all that differs from what is declared."""

    as_declared: bool
    drift: tuple[Drift, ...]
    streams: tuple[StreamStatus, ...]
