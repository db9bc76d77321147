"""Metrics: what the services count is what the table declares, and what Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pulse import __version__
from pulse.domain.delivery import Attempted
from pulse.runtime.metrics import (
    TABLE,
    AuditMetrics,
    BridgeMetrics,
    CommandMetrics,
    DeadLetterMetrics,
    DeliveryMetrics,
    DownlinkMetrics,
    FleetMetrics,
    GatewayMetrics,
    IngestMetrics,
    MqttAccessMetrics,
    PollMetrics,
    PostmanMetrics,
    PublishMetrics,
    RegistryMetrics,
    RescueMetrics,
    RetentionMetrics,
    RollupMetrics,
    RoutingMetrics,
    ShadowMetrics,
    SweepMetrics,
    process_registry,
)
from pulse.services import gateway, ingest, rescue, shadow

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(registry: CollectorRegistry) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_every_declared_metric_is_exposed_under_its_name_and_nothing_else() -> None:
    registry = process_registry(role="gateway")
    first = GatewayMetrics(registry)
    first.answered("telemetry", 202, 0.003)
    PublishMetrics(registry).published("TELEMETRY", "accepted", 10, 0.01)
    RegistryMetrics(registry)
    second = IngestMetrics(registry)
    second.waiting("postgresql", True)
    rescued = RescueMetrics(registry)
    rescued.rescued("stored")
    rescued.waiting("postgresql", True)
    DeadLetterMetrics(registry).kept({("invalid_json", False): 3})
    AuditMetrics(registry).audited("TELEMETRY", [])
    MqttAccessMetrics(registry)
    BridgeMetrics(registry)
    PostmanMetrics(registry, kind="shadow").waiting("nats", True)
    DownlinkMetrics(registry).waiting("nats", True)
    PollMetrics(registry)
    delivery = DeliveryMetrics(registry)
    delivery.waiting("nats", True)
    delivery.watch(in_hand=lambda: 1, circuits=dict)
    delivery.attempted("webhook", Attempted(status=200))
    delivery.backlog("ROUTES", 1)
    CommandMetrics(registry).waiting("nats", True)
    FleetMetrics(registry).waiting("nats", True)
    SweepMetrics(registry)
    ShadowMetrics(registry).waiting("postgresql", True)
    RetentionMetrics(registry)
    RollupMetrics(registry)
    RoutingMetrics(registry).routed(jobs=1, no_room=0, refused=0)
    exposed = {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        for name, _ in read(registry)
        if name.startswith("pulse_")
    }
    assert exposed == set(TABLE)


def test_the_classes_satisfy_what_the_services_ask_for() -> None:
    registry = CollectorRegistry()
    asked: tuple[gateway.GatewayMetrics, ingest.IngestMetrics, rescue.RescueMetrics] = (
        GatewayMetrics(registry),
        IngestMetrics(registry),
        RescueMetrics(registry),
    )
    assert all(asked)


def test_each_outcome_of_a_rescue_is_there_before_it_happens() -> None:
    """A series that begins with 1 has no increase, and no alert would ring for the first."""
    registry = CollectorRegistry()
    RescueMetrics(registry)
    found = {labels[0][1] for name, labels in read(registry) if name == "pulse_rescue_items_total"}
    assert found == set(rescue.Outcome)


def test_answers_are_counted_by_kind_and_status_and_timed_by_kind() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    for status, seconds in ((202, 0.001), (202, 0.004), (503, 7.0)):
        metrics.answered("telemetry", status, seconds)
    metrics.answered("heartbeat", 202, 0.02)
    metrics.watch(lambda: 17)
    found = read(registry)
    kind = ("kind", "telemetry")
    assert found["pulse_gateway_requests_total", (kind, ("status", "202"))] == 2
    assert found["pulse_gateway_requests_total", (kind, ("status", "503"))] == 1
    assert found["pulse_gateway_request_seconds_count", (kind,)] == 3
    assert found["pulse_gateway_request_seconds_sum", (kind,)] == 7.005
    buckets = {
        dict(labels)["le"]: count for (name, labels), count in found.items() if kind in labels and "bucket" in name
    }
    assert (buckets["0.001"], buckets["0.005"], buckets["5.0"], buckets["+Inf"]) == (1, 2, 2, 3)
    assert found["pulse_gateway_pending", ()] == 17


def test_messages_of_shadows_are_counted_by_what_became_of_them() -> None:
    registry = CollectorRegistry()
    metrics: shadow.ShadowMetrics = ShadowMetrics(registry)
    metrics.settled(
        accepted=5, answered=4, rejected=3, dead=2, already_settled=1, commit_s=0.02, end_to_end_s=[0.1, 0.2]
    )
    metrics.redelivered(6)
    found = read(registry)
    outcomes = {labels[0][1]: count for (name, labels), count in found.items() if name == "pulse_shadow_messages_total"}
    assert outcomes == {"accepted": 5, "answered": 4, "rejected": 3, "dead": 2, "already_settled": 1}
    assert found["pulse_shadow_batch_messages_sum", ()] == 15
    assert found["pulse_shadow_end_to_end_seconds_count", ()] == 2
    assert found["pulse_shadow_redelivered_total", ()] == 6


def test_settled_messages_are_counted_by_outcome() -> None:
    registry = CollectorRegistry()
    metrics = IngestMetrics(registry)
    metrics.settled(stored=5, dead=2, already_settled=1, commit_s=0.02, end_to_end_s=[0.1, 0.2])
    metrics.settled(stored=1, dead=0, already_settled=0, commit_s=0.02, end_to_end_s=[])
    metrics.waiting("postgresql", True)
    metrics.waiting("nats", False)
    metrics.redelivered(3)
    found = read(registry)
    outcomes = {
        dict(labels)["outcome"]: value
        for (name, labels), value in found.items()
        if name == "pulse_ingest_messages_total"
    }
    assert outcomes == {"stored": 6, "dead": 2, "already_settled": 1}
    assert found["pulse_ingest_batch_messages_sum", ()] == 9
    assert found["pulse_ingest_commit_seconds_count", ()] == 2
    assert found["pulse_ingest_end_to_end_seconds_count", ()] == 2
    assert found["pulse_ingest_waiting", (("system", "postgresql"),)] == 1
    assert found["pulse_ingest_waiting", (("system", "nats"),)] == 0
    assert found["pulse_ingest_redelivered_total", ()] == 3


def test_what_a_bridge_received_is_what_became_of_it_and_what_is_in_flight() -> None:
    registry = CollectorRegistry()
    metrics = BridgeMetrics(registry)
    metrics.watch(lambda: 2)
    metrics.received(7)
    for outcome, seconds in (("stored", 0.004), ("stored", 9.0), ("refused", 0.0), ("dead_letter", 0.1)):
        metrics.settled(outcome, seconds)
    metrics.settled("repeated", 0.0)
    metrics.refused("rate_limited", "refused")
    metrics.waiting("mqtt", True)
    found = read(registry)
    outcomes = sum(value for (name, _), value in found.items() if name == "pulse_bridge_messages_total")
    assert found["pulse_bridge_received_total", ()] == outcomes + found["pulse_bridge_in_flight", ()]
    assert found["pulse_bridge_ack_seconds_count", ()] == 4, "what came again has no time of its own"
    assert found["pulse_bridge_ack_seconds_bucket", (("le", "0.005"),)] == 2
    assert found["pulse_bridge_refused_total", (("outcome", "refused"), ("reason", "rate_limited"))] == 1
    assert found["pulse_bridge_refused_total", (("outcome", "dead_letter"), ("reason", "invalid_json"))] == 0
    assert found["pulse_bridge_waiting", (("system", "mqtt"),)] == 1


def test_a_bridge_waits_for_as_long_as_one_of_its_parts_does() -> None:
    registry = CollectorRegistry()
    metrics = BridgeMetrics(registry)
    seen = []
    for waiting in (True, True, False, False):
        metrics.waiting("nats", waiting)
        seen.append(read(registry)["pulse_bridge_waiting", (("system", "nats"),)])
    assert seen == [1, 1, 1, 0]


def test_the_build_is_told_with_its_role() -> None:
    assert read(process_registry(role="ui"))["pulse_build", (("role", "ui"), ("version", __version__))] == 1


def test_of_dead_letters_only_what_is_kept_now_is_told() -> None:
    registry = CollectorRegistry()
    metrics = DeadLetterMetrics(registry)
    metrics.kept({("invalid_json", False): 3, ("max_deliveries", True): 1})
    metrics.kept({("invalid_json", True): 2})
    assert read(registry) == {("pulse_dead_letters", (("reason", "invalid_json"), ("state", "replayed"))): 2}
