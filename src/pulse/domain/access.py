"""Who may use the control API: its keys, what each of them reaches, and the record of what was changed.

    scope              reads                    changes
    operator           everything               everything
    tenant             its tenant               its tenant's devices
    …, read-only       the same                 nothing

A key is `pulsekey_` and 256 random bits; only its SHA-256 is ever stored.
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from datetime import datetime

import msgspec

from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import digest

TENANT_ROLE = "pulse_tenant"
"""PostgreSQL's role under which row-level security shows one tenant's rows alone."""

KEY_PREFIX = "pulsekey_"
KEY_RANDOM_BYTES = 32
_SECRET = re.compile(KEY_PREFIX + "[A-Za-z0-9_-]{43}")


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """An API key as people see it; `tenant_id` is None for an operator's, which reaches every tenant.

    `last_used_at` is right to a minute.
    """

    key_id: int
    name: str
    tenant_id: str | None
    read_only: bool
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class StoredKey(msgspec.Struct, frozen=True):
    """An API key with the SHA-256 of its secret."""

    key: ApiKey
    digest: bytes


class ChangeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Who changes what; written in the transaction of the change itself.

    `key_id` is None where it was not done with a key (the command line); `tenant_id` is whose the changed thing is.
    """

    key_id: int | None
    actor: str
    action: str
    tenant_id: str | None = None
    target: str = ""
    details: dict[str, object] = {}


class LoggedChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change that was made."""

    id: int
    at: datetime
    key_id: int | None
    actor: str
    action: str
    tenant_id: str | None
    target: str
    details: dict[str, object]


def make_secret(randomness: bytes) -> str:
    """The secret of 32 random bytes: `pulsekey_` and their base64url, 52 characters."""
    if len(randomness) != KEY_RANDOM_BYTES:
        raise ValueError(f"a key is made of {KEY_RANDOM_BYTES} random bytes, not {len(randomness)}")
    return KEY_PREFIX + urlsafe_b64encode(randomness).rstrip(b"=").decode()


def is_secret(text: str) -> bool:
    """Whether `text` looks like a key at all; what does not is refused without asking the database."""
    return _SECRET.fullmatch(text) is not None


def opens(stored: StoredKey | None, secret: str, now: datetime) -> bool:
    """Whether `secret` is that key's, and the key is in force at `now`; compares in constant time."""
    known = stored.digest if stored is not None else bytes(32)
    same = hmac.compare_digest(known, digest(secret))
    return same and stored is not None and in_force(stored.key, now)


def in_force(key: ApiKey, now: datetime) -> bool:
    """Whether `key` is neither revoked nor expired at `now`."""
    return key.revoked_at is None and (key.expires_at is None or now < key.expires_at)


def check_reads(key: ApiKey, tenant_id: str | None) -> None:
    """Refusal FORBIDDEN where `key` may not read what belongs to `tenant_id`; None is what belongs to no tenant."""
    if key.tenant_id is None or key.tenant_id == tenant_id:
        return
    if tenant_id is None:
        raise Refusal(Reason.FORBIDDEN, "this needs an operator's key; this one is for one tenant")
    # The same for a tenant that is there and one that is not.
    raise Refusal(Reason.FORBIDDEN, f"this key reaches tenant {key.tenant_id} alone", field="tenant_id")


def check_changes(key: ApiKey, tenant_id: str | None) -> None:
    """Refusal FORBIDDEN where `key` may not change what belongs to `tenant_id`; None is what only operators change."""
    check_reads(key, tenant_id)
    if key.read_only:
        raise Refusal(Reason.FORBIDDEN, "this key may read and not change")
