"""Who may speak: tenants, devices and their tokens.

A token is `pulse_` and 256 random bits; only its SHA-256 is ever stored.
"""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from datetime import datetime
from hmac import compare_digest

import msgspec

from pulse.domain.errors import Reason, Refusal
from pulse.domain.limits import NO_LIMITS, TenantLimits
from pulse.domain.presence import Presence

ID_PATTERN = "[A-Za-z0-9_-]{1,64}"
TOKEN_PREFIX = "pulse_"  # noqa: S105 (the prefix is public: it lets secret scanners find a leaked token)
TOKEN_RANDOM_BYTES = 32
DIGEST_BYTES = 32
NEVER_MS = 2**63 - 1
"""The end of what has none."""
TOKENS_PER_DEVICE_MAX = 4
"""Tokens of one device that are valid at the same time, however often it is rotated."""

_ID = re.compile(ID_PATTERN)


def is_id(value: str) -> bool:
    """Whether `value` can be a tenant's or device's id."""
    return _ID.fullmatch(value) is not None


def check_tenant_id(value: str, *, field: str = "tenant_id") -> str:
    """`value`, if it is an id; else Refusal INVALID_IDENTITY that names `field`."""
    return _check_id(value, field)


def check_device_id(value: str, *, field: str = "device_id") -> str:
    """`value`, if it is an id; else Refusal INVALID_IDENTITY that names `field`."""
    return _check_id(value, field)


def _check_id(value: str, field: str) -> str:
    if not is_id(value):
        raise Refusal(Reason.INVALID_IDENTITY, f"{field} must be 1 to 64 of A-Z a-z 0-9 _ -", field=field)
    return value


def make_token(randomness: bytes) -> str:
    """The token of 32 random bytes: `pulse_` and their base64url, 49 characters."""
    if len(randomness) != TOKEN_RANDOM_BYTES:
        raise ValueError(f"a token is made of {TOKEN_RANDOM_BYTES} random bytes, not {len(randomness)}")
    return TOKEN_PREFIX + urlsafe_b64encode(randomness).rstrip(b"=").decode()


def digest(token: str) -> bytes:
    """SHA-256 of the token; any string has one, also what a stranger sends.

    No salt and no slow hash: 256 random bits cannot be guessed.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


class TokenDigest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One token of a device: SHA-256, and the instant at which it ends, if it does."""

    digest: bytes
    expires_at_ms: int | None = None


class Tenant(msgspec.Struct, frozen=True):
    """A tenant as the edge sees it; the devices of one that is not enabled cannot speak."""

    tenant_id: str
    enabled: bool
    limits: TenantLimits = NO_LIMITS


class Device(msgspec.Struct, frozen=True):
    """A device as the edge sees it."""

    tenant_id: str
    device_id: str
    enabled: bool
    tokens: tuple[TokenDigest, ...] = ()


class TenantDetails(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant as people see it."""

    tenant_id: str
    name: str
    enabled: bool
    limits: TenantLimits
    created_at: datetime
    updated_at: datetime


class TokenDetails(msgspec.Struct, frozen=True, kw_only=True):
    """A token as people see it: when it was made, and when it ends, if it does."""

    created_at: datetime
    expires_at: datetime | None


class DeviceDetails(msgspec.Struct, frozen=True, kw_only=True):
    """A device as people see it; `tokens` are those that have not expired, the newest first.

    `last_seen` is when the edge last heard of it, None where it never did.
    """

    tenant_id: str
    device_id: str
    name: str
    enabled: bool
    attributes: dict[str, object]
    created_at: datetime
    updated_at: datetime
    last_seen: datetime | None = None
    presence: Presence = Presence.OFFLINE
    tokens: tuple[TokenDetails, ...] = ()


class NewDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device to be made."""

    device_id: str
    name: str = ""
    attributes: dict[str, object] = {}


def admits(device: Device, token: str, now_ms: int) -> bool:
    """Whether `token` proves that the sender is `device`, now."""
    known = [(each.digest, NEVER_MS if each.expires_at_ms is None else each.expires_at_ms) for each in device.tokens]
    return proves(known, token, now_ms) & device.enabled


def proves(known: Iterable[tuple[bytes, int]], token: str, now_ms: int) -> bool:
    """Whether `token` is one of those `known` by their digests, each until its end in ms.

    Every digest is compared, in constant time, so how long it takes tells nothing about which one was near.
    """
    presented = digest(token)
    proved = False
    for known_digest, end_ms in known:
        proved |= compare_digest(known_digest, presented) & (now_ms < end_ms)
    return proved
