"""Who may come in through an MQTT broker, as the registry in memory says; nobody here asks PostgreSQL.

    broker ──connect──► MqttAccess ──► Session (until when) or Denial
    broker ──publish, subscribe──► MqttAccess ──► yes or no
    registry feed ──► Revocations ──► Broker.disconnect, where something was taken away from a device

It acknowledges nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import structlog

from pulse.domain.errors import Outage
from pulse.domain.identity import Device, Tenant
from pulse.domain.mqtt_access import (
    Action,
    Denial,
    device_of,
    is_own_client_id,
    may,
    session_end_ms,
    takes_away,
    user_name,
)
from pulse.domain.registry import Change, Put, Record, Removed, split_key
from pulse.domain.route import Route

log = structlog.get_logger()

REVOCATIONS_MAX = 10_000
"""Users that wait to be sent away; beyond it the end of their session is what ends them."""
RETRY_S = 1.0


class Registry(Protocol):
    """The devices and their tokens."""

    @property
    def ready(self) -> bool:
        """Whether all of them have been read once."""

    def authenticate(self, tenant_id: str, device_id: str, token: str, now_ms: int) -> bool:
        """Whether this device may speak with this token now."""

    def device(self, tenant_id: str, device_id: str) -> Device | None:
        """The device, where one of that id is known."""

    def tenant_enabled(self, tenant_id: str) -> bool:
        """Whether the tenant is known and enabled."""


class Feed(Protocol):
    """Where the registry's changes come from."""

    def watch(self) -> AsyncGenerator[Change, None]:
        """The changes, in order."""
        ...


class Broker(Protocol):
    """The broker, as far as it can send somebody away."""

    async def disconnect(self, tenant_id: str, device_id: str | None) -> int:
        """End the connections of a device, or of all devices of a tenant; how many. Raises Outage."""


class Metrics(Protocol):
    """What is counted."""

    def connected(self, outcome: str) -> None:
        """A client was let in (`allowed`) or not, for a reason of a bounded set."""

    def authorized(self, action: str, allowed: bool) -> None:
        """A client asked to publish or subscribe."""

    def disconnected(self, count: int) -> None:
        """So many connections were ended because something was taken away from their device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A device that is let in until `end_ms`; then it has to come again."""

    tenant_id: str
    device_id: str
    end_ms: int


class MqttAccess:
    """The decision on each connection and, where the broker asks for each, on each topic.

    Until `is_open` has said so once, nobody is let in: what a device sends must not arrive before somebody listens.
    """

    def __init__(
        self, *, registry: Registry, metrics: Metrics, session_s_max: float, is_open: Callable[[], bool] = lambda: True
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._longest_ms = round(session_s_max * 1000)
        self._is_open = is_open
        self._opened = False

    def connect(
        self, user: str, token: str, *, client_id: str, certificate_name: str = "", now_ms: int
    ) -> Session | Denial:
        """Let a device in or not; `certificate_name` is the common name of one that the broker has verified."""
        decided = self._decide(user, token, client_id, certificate_name, now_ms)
        self._metrics.connected(decided.value if isinstance(decided, Denial) else "allowed")
        return decided

    def may(self, user: str, action: Action, topic: str) -> bool:
        """Whether a client that was let in may do that, now. Raises Outage until the devices have been read."""
        if not self._registry.ready:
            raise Outage("registry", "the devices have not been read yet")
        ids = device_of(user)
        allowed = ids is not None and self._enabled(*ids) and may(*ids, action, topic)
        self._metrics.authorized(action.value, allowed)
        return allowed

    def refused(self, denial: Denial) -> Denial:
        """Count a connection that the broker's adapter turns away by itself."""
        self._metrics.connected(denial.value)
        return denial

    def _enabled(self, tenant_id: str, device_id: str) -> bool:
        device = self._registry.device(tenant_id, device_id)
        return device is not None and device.enabled and self._registry.tenant_enabled(tenant_id)

    def _decide(self, user: str, token: str, client_id: str, certificate_name: str, now_ms: int) -> Session | Denial:
        self._opened = self._opened or self._is_open()
        if not self._registry.ready or not self._opened:
            return Denial.NOT_READY
        ids = device_of(user)
        if ids is None or not self._registry.authenticate(*ids, token, now_ms):
            return Denial.CREDENTIALS
        if not is_own_client_id(*ids, client_id):
            return Denial.CLIENT_ID
        if certificate_name not in ("", user):
            return Denial.CERTIFICATE
        device = self._registry.device(*ids)
        if device is None:
            return Denial.CREDENTIALS
        end_ms = session_end_ms(device, token, now_ms=now_ms, longest_ms=self._longest_ms)
        return Session(tenant_id=ids[0], device_id=ids[1], end_ms=end_ms)


class Revocations:
    """The service that sends away who must not stay; it is itself the feed of the registry, to see each change first.

    A change that comes while nothing is read (a restart, a bucket made anew) goes unseen; the end of the session is
    what ends a device then.
    """

    name = "mqtt revocations"

    def __init__(self, *, feed: Feed, registry: Registry, broker: Broker, metrics: Metrics) -> None:
        self._feed = feed
        self._registry = registry
        self._broker = broker
        self._metrics = metrics
        self._waiting: dict[tuple[str, str | None], None] = {}
        self._something = asyncio.Event()

    async def watch(self) -> AsyncGenerator[Change, None]:
        """The changes of the feed, each looked at before it is passed on."""
        async with aclosing(self._feed.watch()) as changes:
            async for change in changes:
                self._look_at(change, time.time_ns() // 1_000_000)
                yield change

    async def run(self, stop: asyncio.Event) -> None:
        """Send away until `stop`; an outage is waited out."""
        async with asyncio.TaskGroup() as group:
            worker = group.create_task(self._work(), name=self.name)
            await stop.wait()
            worker.cancel()

    async def _work(self) -> None:
        while True:
            await self._something.wait()
            self._something.clear()
            while self._waiting:
                tenant_id, device_id = ids = next(iter(self._waiting))
                # Before the call: what is taken away meanwhile needs a call of its own.
                del self._waiting[ids]
                try:
                    count = await self._broker.disconnect(tenant_id, device_id)
                except Outage as outage:
                    self._waiting[ids] = None
                    log.warning("a device cannot be sent away yet", reason=str(outage), waiting=len(self._waiting))
                    await asyncio.sleep(RETRY_S)
                    continue
                self._metrics.disconnected(count)
                if count:
                    who = tenant_id if device_id is None else user_name(tenant_id, device_id)
                    log.info("sent away", who=who, connections=count)

    def _look_at(self, change: Change, now_ms: int) -> None:
        if isinstance(change, Put):
            ids = _ids(change.record)
            after: Record | None = change.record
        elif isinstance(change, Removed):
            ids, after = split_key(change.key), None
        else:
            return
        if ids is None or not takes_away(self._known(*ids), after, now_ms):
            return
        if len(self._waiting) >= REVOCATIONS_MAX:
            log.warning(
                "too many devices to be sent away; their sessions end by themselves", waiting=len(self._waiting)
            )
            return
        self._waiting[ids] = None
        self._something.set()

    def _known(self, tenant_id: str, device_id: str | None) -> Record | None:
        if device_id is not None:
            return self._registry.device(tenant_id, device_id)
        return Tenant(tenant_id, enabled=True) if self._registry.tenant_enabled(tenant_id) else None


def _ids(record: Record) -> tuple[str, str | None] | None:
    """Whose it is; None of a route, which no session depends on."""
    if isinstance(record, Route):
        return None
    return (record.tenant_id, None) if isinstance(record, Tenant) else (record.tenant_id, record.device_id)
