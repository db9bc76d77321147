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
        return PayloadDecoder(msgspec.convert(self.settings, Bounds, from_attributes=True))
