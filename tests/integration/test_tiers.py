"""How telemetry is kept is found at migration, told to the operator, and no tenant sees more for it."""

from __future__ import annotations

import asyncpg
import pytest

from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Scoped, open_connection, open_pool, transaction
from pulse.adapters.postgres.tiers import Storage, Tier, read_storage, tier_of

TIMESCALE = pytest.mark.parametrize("database", ["timescale"], indirect=True)


@pytest.mark.parametrize(
    ("hypertable", "license_name", "tier"),
    [
        (False, None, Tier.NATIVE),
        (False, "timescale", Tier.NATIVE),
        (True, "apache", Tier.APACHE),
        (True, "timescale", Tier.COMMUNITY),
    ],
)
def test_the_tier_is_what_the_table_is_and_the_licence_allows(
    hypertable: bool, license_name: str | None, tier: Tier
) -> None:
    assert tier_of(hypertable=hypertable, license_name=license_name) is tier


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        (Storage(tier=Tier.NATIVE, version=None, available=False), "partitioned by the day"),
        (Storage(tier=Tier.NATIVE, version=None, available=True), "CREATE EXTENSION timescaledb"),
        (Storage(tier=Tier.NATIVE, version="2.19.3", available=True), "TimescaleDB 2.19.3 came when it had rows"),
        (Storage(tier=Tier.APACHE, version="2.19.3", available=True), "TimescaleDB 2.19.3, Apache edition"),
        (Storage(tier=Tier.COMMUNITY, version="2.29.1", available=True), "TimescaleDB 2.29.1, community edition"),
    ],
)
def test_each_tier_is_told_in_one_line(storage: Storage, words: str) -> None:
    assert words in storage.describe()
    assert "\n" not in storage.describe()


async def test_without_the_extension_telemetry_has_postgresqls_own_partitions(database: str) -> None:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        assert await read_storage(connection) is None
        await migrate(connection, available())
        found = await read_storage(connection)
    assert found is not None
    assert (found.tier, found.version) == (Tier.NATIVE, None)


@TIMESCALE
async def test_with_the_extension_telemetry_is_a_hypertable(database: str) -> None:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
        found = await read_storage(connection)
        rows = await connection.fetch("SELECT hypertable_name FROM timescaledb_information.hypertables")
    assert found is not None
    assert found.tier in (Tier.APACHE, Tier.COMMUNITY)
    assert [row["hypertable_name"] for row in rows] == ["telemetry"]


@TIMESCALE
async def test_a_table_that_has_rows_when_the_extension_comes_stays_as_it_is(database: str) -> None:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available()[:7])
        await connection.execute(
            "SELECT ensure_telemetry_day('2026-11-23');"
            "INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position)"
            " VALUES ('2026-11-23T12:00Z', 't1', 'd1', '{}', 1)"
        )
        await migrate(connection, available())
        found = await read_storage(connection)
        assert await connection.fetchval("SELECT count(*) FROM telemetry") == 1
    assert found is not None
    assert found.tier is Tier.NATIVE
    assert found.version is not None


@TIMESCALE
async def test_a_tenant_reaches_its_own_rows_through_the_table_and_nothing_through_a_chunk(database: str) -> None:
    """A grant on a hypertable reaches its chunks, and a policy does not."""
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
        await connection.execute(
            "INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position)"
            " SELECT '2026-11-23T12:00Z', tenant, 'd1', '{}', 1 FROM unnest(ARRAY['t1', 't2']) AS tenant"
        )
        chunk = await connection.fetchval("SELECT relation::text FROM telemetry_days()")
    async with open_pool(database, size_max=1, timeout_s=10, application_name="test") as pool:
        async with transaction(Scoped(pool=pool, tenant_id="t1")) as tenant:
            seen = await tenant.fetch("SELECT tenant_id FROM telemetry")
        assert [row["tenant_id"] for row in seen] == ["t1"]
        for statement in (
            f"SELECT * FROM {chunk}",  # noqa: S608
            "SELECT drop_telemetry_day(day, relation) FROM telemetry_days()",
            "SELECT drop_chunks('telemetry', older_than => now() + interval '1 year')",
            "SET row_security = off; SELECT * FROM telemetry",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with transaction(Scoped(pool=pool, tenant_id="t1")) as tenant:
                    await tenant.execute(statement)
