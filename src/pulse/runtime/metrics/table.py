"""Every metric of Pulse, in one table.

Labels are of a bounded set, never an id: tenants and devices would make a series each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

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
from prometheus_client.metrics import MetricWrapperBase

from pulse import __version__
from pulse.domain.errors import Reason

M = TypeVar("M", bound=MetricWrapperBase)

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
    "pulse_mqtt_connections_total": Declared(
        "counter", "Clients of the broker that were let in, or not, and why not", ("outcome",)
    ),
    "pulse_mqtt_authorizations_total": Declared(
        "counter", "Topics that the broker asked about: allowed, denied", ("action", "outcome")
    ),
    "pulse_mqtt_disconnected_total": Declared(
        "counter", "Connections that were ended because something was taken away from their device"
    ),
    "pulse_mqtt_queues_cut_total": Declared(
        "counter", "Messages that nats-server kept for devices that are away, thrown away because there are too many"
    ),
    "pulse_bridge_received_total": Declared("counter", "Messages that a broker handed over, repeated ones included"),
    "pulse_bridge_messages_total": Declared(
        "counter", "What became of them: stored, duplicate, dead_letter, rejected, refused, repeated", ("outcome",)
    ),
    "pulse_bridge_refused_total": Declared(
        "counter",
        "Messages not accepted: a dead_letter, rejected by an answer, or only counted (refused)",
        ("reason", "outcome"),
    ),
    "pulse_bridge_ack_seconds": Declared("histogram", "Read to PUBACK, fsync included", (), REQUEST_S),
    "pulse_bridge_in_flight": Declared("gauge", "Messages that are neither stored nor refused yet"),
    "pulse_bridge_waiting": Declared("gauge", "1 while the bridge waits out an outage", ("system",)),
    "pulse_outbox_messages_total": Declared(
        "counter",
        "Messages to devices that left the outbox: posted, refused (NATS cannot carry it)",
        ("kind", "outcome"),
    ),
    "pulse_outbox_oldest_seconds": Declared("gauge", "For how long the first message in the outbox waits", ("kind",)),
    "pulse_outbox_waiting": Declared("gauge", "1 while the postman waits out an outage", ("kind", "system")),
    "pulse_downlink_messages_total": Declared(
        "counter",
        "What became of messages to devices: delivered to the broker, no_subscriber, refused, too_large, foreign",
        ("outcome",),
    ),
    "pulse_downlink_in_flight": Declared("gauge", "Messages to devices that the broker has not confirmed yet"),
    "pulse_downlink_waiting": Declared("gauge", "1 while the downlink waits out an outage", ("system",)),
    "pulse_gateway_polls": Declared("gauge", "Devices that wait for a command over HTTP"),
    "pulse_ingest_messages_total": Declared("counter", "Messages settled: stored, dead, already_settled", ("outcome",)),
    "pulse_ingest_redelivered_total": Declared("counter", "Messages that came once more"),
    "pulse_ingest_batch_messages": Declared("histogram", "Messages settled by one transaction", (), BATCH_MESSAGES),
    "pulse_ingest_commit_seconds": Declared("histogram", "One transaction of COPY and ledger", (), COMMIT_S),
    "pulse_ingest_waiting": Declared("gauge", "1 while the worker waits out an outage", ("system",)),
    "pulse_ingest_end_to_end_seconds": Declared("histogram", "Received to stored, sampled", (), END_TO_END_S),
    "pulse_routes": Declared("gauge", "Routes that this process matches messages with, disabled ones included"),
    "pulse_routing_jobs_total": Declared(
        "counter", "Messages matched with a route: job (made), no_room or refused (dead letters)", ("outcome",)
    ),
    "pulse_routing_unanswered_total": Declared(
        "counter", "Expressions that had no answer for a message, which is no match", ("reason",)
    ),
    "pulse_shadow_messages_total": Declared(
        "counter",
        "Messages settled: updates accepted, gets answered, either rejected, dead, already_settled",
        ("outcome",),
    ),
    "pulse_shadow_redelivered_total": Declared("counter", "Messages that came once more"),
    "pulse_shadow_batch_messages": Declared("histogram", "Messages settled by one transaction", (), BATCH_MESSAGES),
    "pulse_shadow_commit_seconds": Declared("histogram", "One transaction of ledger and shadows", (), COMMIT_S),
    "pulse_shadow_waiting": Declared("gauge", "1 while the worker waits out an outage", ("system",)),
    "pulse_shadow_end_to_end_seconds": Declared("histogram", "Received to settled, sampled", (), END_TO_END_S),
    "pulse_commands_messages_total": Declared(
        "counter",
        "Messages settled: moved their command, late (it moved nothing), dead, not_kept (answers to unknown commands "
        "beyond mqtt_dead_letters_per_s), already_settled",
        ("outcome",),
    ),
    "pulse_commands_moves_total": Declared(
        "counter", "Commands that came into a state, by their device, by time, or with their fleet", ("state",)
    ),
    "pulse_commands_rejected_total": Declared("counter", "Answers of devices that are told `commands/ack/rejected`"),
    "pulse_commands_redelivered_total": Declared("counter", "Messages that came once more"),
    "pulse_commands_commit_seconds": Declared("histogram", "One transaction of ledger and commands", (), COMMIT_S),
    "pulse_commands_waiting": Declared("gauge", "1 while the worker waits out an outage", ("system",)),
    "pulse_commands_said_again_total": Declared("counter", "Commands that are sent again to a device that is there"),
    "pulse_fleets_made_total": Declared("counter", "Commands that were made for fleets"),
    "pulse_fleets_waiting": Declared("gauge", "1 while what makes them waits out an outage", ("system",)),
    "pulse_delivery_jobs_total": Declared(
        "counter",
        "Jobs of routes: delivered, to retry, parked (no attempt was made), dead, left (to be delivered once more)",
        ("outcome",),
    ),
    "pulse_delivery_dead_total": Declared("counter", "Jobs that became dead letters, by reason", ("reason",)),
    "pulse_delivery_attempts_total": Declared(
        "counter", "Attempts at destinations, by their status or what failed", ("kind", "result")
    ),
    "pulse_delivery_attempt_seconds": Declared("histogram", "One attempt, connection included", ("kind",), REQUEST_S),
    "pulse_delivery_redelivered_total": Declared("counter", "Jobs that came once more from JetStream"),
    "pulse_delivery_in_hand": Declared("gauge", "Jobs that are neither acknowledged nor left to others"),
    "pulse_delivery_circuits": Declared("gauge", "Destinations, by the state of their circuit", ("circuit",)),
    "pulse_delivery_unrecorded_total": Declared("counter", "Attempts that are not on record, as too much waited"),
    "pulse_delivery_waiting": Declared("gauge", "1 while the worker waits out an outage", ("system",)),
    "pulse_delivery_backlog": Declared("gauge", "Jobs that stand in the stream, those that wait included", ("stream",)),
    "pulse_rescue_items_total": Declared(
        "counter", "Items of DEAD_LETTERS: stored, dead, already_settled, gone, foreign", ("outcome",)
    ),
    "pulse_rescue_waiting": Declared("gauge", "1 while the rescue waits out an outage", ("system",)),
    "pulse_audit_messages": Declared(
        "gauge", "Where a stream's messages are: accepted = stored + dead + in_flight + expired", ("stream", "state")
    ),
    "pulse_retention_dropped_rows_total": Declared("counter", "Rows dropped after their time", ("series",)),
    "pulse_retention_dropped_bytes_total": Declared("counter", "Bytes freed by that, indexes included", ("series",)),
    "pulse_rollup_messages_total": Declared("counter", "Settled messages whose rows were added to the rollups"),
    "pulse_rollup_pending": Declared("gauge", "Settled batches that are not in the rollups yet"),
    "pulse_dead_letters": Declared("gauge", "Dead letters kept: waiting, replayed", ("reason", "state")),
}


def process_registry(*, role: str) -> CollectorRegistry:
    """A registry with what every process tells: its CPU, memory and files, Python, the version that runs."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    gauge(registry, "pulse_build").labels(__version__, role).set(1)
    return registry


_MADE: WeakKeyDictionary[CollectorRegistry, dict[str, MetricWrapperBase]] = WeakKeyDictionary()
"""Each metric once a registry: two roles of one process count in the same one."""


def counter(registry: CollectorRegistry, name: str) -> Counter:
    """The counter that the table declares under `name`."""
    return _once(registry, name, Counter)


def gauge(registry: CollectorRegistry, name: str) -> Gauge:
    """The gauge that the table declares under `name`."""
    return _once(registry, name, Gauge)


def histogram(registry: CollectorRegistry, name: str) -> Histogram:
    """The histogram that the table declares under `name`."""
    return _once(registry, name, partial(Histogram, buckets=TABLE[name].buckets))


def _once(registry: CollectorRegistry, name: str, make: Callable[..., M]) -> M:
    made = _MADE.setdefault(registry, {})
    if name not in made:
        made[name] = make(name, TABLE[name].text, TABLE[name].labels, registry=registry)
    return cast(M, made[name])
