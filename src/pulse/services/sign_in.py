"""Signing in to the console, and who is signed in.

A session is looked up in PostgreSQL every `RECHECK_S` at most; in between, and for as long as PostgreSQL is away, what
was last seen of it holds. So whoever is signed in sees the console through an outage, and a key that is revoked ends
its sessions within RECHECK_S of a PostgreSQL that answers.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol, TypeVar

import structlog

from pulse.domain.access import ApiKey, ChangeRecord, in_force, is_secret, opens
from pulse.domain.account import (
    SECRET_RANDOM_BYTES,
    Attempts,
    Session,
    SessionLife,
    StoredAccount,
    is_account_name,
    is_session_secret,
    make_session_secret,
)
from pulse.domain.errors import LimitExceeded, Outage, Overloaded, Reason, Refusal
from pulse.services.control import Keys

log = structlog.get_logger()

T = TypeVar("T")

RECHECK_S = 5.0
SESSIONS_MAX = 10_000
"""Of those that this process remembers."""
ATTEMPTS_BURST = 5
ATTEMPTS_DRAIN_S = 60.0
ADDRESS_BURST = 20
NAMES_MAX = 10_000
HASHES_MAX = 2
HASHES_WAITING_MAX = 16
"""Passwords that are checked at the same time, 64 MiB and a core for some 50 ms each, and that wait for it."""


class Accounts(Protocol):
    """Accounts; every call raises Outage where the database is away."""

    async def find(self, name: str) -> StoredAccount | None:
        """The account of that name."""

    async def replace_hash(self, name: str, password_hash: str) -> None:
        """Keep another hash of the same password."""


class Sessions(Protocol):
    """Sessions and one-time links, by their secrets; every call raises Outage where the database is away."""

    async def begin(self, secret: str, *, key: ApiKey, life_s: float, record: ChangeRecord) -> Session:
        """Keep a new session, and `record` with it."""

    async def find(self, secret: str) -> Session | None:
        """The session of that secret, ended or not."""

    async def note_use(self, secret: str) -> None:
        """Remember that the session is used now."""

    async def end(self, secret: str, record: ChangeRecord) -> None:
        """Forget a session."""

    async def redeem(self, secret: str) -> ApiKey | None:
        """Whose link it is; it is none afterwards."""


class Passwords(Protocol):
    """Hashing, each call some 50 ms of a core."""

    def verify(self, password_hash: str | None, password: str) -> bool:
        """Whether it is the password of that hash; takes as long where there is no hash."""

    def renewed(self, password_hash: str, password: str) -> str | None:
        """A new hash where that one was made with older parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIn:
    """Who is signed in, and the secret that says so."""

    secret: str
    session: Session


class SignIn:
    """Lets people in; one a process."""

    def __init__(
        self,
        *,
        keys: Keys,
        accounts: Accounts,
        sessions: Sessions,
        passwords: Passwords,
        life: SessionLife,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._keys = keys
        self._accounts = accounts
        self._sessions = sessions
        self._passwords = passwords
        self._life = life
        self._clock = clock
        self._seen: dict[str, tuple[Session, datetime]] = {}
        self._by_name = Attempts(burst=ATTEMPTS_BURST, drain_s=ATTEMPTS_DRAIN_S, names_max=NAMES_MAX)
        self._by_address = Attempts(burst=ADDRESS_BURST, drain_s=ATTEMPTS_DRAIN_S, names_max=NAMES_MAX)
        self._hashing = asyncio.Semaphore(HASHES_MAX)
        self._hashing_or_waiting = 0

    async def with_key(self, secret: str, *, address: str) -> SignedIn:
        """Sign in with an API key. Raises Refusal UNAUTHENTICATED, LimitExceeded RATE_LIMITED, Outage."""
        now = self._clock()
        self._check_turn(now, address)
        stored = await self._keys.find(secret) if is_secret(secret) else None
        if stored is None or not opens(stored, secret, now):
            raise self._failed(now, address)
        return await self._begin(stored.key, "API key", address)

    async def with_password(self, name: str, password: str, *, address: str) -> SignedIn:
        """Sign in to an account. Raises as `with_key` does, the same for one that is not there."""
        now = self._clock()
        self._check_turn(now, address, name)
        stored = await self._accounts.find(name) if is_account_name(name) else None
        password_hash = stored.password_hash if stored is not None else None
        matches = await self._hashed(lambda: self._passwords.verify(password_hash, password))
        if stored is None or not matches or not in_force(stored.account.key, now):
            raise self._failed(now, address, name)
        renewed = await self._hashed(lambda: self._passwords.renewed(stored.password_hash, password))
        if renewed is not None:
            await self._accounts.replace_hash(name, renewed)
        self._by_name.forget(name)
        return await self._begin(stored.account.key, "password", address)

    async def with_link(self, secret: str, *, address: str) -> SignedIn:
        """Sign in with a one-time link. Raises as `with_key` does."""
        now = self._clock()
        self._check_turn(now, address)
        key = await self._sessions.redeem(secret) if is_session_secret(secret) else None
        if key is None or not in_force(key, now):
            raise self._failed(now, address)
        return await self._begin(key, "one-time link", address)

    async def who(self, secret: str) -> Session | None:
        """Whose session it is, None where it is nobody's. Raises Outage where this process has not seen it before."""
        if not is_session_secret(secret):
            return None
        now = self._clock()
        seen, seen_at = self._seen.get(secret, (None, now))
        if seen is not None and (now - seen_at).total_seconds() < RECHECK_S and self._stands(seen, now):
            return seen
        try:
            found = await self._sessions.find(secret)
            if found is not None and self._stands(found, now):
                await self._sessions.note_use(secret)
        except Outage:
            if seen is None:
                raise
            found = seen
        else:
            seen_at = now
        if found is None or not self._stands(found, now):
            self._seen.pop(secret, None)
            return None
        self._remember(secret, found, seen_at)
        return found

    async def end(self, signed_in: SignedIn) -> None:
        """Sign out."""
        self._seen.pop(signed_in.secret, None)
        await self._sessions.end(signed_in.secret, _record(signed_in.session.key, "session.end"))

    def _stands(self, session: Session, now: datetime) -> bool:
        return in_force(session.key, now) and self._life.lasts(session, now)

    def _remember(self, secret: str, session: Session, at: datetime) -> None:
        self._seen.pop(secret, None)
        if len(self._seen) >= SESSIONS_MAX:
            self._seen.pop(next(iter(self._seen)))
        self._seen[secret] = (session, at)

    async def _begin(self, key: ApiKey, how: str, address: str) -> SignedIn:
        secret = make_session_secret(secrets.token_bytes(SECRET_RANDOM_BYTES))
        record = _record(key, "session.begin", how=how, address=address)
        session = await self._sessions.begin(secret, key=key, life_s=self._life.life_s, record=record)
        self._remember(secret, session, self._clock())
        log.info("signed in", who=key.name, key_id=key.key_id, how=how, address=address)
        return SignedIn(secret=secret, session=session)

    def _check_turn(self, now: datetime, address: str, name: str | None = None) -> None:
        now_s = now.timestamp()
        wait_s = self._by_address.wait_s(address, now_s)
        if name is not None:
            wait_s = max(wait_s, self._by_name.wait_s(name[:256], now_s))
        if wait_s > 0:
            log.warning("too many failed sign-ins", every_s=5.0, address=address)
            raise LimitExceeded(
                Reason.RATE_LIMITED,
                f"too many failed attempts: try again in {timedelta(seconds=int(wait_s) + 1).seconds} s",
                limit="sign-in attempts",
                value=ATTEMPTS_BURST,
                retry_after_s=wait_s,
            )

    def _failed(self, now: datetime, address: str, name: str | None = None) -> Refusal:
        self._by_address.failed(address, now.timestamp())
        if name is not None:
            self._by_name.failed(name[:256], now.timestamp())
        log.warning("a sign-in failed", every_s=1.0, address=address)
        return Refusal(Reason.UNAUTHENTICATED, "that does not sign you in: check what you gave, and try again")

    async def _hashed(self, work: Callable[[], T]) -> T:
        if self._hashing_or_waiting >= HASHES_WAITING_MAX:
            raise Overloaded("console", "too many people sign in at this moment")
        self._hashing_or_waiting += 1
        try:
            async with self._hashing:
                return await asyncio.to_thread(work)
        finally:
            self._hashing_or_waiting -= 1


def _record(key: ApiKey, action: str, **details: object) -> ChangeRecord:
    return ChangeRecord(key_id=key.key_id, actor=key.name, action=action, tenant_id=key.tenant_id, details=details)
