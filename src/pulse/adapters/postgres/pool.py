"""Connections to PostgreSQL, straight or through PgBouncer in transaction mode.

Invariant: nothing relies on a session. There are no named prepared statements (`statement_cache_size=0`), no session
settings, no LISTEN, no session lock; what belongs together is in one `transaction`. The transactions of a `Scoped` pool
work as the role that row-level security holds to one tenant (migration 0003), for as long as each of them lasts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import asyncpg
import msgspec
import structlog
from asyncpg.pool import PoolConnectionProxy

from pulse.adapters.postgres.errors import mapped
from pulse.domain.access import TENANT_ROLE, ChangeRecord
from pulse.domain.errors import ConfigurationError

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connect: TypeAlias = "Callable[..., Coroutine[Any, Any, asyncpg.Connection[asyncpg.Record]]]"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

logger = structlog.get_logger()

CLOSE_TIMEOUT_S = 2.0
IDLE_S_MAX = 300.0
ACQUIRE_TIMEOUT_S = 15.0

ENTER_TENANT = "SELECT set_config('role', $1, true), set_config('pulse.tenant', $2, true)"
"""SET LOCAL, twice: both end with the transaction."""
INSERT_CHANGE = """
    INSERT INTO audit_log (key_id, actor, action, tenant_id, target, details) VALUES ($1, $2, $3, $4, $5, $6::jsonb)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoped:
    """A pool as one caller may use it.

    With a `tenant_id`, PostgreSQL itself shows and takes that tenant's rows alone, whatever the statement says. With a
    `record`, what a transaction has changed is entered into audit_log before it commits: both are there, or neither.
    """

    pool: Pool
    tenant_id: str | None = None
    record: ChangeRecord | None = None


Database: TypeAlias = "Pool | Scoped"
"""What a store works on."""


@asynccontextmanager
async def open_pool(
    database_url: str,
    *,
    size_max: int,
    timeout_s: float,
    application_name: str,
    connect_s_max: float | None = None,
    make: Connect | None = None,
) -> AsyncIterator[Pool]:
    """A pool of at most `size_max` connections, made when first needed (by `make`): PostgreSQL may be away now.

    `timeout_s` bounds each statement, and each connection attempt where `connect_s_max` does not. Use it through
    `transaction`, which maps errors.
    """
    pool: Pool = asyncpg.create_pool(
        database_url,
        min_size=0,
        max_size=size_max,
        timeout=connect_s_max or timeout_s,
        command_timeout=timeout_s,
        max_inactive_connection_lifetime=IDLE_S_MAX,
        # PgBouncer allows application_name and refuses most other startup parameters
        server_settings={"application_name": application_name},
        statement_cache_size=0,
        reset=_keep,
        connect=make or connect,
    )
    await pool
    try:
        yield pool
    finally:
        await _close(pool)


async def connect(*args: Any, **options: Any) -> asyncpg.Connection[asyncpg.Record]:
    """asyncpg.connect, which tells of a malformed URL by a bare ValueError as well, with pieces of it in its text."""
    try:
        return await asyncpg.connect(*args, **options)
    except asyncpg.ClientConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(
            "DATABASE_URL is not the URL of a PostgreSQL database",
            hint="like postgresql://user:password@host:5432/database, special characters percent-encoded",
        ) from error


async def _keep(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Between two users of a connection there is nothing to reset: no session state is ever made."""


async def _close(pool: Pool) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await pool.close()
    except TimeoutError:
        logger.warning("connections to PostgreSQL did not close and were cut", timeout_s=CLOSE_TIMEOUT_S)
        pool.terminate()


@asynccontextmanager
async def open_connection(database_url: str, *, timeout_s: float, application_name: str) -> AsyncIterator[Connection]:
    """One connection outside any pool, for commands; made at once.

    Raises Outage or ConfigurationError where it cannot be made. `timeout_s` bounds the attempt and each statement.
    """
    with mapped():
        connection = await connect(
            database_url,
            timeout=timeout_s,
            command_timeout=timeout_s,
            server_settings={"application_name": application_name},
            statement_cache_size=0,
        )
    try:
        yield connection
    finally:
        try:
            await connection.close(timeout=CLOSE_TIMEOUT_S)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection.terminate()


@asynccontextmanager
async def transaction(database: Database, *, acquire_timeout_s: float = ACQUIRE_TIMEOUT_S) -> AsyncIterator[Connection]:
    """One transaction on a connection of `database`; commits at the end, rolls back on an exception.

    Raises Outage (also where no connection is free within `acquire_timeout_s`), ConfigurationError for a refused
    login or a tenant role that is missing, and asyncpg's own error for data or statements that are wrong.
    """
    scoped = database if isinstance(database, Scoped) else None
    pool = database.pool if isinstance(database, Scoped) else database
    with mapped():
        async with pool.acquire(timeout=acquire_timeout_s) as connection, connection.transaction():
            if scoped is None:
                yield connection
                return
            if scoped.tenant_id is not None:
                await _enter_tenant(connection, scoped.tenant_id)
            yield connection
            if scoped.record is not None:
                await _insert_change(connection, scoped.record)


async def _enter_tenant(connection: Connection, tenant_id: str) -> None:
    try:
        await connection.execute(ENTER_TENANT, TENANT_ROLE, tenant_id)
    except (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidParameterValueError) as error:
        raise ConfigurationError(
            f"the role in DATABASE_URL may not work as {TENANT_ROLE}",
            hint=f"as an administrator of the database: GRANT {TENANT_ROLE} TO that role",
        ) from error


async def _insert_change(connection: Connection, record: ChangeRecord) -> None:
    details = msgspec.json.encode(record.details).decode()
    await connection.execute(
        INSERT_CHANGE, record.key_id, record.actor, record.action, record.tenant_id, record.target, details
    )
