"""What the audit finds, as metrics."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from pulse.domain.audit import StreamAudit
from pulse.runtime.metrics.table import gauge


class AuditMetrics:
    """Tells where the messages are that a stream has accepted, in all of its makings."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._messages = gauge(registry, "pulse_audit_messages")

    def audited(self, stream: str, makings: Sequence[StreamAudit]) -> None:
        """The equation of each making of `stream`; they are summed."""
        for state in ("accepted", "stored", "dead", "in_flight", "expired"):
            self._messages.labels(stream, state).set(sum(getattr(making, state) for making in makings))
