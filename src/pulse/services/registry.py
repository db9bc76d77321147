"""The registry in memory: what the edge asks for each message, fed by the projection in JetStream.

Nobody here asks PostgreSQL: accepting a message needs NATS alone. Until the first state is complete nothing is
admitted (`ready` is false); afterwards an outage of NATS leaves the last known state in place.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import structlog

from pulse.domain.identity import DIGEST_BYTES, NEVER_MS, Device, Tenant, TokenDigest, proves
from pulse.domain.limits import NO_LIMITS, TenantLimits
from pulse.domain.registry import Change, Complete, Put, Reading, Record, Removed, split_key

logger = structlog.get_logger()


class RegistryFeed(Protocol):
    """Where the changes come from; it survives outages by reading again."""

    def watch(self) -> AsyncGenerator[Change, None]:
        """The changes, in the order that `domain.registry` describes; ends only by an error that is no outage."""
        ...


class DeviceRegistry:
    """All tenants and devices in memory; one writer (`apply`), any number of readers, one event loop.

    A device costs about 180 bytes: its place in its tenant's dict, its id, and one bytes object that holds a flag
    and 40 bytes for each token (SHA-256, and its end as int64 ms).
    """

    def __init__(self) -> None:
        self._known = _Maps()
        self._reading = self._known
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether the state has been complete once."""
        return self._ready

    @property
    def size(self) -> int:
        """How many devices are known, disabled ones included."""
        return sum(len(devices) for devices in self._known.devices.values())

    def authenticate(self, tenant_id: str, device_id: str, token: str, now_ms: int) -> bool:
        """Whether `token` is a valid one of that device, and device and tenant are enabled.

        Unknown, disabled and wrong are the same answer after the same work. False until `ready`.
        """
        known = self._known
        packed = known.devices.get(tenant_id, _NO_DEVICES).get(device_id, _NOBODY)
        proved = proves(_TOKEN.iter_unpack(packed[1:]), token, now_ms)
        return proved & (packed[0] == 1) & known.tenants.get(tenant_id, False)

    def device(self, tenant_id: str, device_id: str) -> Device | None:
        """The device, or None where none of that id is known."""
        packed = self._known.devices.get(tenant_id, _NO_DEVICES).get(device_id)
        return None if packed is None else _unpack(tenant_id, device_id, packed)

    def may_speak(self, tenant_id: str, device_id: str) -> bool:
        """Whether device and tenant are known and enabled: for an edge behind which somebody else asked for a token."""
        packed = self._known.devices.get(tenant_id, _NO_DEVICES).get(device_id, _NOBODY)
        return packed[0] == 1 and self.tenant_enabled(tenant_id)

    def tenant_enabled(self, tenant_id: str) -> bool:
        """Whether the tenant is known and enabled."""
        return self._known.tenants.get(tenant_id, False)

    def limits_of(self, tenant_id: str) -> TenantLimits | None:
        """The tenant's own limits; None where it has none, or is not known."""
        return self._known.limits.get(tenant_id)

    def apply(self, change: Change) -> None:
        """Take in one change of the feed.

        A reading from scratch fills new maps beside the old ones, which serve until it is complete: what vanished
        unseen is gone then, and a reading that breaks off has changed nothing.
        """
        match change:
            case Put():
                self._reading.put(change.record)
            case Removed():
                self._reading.remove(change.key)
            case Reading():
                self._reading = _Maps() if change.from_scratch else self._known
            case Complete():
                self._known = self._reading
                self._ready = True


class RegistryMirror:
    """The service that keeps a DeviceRegistry like its feed; it acknowledges nothing and holds nothing back."""

    name = "registry mirror"

    def __init__(self, *, feed: RegistryFeed, registry: DeviceRegistry) -> None:
        self._feed = feed
        self._registry = registry

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the feed until `stop`; an error of the feed that is no outage ends it."""
        async with asyncio.TaskGroup() as tasks:
            follower = tasks.create_task(self._follow(), name=self.name)
            await stop.wait()
            follower.cancel()

    async def _follow(self) -> None:
        async with aclosing(self._feed.watch()) as changes:
            async for change in changes:
                self._registry.apply(change)
                if isinstance(change, Complete):
                    logger.info("registry is complete", devices=self._registry.size)


class _Maps:
    """Tenants by id, the limits of those that have some of their own, and devices by tenant and id."""

    __slots__ = ("devices", "limits", "tenants")

    def __init__(self) -> None:
        self.tenants: dict[str, bool] = {}
        self.limits: dict[str, TenantLimits] = {}
        self.devices: dict[str, dict[str, bytes]] = {}

    def put(self, record: Record) -> None:
        if isinstance(record, Tenant):
            self.tenants[record.tenant_id] = record.enabled
            if record.limits == NO_LIMITS:
                self.limits.pop(record.tenant_id, None)
            else:
                self.limits[record.tenant_id] = record.limits
        elif isinstance(record, Device):
            self.devices.setdefault(record.tenant_id, {})[record.device_id] = _pack(record)

    def remove(self, key: str) -> None:
        tenant_id, device_id = split_key(key) or (None, None)
        if tenant_id is None:
            return
        if device_id is None:
            self.tenants.pop(tenant_id, None)
            self.limits.pop(tenant_id, None)
            return
        devices = self.devices.get(tenant_id)
        if devices is not None:
            devices.pop(device_id, None)
            if not devices:
                del self.devices[tenant_id]


_NO_DEVICES: dict[str, bytes] = {}
_TOKEN = struct.Struct(f"<{DIGEST_BYTES}sq")


def _pack(device: Device) -> bytes:
    tokens = (
        _TOKEN.pack(token.digest, NEVER_MS if token.expires_at_ms is None else token.expires_at_ms)
        for token in device.tokens
    )
    return (b"\1" if device.enabled else b"\0") + b"".join(tokens)


def _unpack(tenant_id: str, device_id: str, packed: bytes) -> Device:
    tokens = tuple(
        TokenDigest(digest, None if expires_at_ms == NEVER_MS else expires_at_ms)
        for digest, expires_at_ms in _TOKEN.iter_unpack(packed[1:])
    )
    return Device(tenant_id, device_id, packed[0] == 1, tokens)


_NOBODY = _pack(Device("", "", enabled=False, tokens=(TokenDigest(bytes(DIGEST_BYTES)),)))
"""Stands for any unknown device, so that asking for one costs as much as a wrong token."""
