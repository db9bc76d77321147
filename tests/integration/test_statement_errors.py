"""What a real PostgreSQL and a real driver say of a statement that is wrong, and of a connection that is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from pulse.adapters.postgres.pool import Pool, open_pool, transaction
from pulse.domain.errors import Outage


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_pool(database, size_max=2, timeout_s=10, application_name="test") as pool:
        yield pool


@pytest.mark.parametrize(
    ("statement", "arguments"),
    [("SELECT $1::int + $2::int", (1,)), ("SELECT $1::int", ()), ("SELECT 1", (1,)), ("SELECT $1::int", (1, 2))],
)
async def test_a_statement_with_another_number_of_arguments_is_a_bug_and_not_waited_for(
    pool: Pool, statement: str, arguments: tuple[int, ...]
) -> None:
    with pytest.raises(asyncpg.InterfaceError):
        async with transaction(pool) as connection:
            await connection.fetch(statement, *arguments)
    async with transaction(pool) as connection:
        assert await connection.fetchval("SELECT 1") == 1, "the connection is as good as before"


@pytest.mark.parametrize("further", [0, 1])
async def test_a_connection_that_is_ended_in_a_transaction_is_an_outage(pool: Pool, further: int) -> None:
    async def ended() -> None:
        async with pool.acquire() as other, transaction(pool) as connection:
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            await other.execute("SELECT pg_terminate_backend($1, 5000)", pid)
            for _ in range(further):
                with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
                    await connection.fetch("SELECT 1")
            await connection.fetch("SELECT 1")

    with pytest.raises(Outage):
        await ended()


async def test_a_pool_that_is_closed_is_an_outage(pool: Pool) -> None:
    async def used() -> None:
        async with transaction(pool):
            pass

    await pool.close()
    with pytest.raises(Outage):
        await used()
