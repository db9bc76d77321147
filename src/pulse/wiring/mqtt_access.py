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
from pulse.adapters.nats.mqtt_queues import cut_queues, cut_route_queues
from pulse.adapters.nats.nkeys import AccountKey
from pulse.api.mqtt_hooks import MqttHooks, OwnUser
from pulse.domain.mqtt_access import DOWN, Denial, down_filters, up_filters, user_name
from pulse.runtime.http import Application
from pulse.runtime.lifecycle import Service
from pulse.runtime.metrics import MqttAccessMetrics
from pulse.services.maintenance import Chore, Maintenance
from pulse.services.mqtt_access import MqttAccess, Revocations
from pulse.wiring.process import NATS_WAIT_S_MAX, Process

CUT_QUEUES_EVERY_S = 5.0
"""A device that is told as much as its rate allows adds some 50 MB in that time."""


async def callout_services(process: Process, *, is_open: Callable[[], bool]) -> list[Service]:
    """Under `pulse up`, what answers nats-server out of the registry.

    Nobody is let in until `is_open` has said so once: nats-server confirms to devices what nobody is there to hear.
    """
    settings = process.settings
    if not settings.mqtt_issuer_secret:
        return []
    key = AccountKey(settings.mqtt_issuer_secret)
    client = await nats_connection.connect(settings.mqtt_access_url, name="pulse mqtt access", wait_s=NATS_WAIT_S_MAX)
    process.stack.push_async_callback(nats_connection.close, client, drain_s_max=1.0)
    metrics, registry, feed = MqttAccessMetrics(process.metrics), process.registry, process.registry_feed
    access = MqttAccess(registry=registry, metrics=metrics, session_s_max=settings.mqtt_session_s_max, is_open=is_open)
    revocations = Revocations(feed=feed.outermost, registry=registry, broker=Doorkeeper(client), metrics=metrics)
    feed.outermost = revocations
    callout = AuthCallout(client, key=key, decide=lambda asked: decide(access, asked))

    async def cut() -> int:
        count = await cut_queues(process.nats, DOWN) + await cut_route_queues(process.nats)
        metrics.queues_cut(count)
        return count

    chore = Chore(name="mqtt queues", run=cut, interval_s=CUT_QUEUES_EVERY_S)
    return [revocations, callout, Maintenance(chores=[chore], name="mqtt queues")]


def mqtt_hooks(process: Process, other: Application) -> Application:
    """What answers EMQX in front of `other`, out of the registry."""
    settings = process.settings
    access = MqttAccess(
        registry=process.registry,
        metrics=MqttAccessMetrics(process.metrics),
        session_s_max=settings.mqtt_session_s_max,
    )
    own_user = OwnUser(name=settings.mqtt_username, password=settings.mqtt_password)
    return MqttHooks(access=access, secret=settings.mqtt_hook_secret, own_user=own_user, other=other)


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
    return Allowed(
        user=user_name(*ids),
        end_ms=session.end_ms,
        publish=up_filters(*ids, named=False),
        subscribe=down_filters(*ids, named=False),
    )
