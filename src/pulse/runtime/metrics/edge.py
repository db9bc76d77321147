"""What the edge counts: requests, publishes, and the devices it knows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pulse.runtime.metrics.table import EDGE_REASONS, OUTAGES, REQUEST_S, TABLE, counter, gauge, histogram


class GatewayMetrics(Collector):
    """Counts answers; 0.25 µs each where the prometheus client's own counter and histogram take 1.3.

    One tally a (kind, status), made into both metrics when they are read. Not thread-safe: one event loop.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tallies: dict[tuple[str, int], _Tally] = {}
        self._pending: Callable[[], int] = int
        self._body_bytes = 0
        self._rows = 0
        self._refused = dict.fromkeys((*map(str, EDGE_REASONS), *OUTAGES), 0)
        registry.register(self)

    def answered(self, kind: str, status: int, seconds: float) -> None:
        """A request of `kind` (of a bounded set) was answered with `status` after `seconds`."""
        try:
            tally = self._tallies[kind, status]
        except KeyError:
            tally = self._tallies[kind, status] = _Tally()
        tally.counts[bisect_left(REQUEST_S, seconds)] += 1
        tally.seconds += seconds

    def watch(self, pending: Callable[[], int]) -> None:
        """`pending` says how many requests are being answered."""
        self._pending = pending

    def received(self, count_bytes: int) -> None:
        """A body of `count_bytes` was read."""
        self._body_bytes += count_bytes

    def rows(self, count: int) -> None:
        """A batch had `count` rows."""
        self._rows += count

    def refused(self, reason: str) -> None:
        """A request or row was not accepted; `reason` is of a bounded set."""
        self._refused[reason] = self._refused.get(reason, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """What the gateway counts, as the registry wants it."""
        yield _counted("pulse_gateway_body_bytes_total", self._body_bytes)
        yield _counted("pulse_gateway_batch_rows_total", self._rows)
        refused = CounterMetricFamily(
            "pulse_gateway_refused", TABLE["pulse_gateway_refused_total"].text, labels=("reason",)
        )
        for reason, count in self._refused.items():
            refused.add_metric((reason,), count)
        yield refused
        yield GaugeMetricFamily("pulse_gateway_pending", TABLE["pulse_gateway_pending"].text, self._pending())
        requests = CounterMetricFamily(
            "pulse_gateway_requests", TABLE["pulse_gateway_requests_total"].text, labels=("kind", "status")
        )
        by_kind: dict[str, list[_Tally]] = {}
        for (kind, status), tally in self._tallies.items():
            requests.add_metric((kind, str(status)), sum(tally.counts))
            by_kind.setdefault(kind, []).append(tally)
        seconds = HistogramMetricFamily(
            "pulse_gateway_request_seconds", TABLE["pulse_gateway_request_seconds"].text, labels=("kind",)
        )
        bounds = [*map(str, REQUEST_S), "+Inf"]
        for kind, tallies in by_kind.items():
            counts = (sum(column) for column in zip(*(tally.counts for tally in tallies), strict=True))
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            seconds.add_metric((kind,), buckets, sum(tally.seconds for tally in tallies))
        yield requests
        yield seconds


def _counted(name: str, count: int) -> CounterMetricFamily:
    return CounterMetricFamily(name.removesuffix("_total"), TABLE[name].text, count)


class _Tally:
    """How many took how long: a count a bucket of REQUEST_S and one above, and the sum."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(REQUEST_S) + 1)
        self.seconds = 0.0


class PublishMetrics:
    """Counts what JetStream answers to publishes; a message that is sent again is answered for again."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._published = counter(registry, "pulse_published_total")
        self._children: dict[tuple[str, str], Counter] = {}
        self._seconds = histogram(registry, "pulse_publish_seconds")
        self._batch = histogram(registry, "pulse_publish_batch_messages")

    def published(self, stream: str, outcome: str, count: int, seconds: float) -> None:
        """One publish of `count` messages to `stream` was answered after `seconds`; `outcome` is of a bounded set."""
        child = self._children.get((stream, outcome))
        if child is None:
            child = self._children[stream, outcome] = self._published.labels(stream, outcome)
        child.inc(count)
        self._seconds.observe(seconds)
        self._batch.observe(count)


class RegistryMetrics:
    """Counts the devices that a process knows, and the repairs of their projection."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._devices = gauge(registry, "pulse_registry_devices")
        self._repairs = counter(registry, "pulse_registry_repairs_total")

    def watch(self, devices: Callable[[], int]) -> None:
        """`devices` says how many this process holds; asked whenever the metrics are read."""
        self._devices.set_function(devices)

    def repaired(self, count: int) -> None:
        """`count` entries of the projection differed from PostgreSQL and were written again."""
        self._repairs.inc(count)
