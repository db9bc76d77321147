"""What is counted of routes, by outcome and never by route: a series for each would be without bound."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from pulse.runtime.metrics.table import counter, gauge

UNANSWERED = ("error", "stopped", "too_costly")
"""Each is there from the start, so that its first increase is seen as one."""


class RoutingMetrics:
    """Counts what a worker makes of the messages that it stores."""

    def __init__(self, registry: CollectorRegistry) -> None:
        jobs = counter(registry, "pulse_routing_jobs_total")
        self._jobs = jobs.labels("job")
        self._no_room = jobs.labels("no_room")
        self._refused = jobs.labels("refused")
        unanswered = counter(registry, "pulse_routing_unanswered_total")
        self._unanswered = {reason: unanswered.labels(reason) for reason in UNANSWERED}
        self._routes = gauge(registry, "pulse_routes")

    def routed(self, *, jobs: int, no_room: int, refused: int) -> None:
        """So many jobs were made, and so many became dead letters."""
        self._jobs.inc(jobs)
        self._no_room.inc(no_room)
        self._refused.inc(refused)

    def unanswered(self, reason: str) -> None:
        """An expression had no answer for a message."""
        self._unanswered[reason].inc()

    def routes(self, count: int) -> None:
        """So many are known."""
        self._routes.set(count)
