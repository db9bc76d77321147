"""Migrations against a real PostgreSQL; the planning is in the first tests, without one."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from pulse.adapters.postgres.migrate import Applied, Migration, available, migrate, parse, pending, plan
from pulse.adapters.postgres.pool import open_connection
from pulse.domain.errors import ConfigurationError, Outage

ONE = b"CREATE TABLE one (n integer);\nINSERT INTO one VALUES (1);\n"
TWO = b"CREATE TABLE two (n integer);"
BROKEN = b"CREATE TABLE two (n integer); INSERT INTO nowhere VALUES (1);"


def files(*contents: bytes) -> list[Migration]:
    return parse({f"{number:04}_step.sql": content for number, content in enumerate(contents, start=1)})


def applied(migrations: list[Migration]) -> list[Applied]:
    return [Applied(number=one.number, name=one.name, sha256=one.sha256) for one in migrations]


def test_the_files_of_this_version_are_numbered_from_one_without_a_gap() -> None:
    migrations = available()
    assert [one.number for one in migrations] == list(range(1, len(migrations) + 1))
    assert migrations[0].name == "identity"


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["0001_a.sql", "0003_c.sql"], "0002 is missing"),
        (["0001_a.sql", "0001_b.sql"], "0002 is missing or there twice"),
        (["0002_b.sql"], "0001 is missing"),
        (["1_a.sql"], "not named"),
        (["0001-a.sql"], "not named"),
    ],
)
def test_a_gap_a_double_or_a_wrong_name_among_the_files_is_refused(names: list[str], what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        parse(dict.fromkeys(names, ONE))


def test_what_is_left_follows_what_was_applied() -> None:
    migrations = files(ONE, TWO)
    assert plan(migrations, []) == migrations
    assert plan(migrations, applied(migrations[:1])) == migrations[1:]
    assert plan(migrations, applied(migrations)) == []


def test_a_file_that_was_changed_after_it_was_applied_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="0001_step was applied from another file"):
        plan(files(TWO), applied(files(ONE)))


def test_a_database_that_is_newer_than_the_code_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"newer than this Pulse: it has migration 0002_step"):
        plan(files(ONE), applied(files(ONE, TWO)))


def test_a_number_that_was_left_out_in_the_database_is_refused() -> None:
    migrations = files(ONE, TWO)
    with pytest.raises(ConfigurationError, match="0001 was never applied"):
        plan(migrations, applied(migrations[1:]))


async def test_all_files_are_applied_in_order_and_a_second_run_applies_none(database: str) -> None:
    migrations = files(ONE, TWO)
    started: list[Migration] = []
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        assert await pending(connection, migrations) == migrations
        assert await migrate(connection, migrations, on_start=started.append) == migrations
        assert started == migrations
        assert await pending(connection, migrations) == []
        assert await migrate(connection, migrations) == []
        assert await connection.fetchval("SELECT count(*) FROM one") == 1


async def test_the_files_of_this_version_apply(database: str) -> None:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        assert await migrate(connection, available()) == available()


async def test_a_file_that_fails_leaves_nothing_of_itself_and_what_came_before(database: str) -> None:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        with pytest.raises(asyncpg.UndefinedTableError):
            await migrate(connection, files(ONE, BROKEN))
        assert await connection.fetchval("SELECT to_regclass('two') IS NULL")
        assert await pending(connection, files(ONE, TWO)) == files(ONE, TWO)[1:]
        assert await migrate(connection, files(ONE, TWO)) == files(ONE, TWO)[1:]


async def test_a_file_and_the_record_of_it_are_one_transaction(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pulse.adapters.postgres.migrate.RECORD", "SELECT 1 / (1 - $1::int), $2::text, $3::text")
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        with pytest.raises(asyncpg.DivisionByZeroError):
            await migrate(connection, files(ONE))
        assert await connection.fetchval("SELECT to_regclass('one') IS NULL")


async def test_of_two_runners_at_once_each_file_is_applied_by_one(database: str) -> None:
    migrations = files(ONE, *(b"INSERT INTO one VALUES (%d);" % n for n in range(2, 12)))

    async def run() -> list[Migration]:
        async with open_connection(database, timeout_s=10, application_name="test") as connection:
            return await migrate(connection, migrations)

    done = await asyncio.gather(*(run() for _ in range(4)))
    assert sorted(one.number for part in done for one in part) == list(range(1, 12))
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        assert await connection.fetchval("SELECT count(*) FROM one") == 11


async def test_a_runner_that_cannot_have_the_lock_in_time_says_so_and_applies_nothing(database: str) -> None:
    async with (
        open_connection(database, timeout_s=10, application_name="test") as holder,
        open_connection(database, timeout_s=10, application_name="test") as connection,
        holder.transaction(),
    ):
        await holder.execute("SELECT pg_advisory_xact_lock($1)", 0x50554C5345)
        with pytest.raises(Outage, match="lock timeout"):
            await migrate(connection, files(ONE), lock_timeout_s=0.05)
        assert await pending(connection, files(ONE)) == files(ONE)


async def test_a_role_that_may_not_make_tables_is_told_so(database: str) -> None:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await connection.execute("SET search_path = pg_catalog")
        with pytest.raises(ConfigurationError, match="may not change the schema"):
            await migrate(connection, files(ONE))


async def test_a_server_that_is_not_there_is_an_outage(free_port: int) -> None:
    with pytest.raises(Outage):
        async with open_connection(f"postgresql://pulse@127.0.0.1:{free_port}/x", timeout_s=5, application_name="test"):
            pass


@pytest.mark.parametrize("url", ["nonsense://x", "postgresql://host:port/x"])
async def test_a_url_that_is_none_is_for_the_operator_to_mend(url: str) -> None:
    with pytest.raises(ConfigurationError, match="DATABASE_URL"):
        async with open_connection(url, timeout_s=5, application_name="test"):
            pass


async def test_a_wrong_password_and_a_missing_database_are_for_the_operator_to_mend(database: str) -> None:
    server, _, _name = database.rpartition("/")
    with pytest.raises(ConfigurationError, match="no database of the name"):
        async with open_connection(f"{server}/nowhere", timeout_s=5, application_name="test"):
            pass
    scheme, _, host = server.rpartition("@")
    with pytest.raises(ConfigurationError, match="user or password"):
        async with open_connection(
            f"{scheme.rpartition(':')[0]}:wrong@{host}/postgres", timeout_s=5, application_name="test"
        ):
            pass
