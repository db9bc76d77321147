"""What the decisions about clients of an MQTT broker count."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from pulse.domain.mqtt_access import Action, Denial
from pulse.runtime.metrics.table import counter

ALLOWED, DENIED = "allowed", "denied"


class MqttAccessMetrics:
    """Counts who was let in, and what they were allowed to do; every series is there from the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._connections = counter(registry, "pulse_mqtt_connections_total")
        self._authorizations = counter(registry, "pulse_mqtt_authorizations_total")
        self._disconnected = counter(registry, "pulse_mqtt_disconnected_total")
        self._queues_cut = counter(registry, "pulse_mqtt_queues_cut_total")
        for outcome in (ALLOWED, *Denial):
            self._connections.labels(str(outcome))
        for action in Action:
            for outcome in (ALLOWED, DENIED):
                self._authorizations.labels(str(action), outcome)

    def connected(self, outcome: str) -> None:
        """A client was let in (`allowed`) or not, for a reason of a bounded set."""
        self._connections.labels(outcome).inc()

    def authorized(self, action: str, allowed: bool) -> None:
        """A client asked to publish or subscribe."""
        self._authorizations.labels(action, ALLOWED if allowed else DENIED).inc()

    def disconnected(self, count: int) -> None:
        """So many connections were ended because something was taken away from their device."""
        self._disconnected.inc(count)

    def queues_cut(self, count: int) -> None:
        """So many messages that were kept for devices that are away were thrown away, the oldest ones."""
        self._queues_cut.inc(count)
