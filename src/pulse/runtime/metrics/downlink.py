"""What is counted on the way down to devices."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from pulse.runtime.metrics.table import counter, gauge

OUTCOMES = ("delivered", "no_subscriber", "refused", "too_large", "foreign")
"""Each is there from the start, so that its first increase is seen as one."""


class PostmanMetrics:
    """Counts what leaves the outbox, one `kind` of it."""

    def __init__(self, registry: CollectorRegistry, *, kind: str) -> None:
        outbox = counter(registry, "pulse_outbox_messages_total")
        self._posted, self._refused = outbox.labels(kind, "posted"), outbox.labels(kind, "refused")
        self._waiting = gauge(registry, "pulse_outbox_waiting")
        self._kind = kind
        self._since: float | None = None
        gauge(registry, "pulse_outbox_oldest_seconds").labels(kind).set_function(self._oldest_s)

    def oldest(self, waited_s: float | None) -> None:
        """For so long the first message has waited by now."""
        self._since = None if waited_s is None else time.monotonic() - waited_s

    def posted(self, count: int) -> None:
        """`count` messages have left the outbox."""
        self._posted.inc(count)

    def refused(self) -> None:
        """One left it for nowhere."""
        self._refused.inc()

    def waiting(self, system: str, waiting: bool) -> None:
        """The postman began or ended waiting out an outage of `system`."""
        self._waiting.labels(self._kind, system).set(1 if waiting else 0)

    def _oldest_s(self) -> float:
        return 0.0 if self._since is None else max(0.0, time.monotonic() - self._since)


class DownlinkMetrics:
    """Counts what a bridge tells devices."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._messages = counter(registry, "pulse_downlink_messages_total")
        for outcome in OUTCOMES:
            self._messages.labels(outcome)
        self._in_flight = gauge(registry, "pulse_downlink_in_flight")
        self._waiting = gauge(registry, "pulse_downlink_waiting")

    def watch(self, in_flight: Callable[[], int]) -> None:
        """`in_flight` says how many messages are; asked whenever the metrics are read."""
        self._in_flight.set_function(in_flight)

    def settled(self, outcome: str, count: int) -> None:
        """`count` messages ended in `outcome` (of a bounded set)."""
        self._messages.labels(outcome).inc(count)

    def waiting(self, system: str, waiting: bool) -> None:
        """The downlink began or ended waiting out an outage of `system`."""
        self._waiting.labels(system).set(1 if waiting else 0)


class PollMetrics:
    """Tells how many devices wait for commands over HTTP."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._waiting = gauge(registry, "pulse_gateway_polls")

    def watch(self, waiting: Callable[[], int]) -> None:
        """`waiting` says how many do; asked whenever the metrics are read."""
        self._waiting.set_function(waiting)
