"""What the roles of one process share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import msgspec
from prometheus_client import CollectorRegistry

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.postgres.pool import Pool
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.runtime.health import Check
from pulse.runtime.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What the roles of one process share, and what they add to it."""

    settings: Settings
    nats: PulseClient
    pool: Pool
    metrics: CollectorRegistry
    probe: Callable[[str], None]
    stack: AsyncExitStack
    checks: list[Check] = field(default_factory=list)

    def decoder(self) -> PayloadDecoder:
        """The payload rules of the settings."""
        return PayloadDecoder(payload_bounds(self.settings))


def payload_bounds(settings: Settings) -> Bounds:
    """What a payload may be; a reading that retention would drop at once is too old to be accepted."""
    bounds = msgspec.convert(settings, Bounds, from_attributes=True)
    if not settings.telemetry_retention_days:
        return bounds
    kept_s = settings.telemetry_retention_days * 86_400
    return msgspec.structs.replace(bounds, ts_past_s_max=min(bounds.ts_past_s_max, kept_s))
