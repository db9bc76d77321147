"""Every metric of Pulse, in one table, and the prometheus side of what the services count.

A service names what it counts as a small Protocol beside itself; the classes here satisfy those by structure, so that
no service imports prometheus. Each class is made once a process, on that process's own registry.

Labels are of a bounded set, never an id: tenants and devices would make a series each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pulse import __version__
from pulse.domain.errors import Reason

disable_created_metrics()  # type: ignore[no-untyped-call]


class Declared(NamedTuple):
    """One line of the table; `buckets` are upper bounds in the metric's own unit."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REQUEST_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
COMMIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0)
END_TO_END_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 3600.0)
EDGE_REASONS = (
    Reason.INVALID_IDENTITY,
    Reason.INVALID_JSON,
    Reason.INVALID_PAYLOAD,
    Reason.TIMESTAMP_OUT_OF_RANGE,
    Reason.INVALID_ENCODING,
    Reason.TOO_LARGE,
    Reason.RATE_LIMITED,
    Reason.UNSUPPORTED_TYPE,
    Reason.UNAUTHENTICATED,
)
OUTAGES = ("unavailable", "overloaded")
"""What a gateway refuses for; each is there from the start, so that its first increase is seen as one."""
BATCH_MESSAGES = (1, 3, 10, 30, 100, 300, 1000, 3000, 5000, 10_000)

TABLE = {
    "pulse_build": Declared("gauge", "1, with the version that runs", ("version", "role")),
    "pulse_gateway_requests_total": Declared("counter", "Requests answered", ("kind", "status")),
    "pulse_gateway_request_seconds": Declared(
        "histogram", "First byte to answer, fsync included", ("kind",), REQUEST_S
    ),
    "pulse_gateway_pending": Declared("gauge", "Requests that are being answered"),
    "pulse_gateway_body_bytes_total": Declared("counter", "Bytes of the bodies that were read, as they were sent"),
    "pulse_gateway_batch_rows_total": Declared("counter", "Rows that came in batches"),
    "pulse_gateway_refused_total": Declared(
        "counter", "Requests and rows that were not accepted, by reason", ("reason",)
    ),
    "pulse_published_total": Declared("counter", "Messages that JetStream answered for", ("stream", "outcome")),
    "pulse_publish_seconds": Declared("histogram", "One publish, a batch or one alone, to its answer", (), REQUEST_S),
    "pulse_publish_batch_messages": Declared("histogram", "Messages in one publish", (), BATCH_MESSAGES),
    "pulse_registry_devices": Declared("gauge", "Devices that this process holds in memory"),
    "pulse_registry_repairs_total": Declared("counter", "Entries of the projection that differed from PostgreSQL"),
    "pulse_ingest_messages_total": Declared("counter", "Messages settled: stored, dead, already_settled", ("outcome",)),
    "pulse_ingest_redelivered_total": Declared("counter", "Messages that came once more"),
    "pulse_ingest_batch_messages": Declared("histogram", "Messages settled by one transaction", (), BATCH_MESSAGES),
    "pulse_ingest_commit_seconds": Declared("histogram", "One transaction of COPY and ledger", (), COMMIT_S),
    "pulse_ingest_waiting": Declared("gauge", "1 while the worker waits out an outage", ("system",)),
    "pulse_ingest_end_to_end_seconds": Declared("histogram", "Received to stored, sampled", (), END_TO_END_S),
    "pulse_rescue_items_total": Declared(
        "counter", "Items of DEAD_LETTERS: stored, dead, already_settled, gone, foreign", ("outcome",)
    ),
    "pulse_rescue_waiting": Declared("gauge", "1 while the rescue waits out an outage", ("system",)),
    "pulse_dead_letters": Declared("gauge", "Dead letters kept: waiting, replayed", ("reason", "state")),
}


def process_registry(*, role: str) -> CollectorRegistry:
    """A registry with what every process tells: its CPU, memory and files, Python, the version that runs."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    _gauge(registry, "pulse_build").labels(__version__, role).set(1)
    return registry


def _counter(registry: CollectorRegistry, name: str) -> Counter:
    return Counter(name, TABLE[name].text, TABLE[name].labels, registry=registry)


def _gauge(registry: CollectorRegistry, name: str) -> Gauge:
    return Gauge(name, TABLE[name].text, TABLE[name].labels, registry=registry)


def _histogram(registry: CollectorRegistry, name: str) -> Histogram:
    return Histogram(name, TABLE[name].text, TABLE[name].labels, registry=registry, buckets=TABLE[name].buckets)


class GatewayMetrics(Collector):
    """Counts answers; 0.25 µs each where the prometheus client's own counter and histogram take 1.3.

    One tally a (kind, status), made into both metrics when they are read. Not thread-safe: one event loop.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tallies: dict[tuple[str, int], _Tally] = {}
        self._pending = 0
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

    def pending(self, count: int) -> None:
        """`count` requests are being answered."""
        self._pending = count

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
        yield GaugeMetricFamily("pulse_gateway_pending", TABLE["pulse_gateway_pending"].text, self._pending)
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
        self._published = _counter(registry, "pulse_published_total")
        self._children: dict[tuple[str, str], Counter] = {}
        self._seconds = _histogram(registry, "pulse_publish_seconds")
        self._batch = _histogram(registry, "pulse_publish_batch_messages")

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
        self._devices = _gauge(registry, "pulse_registry_devices")
        self._repairs = _counter(registry, "pulse_registry_repairs_total")

    def watch(self, devices: Callable[[], int]) -> None:
        """`devices` says how many this process holds; asked whenever the metrics are read."""
        self._devices.set_function(devices)

    def repaired(self, count: int) -> None:
        """`count` entries of the projection differed from PostgreSQL and were written again."""
        self._repairs.inc(count)


class IngestMetrics:
    """Counts what a worker settles; about 3 µs a batch and 0.7 µs a sampled message."""

    def __init__(self, registry: CollectorRegistry) -> None:
        messages = _counter(registry, "pulse_ingest_messages_total")
        self._stored = messages.labels("stored")
        self._dead = messages.labels("dead")
        self._already_settled = messages.labels("already_settled")
        self._redelivered = _counter(registry, "pulse_ingest_redelivered_total")
        self._batch = _histogram(registry, "pulse_ingest_batch_messages")
        self._commit = _histogram(registry, "pulse_ingest_commit_seconds")
        self._waiting = _gauge(registry, "pulse_ingest_waiting")
        self._end_to_end = _histogram(registry, "pulse_ingest_end_to_end_seconds")

    def settled(
        self, *, stored: int, dead: int, already_settled: int, commit_s: float, end_to_end_s: Sequence[float]
    ) -> None:
        """One transaction settled that many messages in `commit_s`; `end_to_end_s` of a sample of the stored ones."""
        self._stored.inc(stored)
        self._dead.inc(dead)
        self._already_settled.inc(already_settled)
        self._batch.observe(stored + dead + already_settled)
        self._commit.observe(commit_s)
        for seconds in end_to_end_s:
            self._end_to_end.observe(seconds)

    def waiting(self, system: str, waiting: bool) -> None:
        """The worker began or ended waiting out an outage of `system`."""
        self._waiting.labels(system).set(1 if waiting else 0)

    def redelivered(self, count: int) -> None:
        """`count` messages came once more."""
        self._redelivered.inc(count)


class RescueMetrics:
    """Counts what becomes of messages whose worker died."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._rescued = _counter(registry, "pulse_rescue_items_total")
        self._waiting = _gauge(registry, "pulse_rescue_waiting")

    def rescued(self, outcome: str) -> None:
        """An item of DEAD_LETTERS was dealt with, with `outcome` (of a bounded set)."""
        self._rescued.labels(outcome).inc()

    def waiting(self, system: str, waiting: bool) -> None:
        """The role began or ended waiting out an outage of `system`."""
        self._waiting.labels(system).set(1 if waiting else 0)


class DeadLetterMetrics:
    """Tells how many dead letters are kept."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._kept = _gauge(registry, "pulse_dead_letters")

    def kept(self, counts: Mapping[tuple[str, bool], int]) -> None:
        """By reason (of a bounded set), and whether they were replayed; a pair that is not there counts nothing."""
        self._kept.clear()
        for (reason, replayed), count in counts.items():
            self._kept.labels(reason, "replayed" if replayed else "waiting").set(count)
