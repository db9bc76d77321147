"""Who may come in through an MQTT broker: by nats-server's auth callout (`pulse up`), or by the questions of EMQX.

nats-server ─► AuthCallout ─┐
                            ├─► MqttAccess ◄── DeviceRegistry ◄── RegistryMirror ◄── Revocations ◄── RegistryFeed
EMQX (HTTP) ─► MqttHooks ───┘                                                            └──► Doorkeeper ─► nats-server
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pulse.adapters.nats import connection as nats_connection
from pulse.adapters.nats.auth_callout import Allowed, Asked, AuthCallout, Doorkeeper
from pulse.adapters.nats.nkeys import AccountKey
from pulse.adapters.nats.registry_feed import RegistryFeed
from pulse.api.mqtt_hooks import MqttHooks, OwnUser
from pulse.domain.mqtt_access import Denial, down_filters, up_filters, user_name
from pulse.runtime.http import Application
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import MqttAccessMetrics, RegistryMetrics
from pulse.services.mqtt_access import MqttAccess, Revocations
from pulse.services.registry import DeviceRegistry, RegistryMirror
from pulse.wiring.process import Process
from pulse.wiring.registry_check import RegistryCheck

NATS_WAIT_S_MAX = 60.0


async def registry_services(
    process: Process, registry: DeviceRegistry, *, is_open: Callable[[], bool] = lambda: True
) -> list[Service]:
    """What keeps `registry` like the projection; under `pulse up`, what answers nats-server out of it as well.

    Nobody is let in until `is_open` has said so once: nats-server confirms to devices what nobody is there to hear.
    """
    feed = RegistryFeed(process.nats)
    settings = process.settings
    if not settings.mqtt_issuer_secret:
        return [RegistryMirror(feed=feed, registry=registry, role="bridge")]
    key = AccountKey(settings.mqtt_issuer_secret)
    client = await nats_connection.connect(settings.mqtt_access_url, name="pulse mqtt access", wait_s=NATS_WAIT_S_MAX)
    process.stack.push_async_callback(nats_connection.close, client, drain_s_max=1.0)
    metrics = MqttAccessMetrics(process.metrics)
    access = MqttAccess(registry=registry, metrics=metrics, session_s_max=settings.mqtt_session_s_max, is_open=is_open)
    revocations = Revocations(feed=feed, registry=registry, broker=Doorkeeper(client), metrics=metrics)
    callout = AuthCallout(client, key=key, decide=lambda asked: decide(access, asked))
    return [RegistryMirror(feed=revocations, registry=registry, role="bridge"), revocations, callout]


def mqtt_hooks(process: Process, other: Application) -> tuple[Application, list[Service]]:
    """What answers EMQX in front of `other`, and what keeps its registry; not ready until that is complete."""
    settings = process.settings
    registry = DeviceRegistry()
    process.checks.append(RegistryCheck(registry))
    RegistryMetrics(process.metrics).watch(lambda: registry.size)
    access = MqttAccess(
        registry=registry, metrics=MqttAccessMetrics(process.metrics), session_s_max=settings.mqtt_session_s_max
    )
    own_user = OwnUser(name=settings.mqtt_username, password=settings.mqtt_password)
    hooks = MqttHooks(access=access, secret=settings.mqtt_hook_secret, own_user=own_user, other=other)
    return hooks, [RegistryMirror(feed=RegistryFeed(process.nats), registry=registry, role="ui")]


def decide(access: MqttAccess, asked: Asked) -> Allowed | None:
    """The decision on a client of nats-server, with the topics that the server is to hold it to."""
    if not asked.is_mqtt:
        access.refused(Denial.PROTOCOL)
        return None
    now_ms = time.time_ns() // 1_000_000
    session = access.connect(asked.user, asked.password, client_id=asked.client_id, now_ms=now_ms)
    if isinstance(session, Denial):
        return None
    ids = session.tenant_id, session.device_id
    return Allowed(user=user_name(*ids), end_ms=session.end_ms, publish=up_filters(*ids), subscribe=down_filters(*ids))
