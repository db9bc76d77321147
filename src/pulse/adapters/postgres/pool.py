"""Connections to PostgreSQL, straight or through PgBouncer in transaction mode.

Invariant: nothing relies on a session. There are no named prepared statements (`statement_cache_size=0`), no session
settings, no LISTEN, no session lock; what belongs together is in one `transaction`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg
import structlog
from asyncpg.pool import PoolConnectionProxy

from pulse.adapters.postgres.errors import mapped
from pulse.domain.errors import ConfigurationError

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

logger = structlog.get_logger()

CLOSE_TIMEOUT_S = 2.0
IDLE_S_MAX = 300.0
ACQUIRE_TIMEOUT_S = 15.0


@asynccontextmanager
async def open_pool(
    database_url: str, *, size_max: int, timeout_s: float, application_name: str
) -> AsyncIterator[Pool]:
    """A pool of at most `size_max` connections, made when first needed: PostgreSQL may be away now.

    `timeout_s` bounds each connection attempt and each statement. Use it through `transaction`, which maps errors.
    """
    pool: Pool = asyncpg.create_pool(
        database_url,
        min_size=0,
        max_size=size_max,
        timeout=timeout_s,
        command_timeout=timeout_s,
        max_inactive_connection_lifetime=IDLE_S_MAX,
        # PgBouncer allows application_name and refuses most other startup parameters
        server_settings={"application_name": application_name},
        statement_cache_size=0,
        reset=_keep,
        connect=_connect,
    )
    await pool
    try:
        yield pool
    finally:
        await _close(pool)


async def _connect(*args: Any, **options: Any) -> asyncpg.Connection[asyncpg.Record]:
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
        connection = await _connect(
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
async def transaction(pool: Pool, *, acquire_timeout_s: float = ACQUIRE_TIMEOUT_S) -> AsyncIterator[Connection]:
    """One transaction on a connection of `pool`; commits at the end, rolls back on an exception.

    Raises Outage (also where no connection is free within `acquire_timeout_s`), ConfigurationError for a refused
    login, and asyncpg's own error for data or statements that are wrong.
    """
    with mapped():
        async with pool.acquire(timeout=acquire_timeout_s) as connection, connection.transaction():
            yield connection
