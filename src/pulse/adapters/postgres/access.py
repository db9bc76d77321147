"""API keys and the log of changes in PostgreSQL.

Every method is one transaction. They raise Outage where PostgreSQL is away, Refusal where a key or tenant is not there.
"""

from __future__ import annotations

import secrets
from datetime import datetime

import asyncpg
import msgspec

from pulse.adapters.postgres.pool import Database, transaction
from pulse.domain.access import KEY_RANDOM_BYTES, ApiKey, LoggedChange, StoredKey, make_secret
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import check_tenant_id, digest
from pulse.domain.labels import check_name

KEY_COLUMNS = "key_id, name, tenant_id, read_only, created_at, expires_at, revoked_at, last_used_at"
INSERT_KEY = f"""
    INSERT INTO api_keys (name, tenant_id, read_only, digest, expires_at) VALUES ($1, $2, $3, $4, $5)
    RETURNING {KEY_COLUMNS}
"""  # noqa: S608 - a constant
SELECT_KEYS = f"SELECT {KEY_COLUMNS} FROM api_keys WHERE key_id > $1 ORDER BY key_id LIMIT $2"  # noqa: S608
SELECT_KEY_BY_DIGEST = f"SELECT {KEY_COLUMNS}, digest FROM api_keys WHERE digest = $1"  # noqa: S608
REVOKE_KEY = f"""
    UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE key_id = $1 RETURNING {KEY_COLUMNS}
"""  # noqa: S608
# Once a minute, so that a busy key does not write a row for each request.
NOTE_USE = """
    UPDATE api_keys SET last_used_at = date_trunc('minute', now())
    WHERE key_id = $1 AND (last_used_at IS NULL OR last_used_at < date_trunc('minute', now()))
"""
SELECT_CHANGES = """
    SELECT id, at, key_id, actor, action, tenant_id, target, details FROM audit_log
    WHERE ($1::text IS NULL OR tenant_id = $1) AND ($2::bigint IS NULL OR id < $2)
    ORDER BY id DESC LIMIT $3
"""


class KeyStore:
    """Makes, lists, revokes and finds API keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self, *, name: str, tenant_id: str | None, read_only: bool = False, expires_at: datetime | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key; returns it with its secret, which cannot be read again. `tenant_id` None is an operator's."""
        check_name(name)
        if tenant_id is not None:
            check_tenant_id(tenant_id)
        secret = make_secret(secrets.token_bytes(KEY_RANDOM_BYTES))
        try:
            async with transaction(self._database) as connection:
                rows = await connection.fetch(INSERT_KEY, name, tenant_id, read_only, digest(secret), expires_at)
        except asyncpg.ForeignKeyViolationError as error:
            raise Refusal(Reason.NOT_FOUND, f"there is no tenant {tenant_id!r}", field="tenant_id") from error
        return ApiKey(**rows[0]), secret

    async def keys(self, *, after: int = 0, limit: int = 100) -> list[ApiKey]:
        """A page of at most `limit`, by id, of those behind `after`; revoked and expired ones too."""
        async with transaction(self._database) as connection:
            return [ApiKey(**row) for row in await connection.fetch(SELECT_KEYS, after, limit)]

    async def revoke(self, key_id: int) -> ApiKey:
        """End a key, from the next request on; one that has ended stays as it is."""
        async with transaction(self._database) as connection:
            row = await connection.fetchrow(REVOKE_KEY, key_id)
            if row is None:
                message = f"there is no key {key_id}: `pulse key list` lists them"
                raise Refusal(Reason.NOT_FOUND, message, field="key_id")
        return ApiKey(**row)

    async def find(self, secret: str) -> StoredKey | None:
        """The key of that secret, in force or not."""
        async with transaction(self._database) as connection:
            row = await connection.fetchrow(SELECT_KEY_BY_DIGEST, digest(secret))
        if row is None:
            return None
        fields = dict(row)
        return StoredKey(digest=fields.pop("digest"), key=ApiKey(**fields))

    async def note_use(self, key_id: int) -> None:
        """Remember that the key is used now, to the minute."""
        async with transaction(self._database) as connection:
            await connection.execute(NOTE_USE, key_id)


class ChangeLog:
    """Reads what was changed; writing it is `pool.transaction`'s."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def changes(
        self, *, tenant_id: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[LoggedChange]:
        """A page of at most `limit`, the newest first, of those older than `before`."""
        async with transaction(self._database) as connection:
            rows = await connection.fetch(SELECT_CHANGES, tenant_id, before, limit)
        return [LoggedChange(**{**row, "details": msgspec.json.decode(row["details"])}) for row in rows]
