"""The registry: what the edge knows of tenants, devices and routes, a projection of PostgreSQL.

One entry each, under a key of its own: `tenant.{tenant_id}`, `device.{tenant_id}.{device_id}` and
`route.{tenant_id}.{route_id}`. A feed tells it as changes: Reading, the state, Complete, then live changes without end;
after an interruption again from Reading, and not from scratch only if the reading before was completed.
"""

from __future__ import annotations

import msgspec

from pulse.domain.errors import Refusal
from pulse.domain.identity import DIGEST_BYTES, Device, Tenant, TokenDigest, is_id
from pulse.domain.limits import NO_LIMITS, TenantLimits
from pulse.domain.route import Route, decode_route, encode_route_for_edge

Record = Tenant | Device | Route
"""A route has none of its webhook's headers here."""


class Reading(msgspec.Struct, frozen=True):
    """A feed begins to read: everything from scratch, or only what changed since its last word."""

    from_scratch: bool


class Put(msgspec.Struct, frozen=True):
    """A tenant, device or route as it is now."""

    record: Record


class Removed(msgspec.Struct, frozen=True):
    """What stood under this key is gone."""

    key: str


class Complete(msgspec.Struct, frozen=True):
    """All that there was when the reading began has been told; what follows is live."""


Change = Reading | Put | Removed | Complete


def same_admission(left: Record | None, right: Record | None, now_ms: int) -> bool:
    """Whether both say the same from now on: tokens that have expired and the order of tokens do not count."""
    return _from_now_on(left, now_ms) == _from_now_on(right, now_ms)


def _from_now_on(record: Record | None, now_ms: int) -> Record | None:
    if not isinstance(record, Device):
        return record
    alive = (token for token in record.tokens if token.expires_at_ms is None or now_ms < token.expires_at_ms)
    return msgspec.structs.replace(record, tokens=tuple(sorted(alive, key=lambda token: token.digest)))


def tenant_key(tenant_id: str) -> str:
    """The registry key of a tenant."""
    return f"tenant.{tenant_id}"


def device_key(tenant_id: str, device_id: str) -> str:
    """The registry key of a device."""
    return f"device.{tenant_id}.{device_id}"


def route_key(tenant_id: str, route_id: str) -> str:
    """The registry key of a route."""
    return f"route.{tenant_id}.{route_id}"


def record_key(record: Record) -> str:
    """The registry key of `record`."""
    if isinstance(record, Tenant):
        return tenant_key(record.tenant_id)
    if isinstance(record, Route):
        return route_key(record.tenant_id, record.route_id)
    return device_key(record.tenant_id, record.device_id)


def split_key(key: str) -> tuple[str, str | None] | None:
    """(tenant_id, device_id) of a device's key, (tenant_id, None) of a tenant's, None of any other."""
    match key.split("."):
        case ["device", tenant_id, device_id] if is_id(tenant_id) and is_id(device_id):
            return tenant_id, device_id
        case ["tenant", tenant_id] if is_id(tenant_id):
            return tenant_id, None
    return None


def split_route_key(key: str) -> tuple[str, str] | None:
    """(tenant_id, route_id) of a route's key, None of any other."""
    match key.split("."):
        case ["route", tenant_id, route_id] if is_id(tenant_id) and is_id(route_id):
            return tenant_id, route_id
    return None


class _TenantValue(msgspec.Struct, frozen=True, omit_defaults=True):
    v: int
    enabled: bool
    limits: TenantLimits = NO_LIMITS


class _DeviceValue(msgspec.Struct, frozen=True):
    v: int
    enabled: bool
    tokens: tuple[TokenDigest, ...]


_encoder = msgspec.json.Encoder()
_tenant_decoder = msgspec.json.Decoder(_TenantValue)
_device_decoder = msgspec.json.Decoder(_DeviceValue)


def encode_record(record: Record) -> bytes:
    """The registry's value of `record`; its ids stand in the key.

    A tenant is `{"v":1,"enabled":true}`, with `"limits":{"messages":{"per_s":50.0,"burst":100}}` where it has some of
    its own; a device has `"tokens":[{"digest":"<base64>"}]`, with `"expires_at_ms"` for a token that ends. A route is
    as `domain/route.py` has it.
    """
    if isinstance(record, Route):
        return encode_route_for_edge(record)
    if isinstance(record, Tenant):
        return _encoder.encode(_TenantValue(v=1, enabled=record.enabled, limits=record.limits))
    return _encoder.encode(_DeviceValue(v=1, enabled=record.enabled, tokens=record.tokens))


def decode_record(key: str, value: bytes) -> Record | None:
    """What stands under `key`; None where the key or the value is not one of ours."""
    ids = split_key(key)
    if ids is None:
        return _decode_route(key, value)
    tenant_id, device_id = ids
    try:
        if device_id is None:
            tenant = _tenant_decoder.decode(value)
            return Tenant(tenant_id, tenant.enabled, tenant.limits)
        device = _device_decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if any(len(token.digest) != DIGEST_BYTES for token in device.tokens):
        return None
    return Device(tenant_id, device_id, device.enabled, device.tokens)


def _decode_route(key: str, value: bytes) -> Route | None:
    try:
        route = decode_route(value)
    except Refusal:
        return None
    return route if route_key(route.tenant_id, route.route_id) == key and split_route_key(key) else None
