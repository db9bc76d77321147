"""The role `bridge`: group commit ◄─ bridge (MQTT), registry mirror."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import msgspec

from pulse.adapters.mqtt.broker import Account, MqttBroker
from pulse.adapters.nats.committer import GroupCommitter
from pulse.domain.limits import Rate, RateLimits
from pulse.domain.mqtt import session_name
from pulse.domain.topics import FILTERS, UPWARD
from pulse.runtime.health import Dependency
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import BridgeMetrics, PublishMetrics, RegistryMetrics
from pulse.runtime.settings import Settings
from pulse.services.bridge import Bridge
from pulse.services.bridge_admission import Admission
from pulse.services.bridge_hand import Hand
from pulse.services.gateway import Gateway
from pulse.services.registry import DeviceRegistry
from pulse.wiring.mqtt_access import registry_services
from pulse.wiring.process import Process
from pulse.wiring.registry_check import RegistryCheck
from pulse.wiring.streams import DEAD_LETTERS, state_of

SERVED = {kind.stream: kind.subject_prefix for kind in UPWARD.values() if kind.message_type is not None}
"""The streams that messages go to, with the first token of their subjects."""


async def bridge_services(process: Process) -> list[Service]:
    """The services, sinks first."""
    settings = process.settings
    registry = DeviceRegistry()
    link = Dependency("mqtt")
    process.checks.extend((RegistryCheck(registry), link))
    RegistryMetrics(process.metrics).watch(lambda: registry.size)
    committer = GroupCommitter(
        process.nats,
        streams={prefix: stream for stream, prefix in SERVED.items()} | {"dead": DEAD_LETTERS},
        metrics=PublishMetrics(process.metrics),
        pending_max=settings.publish_pending_max,
        timeout_s=settings.publish_timeout_s,
        drain_s_max=settings.drain_s_max,
    )
    committer.name = "group commit of bridge"  # a gateway in the same process has one too
    account = account_of(settings)
    metrics = BridgeMetrics(process.metrics)
    hand = Hand(
        publisher=committer,
        admission=_admission(process, committer, registry, session=session_name(account.mqtt_client_id)),
        metrics=metrics,
        receive_max=settings.mqtt_receive_max,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
    )
    metrics.watch(lambda: hand.count)
    bridge = Bridge(
        broker=MqttBroker(account, filters=FILTERS),
        hand=hand,
        devices=registry,
        last_sequences=lambda: _last_sequences(process),
        link=link,
        metrics=metrics,
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
    )
    access = await registry_services(process, registry, is_open=lambda: bridge.has_subscribed)
    return [committer, *access, bridge]


def account_of(settings: Settings) -> Account:
    """The bridge's account at the broker; a client id that is not set is made of the host's name."""
    account = msgspec.convert(settings, Account, from_attributes=True)
    if account.mqtt_client_id:
        return account
    return msgspec.structs.replace(account, mqtt_client_id=f"pulse-bridge-{socket.gethostname()}")


def _admission(process: Process, committer: GroupCommitter, registry: DeviceRegistry, *, session: str) -> Admission:
    settings = process.settings
    limits = RateLimits(
        device=Rate(settings.device_messages_per_s, settings.device_messages_burst),
        tenant=Rate(settings.tenant_messages_per_s, settings.tenant_messages_burst),
        of_tenant=registry.limits_of,
    )
    letters = Rate(settings.mqtt_dead_letters_per_s, settings.mqtt_dead_letters_burst)
    return Admission(
        gateway=Gateway(publisher=committer, registry=registry, decoder=process.decoder(), limits=limits),
        devices=registry,
        letters=RateLimits(device=Rate(0, 1), tenant=letters),
        session=session,
        body_bytes_max=settings.body_bytes_max,
    )


async def _last_sequences(process: Process) -> Mapping[str, int]:
    return {stream: (await state_of(process.nats, stream)).last_seq for stream in SERVED}
