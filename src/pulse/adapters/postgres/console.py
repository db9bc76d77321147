"""Accounts, sessions and one-time links of the console.

Every method is one transaction. They raise Outage where PostgreSQL is away.
"""

from __future__ import annotations

import asyncpg

from pulse.adapters.postgres.access import KEY_COLUMNS
from pulse.adapters.postgres.pool import Database, Pool, Scoped, transaction
from pulse.domain.access import ApiKey, ChangeRecord
from pulse.domain.account import Account, Session, StoredAccount, check_account_name
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import digest

KEY = ", ".join(f"api_keys.{name.strip()}" for name in KEY_COLUMNS.split(","))
INSERT_KEY = f"""
    INSERT INTO api_keys (name, tenant_id, read_only, digest) VALUES ($1, $2, $3, sha256(uuid_send(gen_random_uuid())
        || uuid_send(gen_random_uuid()))) RETURNING {KEY_COLUMNS}
"""  # noqa: S608 - constants, as below
INSERT_ACCOUNT = """
    INSERT INTO accounts (name, key_id, password_hash) VALUES ($1, $2, $3) RETURNING created_at, changed_at
"""
SELECT_ACCOUNTS = f"""
    SELECT accounts.name AS account_name, accounts.created_at AS made_at, changed_at, password_hash, {KEY}
    FROM accounts JOIN api_keys USING (key_id) WHERE ($1::text IS NULL OR accounts.name = $1) ORDER BY accounts.name
    LIMIT 1000
"""  # noqa: S608
SET_PASSWORD = "UPDATE accounts SET password_hash = $2, changed_at = now() WHERE name = $1"  # noqa: S105 - SQL
KEEP_HASH = "UPDATE accounts SET password_hash = $2 WHERE name = $1"
END_SESSIONS_OF = (
    "DELETE FROM console_sessions USING accounts WHERE accounts.key_id = console_sessions.key_id AND name = $1"
)
REVOKE = """
    UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) FROM accounts
    WHERE accounts.key_id = api_keys.key_id AND accounts.name = $1
"""
INSERT_SESSION = """
    INSERT INTO console_sessions (digest, key_id, expires_at) VALUES ($1, $2, now() + make_interval(secs => $3))
    RETURNING created_at, used_at, expires_at
"""
# Once a minute at most, so that a busy tab does not write a row for each request.
USE_SESSION = """
    UPDATE console_sessions SET used_at = now() WHERE digest = $1 AND used_at < now() - interval '1 minute'
"""
SELECT_SESSION = f"""
    SELECT console_sessions.created_at AS begun_at, used_at, console_sessions.expires_at AS ends_at, {KEY}
    FROM console_sessions JOIN api_keys USING (key_id) WHERE console_sessions.digest = $1
"""  # noqa: S608
DELETE_SESSION = "DELETE FROM console_sessions WHERE digest = $1"
DELETE_ENDED = "DELETE FROM console_sessions WHERE expires_at < now()"
DELETE_ENDED_LINKS = "DELETE FROM console_links WHERE expires_at < now()"
INSERT_LINK = """
    INSERT INTO console_links (digest, key_id, expires_at)
    SELECT $1, key_id, now() + make_interval(secs => $3) FROM api_keys WHERE digest = $2
"""
REDEEM_LINK = f"""
    DELETE FROM console_links USING api_keys
    WHERE console_links.digest = $1 AND api_keys.key_id = console_links.key_id AND console_links.expires_at > now()
    RETURNING {KEY}
"""  # noqa: S608


class AccountStore:
    """Makes and finds accounts; satisfies `services.sign_in.Accounts`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, name: str, *, password_hash: str, tenant_id: str | None, read_only: bool) -> Account:
        """Make an account with a key of its own. Refusal CONFLICT where there is one, NOT_FOUND without that tenant."""
        check_account_name(name)
        try:
            async with transaction(self._database) as connection:
                row = await connection.fetchrow(INSERT_KEY, name, tenant_id, read_only)
                assert row is not None
                made = await connection.fetchrow(INSERT_ACCOUNT, name, row["key_id"], password_hash)
                assert made is not None
        except asyncpg.UniqueViolationError as error:
            raise Refusal(Reason.CONFLICT, f"account {name!r} is there already", field="name") from error
        except asyncpg.ForeignKeyViolationError as error:
            raise Refusal(Reason.NOT_FOUND, f"there is no tenant {tenant_id!r}", field="tenant_id") from error
        return Account(name=name, key=ApiKey(**row), created_at=made["created_at"], changed_at=made["changed_at"])

    async def find(self, name: str) -> StoredAccount | None:
        """The account of that name, in force or not."""
        async with transaction(self._database) as connection:
            row = await connection.fetchrow(SELECT_ACCOUNTS, name)
        return None if row is None else _account(row)

    async def accounts(self) -> list[Account]:
        """All of them by name, a thousand at most."""
        async with transaction(self._database) as connection:
            return [_account(row).account for row in await connection.fetch(SELECT_ACCOUNTS, None)]

    async def replace_hash(self, name: str, password_hash: str) -> None:
        """Keep another hash of the same password."""
        async with transaction(self._database) as connection:
            await connection.execute(KEEP_HASH, name, password_hash)

    async def set_password(self, name: str, password_hash: str) -> None:
        """Give the account another password, and end its sessions."""
        async with transaction(self._database) as connection:
            _check_there(name, await connection.execute(SET_PASSWORD, name, password_hash))
            await connection.execute(END_SESSIONS_OF, name)

    async def end(self, name: str) -> None:
        """Let nobody in by it any more, and end its sessions."""
        async with transaction(self._database) as connection:
            _check_there(name, await connection.execute(REVOKE, name))
            await connection.execute(END_SESSIONS_OF, name)


class SessionStore:
    """Sessions and links by their secrets; satisfies `services.sign_in.Sessions`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def begin(self, secret: str, *, key: ApiKey, life_s: float, record: ChangeRecord) -> Session:
        """Keep a new session; those that have ended go at the same time."""
        async with transaction(Scoped(pool=self._pool, record=record)) as connection:
            await connection.execute(DELETE_ENDED)
            row = await connection.fetchrow(INSERT_SESSION, digest(secret), key.key_id, life_s)
        assert row is not None
        return Session(key=key, **row)

    async def find(self, secret: str) -> Session | None:
        """The session of that secret."""
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow(SELECT_SESSION, digest(secret))
        if row is None:
            return None
        return Session(key=_key(row), created_at=row["begun_at"], used_at=row["used_at"], expires_at=row["ends_at"])

    async def note_use(self, secret: str) -> None:
        """Remember that the session is used now."""
        async with transaction(self._pool) as connection:
            await connection.execute(USE_SESSION, digest(secret))

    async def end(self, secret: str, record: ChangeRecord) -> None:
        """Forget a session."""
        async with transaction(Scoped(pool=self._pool, record=record)) as connection:
            await connection.execute(DELETE_SESSION, digest(secret))

    async def add_link(self, secret: str, *, key_secret: str, life_s: float) -> None:
        """Keep a link that signs in once, as the key of `key_secret`."""
        async with transaction(self._pool) as connection:
            await connection.execute(DELETE_ENDED_LINKS)
            await connection.execute(INSERT_LINK, digest(secret), digest(key_secret), life_s)

    async def redeem(self, secret: str) -> ApiKey | None:
        """Whose link it is; of two at once one gets it, and it is none afterwards."""
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow(REDEEM_LINK, digest(secret))
        return None if row is None else _key(row)


def _check_there(name: str, status: str) -> None:
    if status.endswith(" 0"):
        raise Refusal(Reason.NOT_FOUND, f"there is no account {name!r}", field="name")


def _account(row: asyncpg.Record) -> StoredAccount:
    account = Account(name=row["account_name"], key=_key(row), created_at=row["made_at"], changed_at=row["changed_at"])
    return StoredAccount(account, row["password_hash"])


def _key(row: asyncpg.Record) -> ApiKey:
    return ApiKey(**{name.strip(): row[name.strip()] for name in KEY_COLUMNS.split(",")})
