"""What is counted of the jobs of routes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry

from pulse.domain.breaker import Circuit
from pulse.domain.delivery import Attempted
from pulse.domain.errors import Reason
from pulse.runtime.metrics.table import counter, gauge, histogram

OUTCOMES = ("delivered", "retry", "parked", "lined_up", "dead", "left")
"""Each is there from the start, so that its first increase is seen as one; and so are the reasons."""
KINDS = ("webhook", "mqtt")
REASONS = (
    Reason.REFUSED_BY_DESTINATION,
    Reason.DESTINATION_GONE,
    Reason.FORBIDDEN_TARGET,
    Reason.DELIVERY_ATTEMPTS,
    Reason.RETRY_AFTER_TOO_LONG,
    Reason.EXPIRED,
    Reason.ROUTE_GONE,
    Reason.ROUTES_FULL,
)


class DeliveryMetrics:
    """Counts what a delivery worker does."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._jobs = counter(registry, "pulse_delivery_jobs_total")
        for outcome in OUTCOMES:
            self._jobs.labels(outcome)
        self._dead = counter(registry, "pulse_delivery_dead_total")
        for reason in REASONS:
            self._dead.labels(reason.value)
        self._attempts = counter(registry, "pulse_delivery_attempts_total")
        seconds = histogram(registry, "pulse_delivery_attempt_seconds")
        self._seconds = {kind: seconds.labels(kind) for kind in KINDS}
        self._redelivered = counter(registry, "pulse_delivery_redelivered_total")
        self._in_hand = gauge(registry, "pulse_delivery_in_hand")
        self._circuits = gauge(registry, "pulse_delivery_circuits")
        self._unrecorded = counter(registry, "pulse_delivery_unrecorded_total")
        self._waiting = gauge(registry, "pulse_delivery_waiting")
        self._backlog = gauge(registry, "pulse_delivery_backlog")

    def watch(self, *, in_hand: Callable[[], int], circuits: Callable[[], Mapping[Circuit, int]]) -> None:
        """Both are asked whenever the metrics are read."""
        self._in_hand.set_function(in_hand)
        for circuit in Circuit:
            self._circuits.labels(circuit.value).set_function(partial(_count, circuits, circuit))

    def concluded(self, outcome: str) -> None:
        """A job is `delivered`, to `retry`, `parked`, `lined_up`, `dead`, or `left` to be delivered once more."""
        self._jobs.labels(outcome).inc()

    def died(self, reason: Reason) -> None:
        """A job is dead."""
        self._dead.labels(reason.value).inc()

    def attempted(self, kind: str, attempted: Attempted) -> None:
        """One attempt at a `webhook`, or at `mqtt`."""
        self._attempts.labels(kind, _result(attempted)).inc()
        self._seconds[kind].observe(attempted.elapsed_s)

    def redelivered(self) -> None:
        """A job came for the second time or more."""
        self._redelivered.inc()

    def unrecorded(self, count: int) -> None:
        """So many attempts are not on record."""
        self._unrecorded.inc(count)

    def backlog(self, stream: str, jobs: int) -> None:
        """So many jobs stand in the stream."""
        self._backlog.labels(stream).set(jobs)

    def waiting(self, system: str, waiting: bool) -> None:
        """The worker began or ended waiting out an outage of `system`."""
        self._waiting.labels(system).set(1 if waiting else 0)


def _count(circuits: Callable[[], Mapping[Circuit, int]], circuit: Circuit) -> int:
    return circuits().get(circuit, 0)


def _result(attempted: Attempted) -> str:
    """A status that destinations make up is none of a bounded set: only those of RFC 9110's range stand alone."""
    status = attempted.status
    return attempted.name if status is None or 100 <= status <= 599 else "other"
