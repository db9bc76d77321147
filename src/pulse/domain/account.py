"""Who is signed in to the console: accounts, sessions, one-time links, and how often one may try.

    way in       what is proved            who it is then
    API key      its secret                that key
    account      its password (argon2id)   a key of its own, whose secret nobody knows
    link         a secret, once            the key that it was made for

A session's secret is 256 random bits in a cookie; only its SHA-256 is ever stored. The token of its forms follows from
the secret, so that it needs no place of its own and ends with the session.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from datetime import datetime

import msgspec

from pulse.domain.access import ApiKey
from pulse.domain.errors import Reason, Refusal

SECRET_RANDOM_BYTES = 32
PASSWORD_LENGTH_MIN = 12
PASSWORD_LENGTH_MAX = 256
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
FORM_TOKEN_PURPOSE = b"pulse console form"
_NAME = re.compile(NAME_PATTERN)
_SECRET = re.compile("[A-Za-z0-9_-]{43}")


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """An account as people see it; it may what `key` may."""

    name: str
    key: ApiKey
    created_at: datetime
    changed_at: datetime


class StoredAccount(msgspec.Struct, frozen=True):
    """An account with the hash of its password."""

    account: Account
    password_hash: str


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody who is signed in, as whom, and until when at most."""

    key: ApiKey
    created_at: datetime
    used_at: datetime
    expires_at: datetime


class SessionLife(msgspec.Struct, frozen=True, kw_only=True):
    """How long a session lasts at most, and how long without a request."""

    life_s: float
    idle_s: float

    def lasts(self, session: Session, now: datetime) -> bool:
        """Whether `session` is still one at `now`."""
        return now < session.expires_at and (now - session.used_at).total_seconds() < self.idle_s


def check_account_name(name: str) -> str:
    """`name`, if an account may have it. Raises Refusal INVALID_REQUEST."""
    if _NAME.fullmatch(name) is None:
        message = "a name is 1 to 64 of A-Z a-z 0-9 . _ @ -, and begins with a letter or digit"
        raise Refusal(Reason.INVALID_REQUEST, message, field="name")
    return name


def is_account_name(name: str) -> bool:
    """Whether there can be an account of that name at all."""
    return _NAME.fullmatch(name) is not None


def check_password(password: str, name: str) -> str:
    """`password`, if it may be that of `name`. Raises Refusal INVALID_REQUEST. Source: NIST SP 800-63B, 5.1.1.2."""
    if not PASSWORD_LENGTH_MIN <= len(password) <= PASSWORD_LENGTH_MAX:
        message = f"a password has {PASSWORD_LENGTH_MIN} to {PASSWORD_LENGTH_MAX} characters"
        raise Refusal(Reason.INVALID_REQUEST, message, field="password")
    if name.lower() in password.lower() or len(set(password)) < 5:
        message = "that password is too easy to guess: no account name in it, and five different characters at least"
        raise Refusal(Reason.INVALID_REQUEST, message, field="password")
    return password


def make_session_secret(randomness: bytes) -> str:
    """The secret of 32 random bytes: their base64url, 43 characters; of a session or a link."""
    if len(randomness) != SECRET_RANDOM_BYTES:
        raise ValueError(f"a secret is made of {SECRET_RANDOM_BYTES} random bytes, not {len(randomness)}")
    return urlsafe_b64encode(randomness).rstrip(b"=").decode()


def is_session_secret(text: str) -> bool:
    """Whether `text` looks like one; what does not is refused without asking the database."""
    return _SECRET.fullmatch(text) is not None


def form_token(secret: str) -> str:
    """What each form of the holder of `secret` carries, and nobody else can make."""
    mac = hmac.digest(secret.encode(), FORM_TOKEN_PURPOSE, hashlib.sha256)
    return urlsafe_b64encode(mac).rstrip(b"=").decode()


def is_form_token(token: str, secret: str) -> bool:
    """Whether `token` belongs to `secret`; compares in constant time."""
    return hmac.compare_digest(token.encode("utf-8", "surrogatepass"), form_token(secret).encode())


class Attempts:
    """How often each of some names has failed, in a memory of at most `names_max`; whoever failed longest ago goes.

    Each failure fills a bucket that holds `burst` and drains one in `drain_s`. A name that is forgotten can try again:
    with 10,000 in memory and one address a bucket, a stranger needs as many addresses to be forgotten.
    """

    def __init__(self, *, burst: int, drain_s: float, names_max: int) -> None:
        self._burst = burst
        self._drain_s = drain_s
        self._names_max = names_max
        self._fills: dict[str, tuple[float, float]] = {}

    def wait_s(self, name: str, now_s: float) -> float:
        """How long `name` has to wait before it may try; 0 where it may now."""
        return max(0.0, (self._level(name, now_s) - (self._burst - 1)) * self._drain_s)

    def failed(self, name: str, now_s: float) -> None:
        """Remember a failure."""
        level = min(self._level(name, now_s) + 1.0, float(self._burst))
        self._fills.pop(name, None)
        if len(self._fills) >= self._names_max:
            self._fills.pop(next(iter(self._fills)))
        self._fills[name] = (level, now_s)

    def forget(self, name: str) -> None:
        """It has succeeded."""
        self._fills.pop(name, None)

    def _level(self, name: str, now_s: float) -> float:
        level, at_s = self._fills.get(name, (0.0, now_s))
        return max(0.0, level - (now_s - at_s) / self._drain_s)
