"""What the bridge counts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, product

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pulse.domain.errors import Reason
from pulse.runtime.metrics.table import EDGE_REASONS, REQUEST_S, TABLE

REASONS = (*EDGE_REASONS, Reason.INVALID_TOPIC, Reason.NOT_FOUND, "retained")
"""Each is there from the start, so that its first increase is seen as one."""
OUTCOMES = ("stored", "duplicate", "dead_letter", "rejected", "refused", "repeated")


class BridgeMetrics(Collector):
    """Counts messages; `received_total` is the sum of all outcomes and what is in flight. One event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._in_flight: Callable[[], int] = int
        self._received = 0
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._buckets = [0] * (len(REQUEST_S) + 1)
        self._seconds = 0.0
        self._refused = dict.fromkeys(product(map(str, REASONS), ("dead_letter", "rejected", "refused")), 0)
        self._waiting = {"mqtt": 0, "nats": 0}
        """How many parts of the bridge wait: its connection and what is in flight wait for NATS each by itself."""
        registry.register(self)

    def watch(self, in_flight: Callable[[], int]) -> None:
        """`in_flight` says how many messages are; asked whenever the metrics are read."""
        self._in_flight = in_flight

    def received(self, count: int) -> None:
        """`count` messages came."""
        self._received += count

    def settled(self, outcome: str, seconds: float) -> None:
        """One became `outcome` (of a bounded set) after `seconds`; a repeated one has no time of its own."""
        self._outcomes[outcome] += 1
        if outcome != "repeated":
            self._buckets[bisect_left(REQUEST_S, seconds)] += 1
            self._seconds += seconds

    def refused(self, reason: str, outcome: str) -> None:
        """One was not accepted; both are of a bounded set."""
        self._refused[reason, outcome] = self._refused.get((reason, outcome), 0) + 1

    def waiting(self, system: str, waiting: bool) -> None:
        """One of the bridge's parts began or ended waiting out an outage of `system`, and has not said so before."""
        self._waiting[system] = self._waiting.get(system, 0) + (1 if waiting else -1)

    def collect(self) -> Iterator[Metric]:
        """What the bridge counts, as the registry wants it."""
        yield CounterMetricFamily("pulse_bridge_received", TABLE["pulse_bridge_received_total"].text, self._received)
        yield _counter("pulse_bridge_messages_total", {(name,): count for name, count in self._outcomes.items()})
        yield _counter("pulse_bridge_refused_total", self._refused)
        yield GaugeMetricFamily("pulse_bridge_in_flight", TABLE["pulse_bridge_in_flight"].text, self._in_flight())
        waiting = GaugeMetricFamily("pulse_bridge_waiting", TABLE["pulse_bridge_waiting"].text, labels=("system",))
        for system, value in self._waiting.items():
            waiting.add_metric((system,), int(value > 0))
        yield waiting
        seconds = HistogramMetricFamily("pulse_bridge_ack_seconds", TABLE["pulse_bridge_ack_seconds"].text)
        bounds = [*map(str, REQUEST_S), "+Inf"]
        seconds.add_metric((), list(zip(bounds, accumulate(self._buckets), strict=True)), self._seconds)
        yield seconds


def _counter(name: str, counts: Mapping[tuple[str], int] | Mapping[tuple[str, str], int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name.removesuffix("_total"), TABLE[name].text, labels=TABLE[name].labels)
    for labels, count in counts.items():
        family.add_metric(labels, count)
    return family
