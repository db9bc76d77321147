"""The role `bridge`: devices over MQTT, on the gateway that its process shares."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import msgspec

from pulse.adapters.mqtt.broker import Account, MqttBroker
from pulse.adapters.nats.consumer import PullConsumer
from pulse.domain.limits import Rate, RateLimits
from pulse.domain.mqtt import session_name
from pulse.domain.topics import FILTERS
from pulse.runtime.health import Dependency
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import BridgeMetrics, DownlinkMetrics
from pulse.runtime.settings import Settings
from pulse.services.bridge import Bridge
from pulse.services.bridge_admission import Admission
from pulse.services.downlink import Downlink
from pulse.services.in_flight import InFlight
from pulse.wiring.mqtt_access import callout_services
from pulse.wiring.process import Process
from pulse.wiring.streams import BRIDGE_DOWN, DOWN, SERVED, state_of

DOWN_BATCH_MAX = 250
"""Four batches are here at once, two of them in flight: two bridges find room in what the consumer may have pending."""
DOWN_BATCH_BYTES_MAX = 2 * 1024 * 1024
DOWN_LINGER_S = 0.002


async def bridge_services(process: Process) -> list[Service]:
    """The services, sinks first."""
    settings = process.settings
    link = Dependency("mqtt")
    process.checks.append(link)
    account = account_of(settings)
    metrics = BridgeMetrics(process.metrics)
    in_flight = InFlight(
        publisher=process.committer,
        admission=_admission(process, session=session_name(account.mqtt_client_id)),
        metrics=metrics,
        receive_max=settings.mqtt_receive_max,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
    )
    metrics.watch(lambda: in_flight.count)
    downlink = _downlink(process)
    bridge = Bridge(
        broker=MqttBroker(account, filters=FILTERS),
        in_flight=in_flight,
        downlink=downlink,
        devices=process.registry,
        last_sequences=lambda: _last_sequences(process),
        link=link,
        metrics=metrics,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
    )
    return [*await callout_services(process, is_open=lambda: bridge.has_subscribed), bridge, downlink]


def _downlink(process: Process) -> Downlink:
    settings = process.settings

    async def created_ns() -> int:
        return (await state_of(process.nats, DOWN)).created_ns

    metrics = DownlinkMetrics(process.metrics)
    downlink = Downlink(
        open_source=lambda: PullConsumer(
            process.nats,
            stream=DOWN,
            consumer=BRIDGE_DOWN,
            created_ns=created_ns,
            batch_max=DOWN_BATCH_MAX,
            batch_bytes_max=DOWN_BATCH_BYTES_MAX,
            linger_s=DOWN_LINGER_S,
        ),
        publisher=process.committer,
        metrics=metrics,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
    )
    metrics.watch(lambda: downlink.in_flight)
    return downlink


def account_of(settings: Settings) -> Account:
    """The bridge's account at the broker; a client id that is not set is made of the host's name."""
    account = msgspec.convert(settings, Account, from_attributes=True)
    if account.mqtt_client_id:
        return account
    return msgspec.structs.replace(account, mqtt_client_id=f"pulse-bridge-{socket.gethostname()}")


def _admission(process: Process, *, session: str) -> Admission:
    settings = process.settings
    letters = Rate(settings.mqtt_dead_letters_per_s, settings.mqtt_dead_letters_burst)
    return Admission(
        gateway=process.gateway,
        devices=process.registry,
        letters=RateLimits(device=Rate(0, 1), tenant=letters),
        session=session,
        body_bytes_max=settings.body_bytes_max,
    )


async def _last_sequences(process: Process) -> Mapping[str, int]:
    return {stream: (await state_of(process.nats, stream)).last_seq for stream in SERVED}
