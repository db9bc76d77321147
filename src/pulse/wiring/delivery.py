"""The role `delivery`: ROUTES and LATER ─► Delivery ─► webhooks and the MQTT broker, LATER, DEAD_LETTERS.

It has a connection of its own to the broker, under the bridge's account and a client id of its own.
"""

from __future__ import annotations

import socket
from collections import Counter

import msgspec
import structlog

from pulse.adapters.mqtt.broker import MqttBroker
from pulse.adapters.nats.ask import Answerer
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.nats.schedules import Schedules
from pulse.adapters.postgres.deliveries import DeliveryStore
from pulse.adapters.postgres.device_attributes import DeviceAttributeStore
from pulse.adapters.postgres.ordered_jobs import OrderedLines
from pulse.adapters.postgres.recent_messages import RecentMessages
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.adapters.postgres.route_rows import NoSeals
from pulse.adapters.webhook.client import WebhookBounds, WebhookClient, open_webhook_client
from pulse.domain.breaker import BreakerPolicy
from pulse.domain.delivery import Endurance, RetryPolicy
from pulse.domain.errors import Outage
from pulse.domain.gate import GatePolicy
from pulse.domain.registry import route_key
from pulse.runtime.health import Dependency
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import DeliveryMetrics
from pulse.runtime.settings import Settings
from pulse.services.delivery import Delivery
from pulse.services.delivery_record import Records
from pulse.services.job_fate import Fates
from pulse.services.ordered_delivery import OrderedDelivery
from pulse.services.republish import Republishing
from pulse.services.route_book import RouteBook
from pulse.services.route_trials import RouteTrials
from pulse.services.sending import Sending
from pulse.services.turns import RouteRates, Turns
from pulse.topology.declared import load
from pulse.wiring.bridge import account_of
from pulse.wiring.delivery_parts import Attributes, Backlog, RoutedSoFar, WatchedStore, Webhooks
from pulse.wiring.process import Process
from pulse.wiring.routes import TRIAL_S_MAX, TRIALS, sealer_of, webhook_allowed
from pulse.wiring.streams import LATER, LATER_DELIVERY, ROUTE_DELIVERY, ROUTES, state_of

log = structlog.get_logger()

CONNECTIONS = 3
"""To PostgreSQL: routes are asked for, attempts written, and lines of ordered routes taken and settled."""
BATCH_MAX = 50
"""Two batches fill what the consumer may have pending: one is served while the next one comes."""
BATCH_BYTES_MAX = 4 * 1024 * 1024
LINGER_S = 0.001
EDGE_TIMEOUT_S = 2.0
TRIALS_MAX = 10
"""Routes that are tried at the same time."""
PATIENCE_S = 60.0
"""How long jobs of ordered routes wait for a message before them that its worker does not settle: two ack waits."""


async def delivery_services(process: Process) -> list[Service]:
    """The services, sinks first."""
    settings = process.settings
    metrics = DeliveryMetrics(process.metrics)
    check = Dependency("delivery", detail="the first look at the tables")
    process.checks.append(check)
    store = WatchedStore(_store(process), check)
    records = Records(store, endurance=Endurance(failing_s=settings.route_failing_s_max), metrics=metrics)
    book = RouteBook(store, allowed=webhook_allowed(settings))
    turns = Turns(_gate_policy(settings), new_max=settings.route_new_max, poor_max=settings.route_poor_max)
    republishing = _republishing(settings, metrics)
    sending = Sending(
        webhooks=Webhooks(await _client(process)),
        republisher=republishing,
        attributes=Attributes(DeviceAttributeStore(process.pool)),
        body_bytes_max=settings.route_body_bytes_max,
    )
    fates = Fates(
        book=book,
        turns=turns,
        rates=RouteRates(),
        sending=sending,
        records=records,
        metrics=metrics,
        retry=RetryPolicy(
            attempts_max=settings.route_attempts_max,
            delay_s_min=settings.route_retry_s_min,
            delay_s_max=settings.route_retry_s_max,
        ),
        job_age_s_max=settings.route_job_age_s_max,
        probe=process.probe,
    )
    delivery = Delivery(
        sources={
            ROUTES: await _source(process, ROUTES, ROUTE_DELIVERY),
            LATER: await _source(process, LATER, LATER_DELIVERY),
        },
        routes=store,
        book=book,
        fates=fates,
        schedules=_schedules(process),
        lines=process.lines,
        publisher=process.committer,
        records=records,
        metrics=metrics,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
    )
    metrics.watch(
        in_hand=lambda: delivery.in_hand, circuits=lambda: Counter(circuit for _, circuit in turns.circuits())
    )
    return [
        republishing,
        Backlog(process, metrics),
        _ordered(process, fates, metrics),
        delivery,
        _trials(process, store, sending),
    ]


def _trials(process: Process, store: WatchedStore, sending: Sending) -> Answerer:
    settings = process.settings
    trials = RouteTrials(
        routes=store,
        messages=RecentMessages(process.pool, statement_s_max=settings.query_s_max),
        sender=sending,
        allowed=webhook_allowed(settings),
    )
    return Answerer(
        process.nats,
        kind=TRIALS,
        answer=trials.answer,
        concurrency_max=TRIALS_MAX,
        waiting_max=TRIALS_MAX,
        answer_s_max=TRIAL_S_MAX,
    )


def _ordered(process: Process, fates: Fates, metrics: DeliveryMetrics) -> OrderedDelivery:
    settings = process.settings
    lines = OrderedLines(process.pool, lease_s=settings.route_line_lease_s)
    return OrderedDelivery(
        store=lines,
        routed=RoutedSoFar(process.nats, lines, patience_s=PATIENCE_S),
        fates=fates,
        publisher=process.committer,
        metrics=metrics,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        keep_s=settings.route_line_lease_s / 3,
        probe=process.probe,
    )


def _store(process: Process) -> DeliveryStore:
    bucket, truth = RegistryBucket(process.nats, timeout_s=EDGE_TIMEOUT_S), RegistryTruth(process.pool)

    async def tell_edge(tenant_id: str, route_id: str) -> None:
        try:
            await bucket.project([route_key(tenant_id, route_id)], truth.load)
        except Outage as outage:
            log.warning("the edge learns later that a route is disabled", error=str(outage))

    return DeliveryStore(process.pool, sealer_of(process.settings) or NoSeals(), tell_edge=tell_edge)


def _gate_policy(settings: Settings) -> GatePolicy:
    return GatePolicy(
        concurrency_max=settings.route_concurrency_max,
        horizon_s=settings.route_circuit_s_max,
        breaker=BreakerPolicy(
            failures_to_open=settings.route_circuit_failures,
            open_s_min=settings.route_circuit_s_min,
            open_s_max=settings.route_circuit_s_max,
        ),
    )


async def _client(process: Process) -> WebhookClient:
    return await process.stack.enter_async_context(
        open_webhook_client(
            allowed=webhook_allowed(process.settings),
            bounds=WebhookBounds(connections_per_destination=process.settings.route_concurrency_max),
        )
    )


async def _source(process: Process, stream: str, consumer: str) -> PullConsumer:
    async def created_ns() -> int:
        return (await state_of(process.nats, stream)).created_ns

    return await process.stack.enter_async_context(
        PullConsumer(
            process.nats,
            stream=stream,
            consumer=consumer,
            created_ns=created_ns,
            batch_max=BATCH_MAX,
            batch_bytes_max=BATCH_BYTES_MAX,
            linger_s=LINGER_S,
        )
    )


def _schedules(process: Process) -> Schedules:
    async def level() -> int:
        return (await state_of(process.nats, LATER)).bytes

    [declared] = [stream for stream in load().streams if stream.name == LATER]
    return Schedules(process.nats, level=level, bytes_max=declared.max_bytes)


def _republishing(settings: Settings, metrics: DeliveryMetrics) -> Republishing:
    name = settings.mqtt_client_id or f"pulse-{socket.gethostname()}"
    account = msgspec.structs.replace(account_of(settings), mqtt_client_id=f"{name}-delivery")
    return Republishing(
        MqttBroker(account, filters=()),
        metrics=metrics,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
    )
