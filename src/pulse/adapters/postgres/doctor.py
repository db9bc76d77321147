"""What `pulse doctor` asks of PostgreSQL; every call raises Outage where it is away."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pulse.adapters.postgres.migrate import available, pending
from pulse.adapters.postgres.pool import Pool, transaction
from pulse.adapters.postgres.tiers import Tier, read_storage

SERVER = """
    SELECT current_setting('server_version') AS version, current_setting('server_version_num')::int AS number,
           extract(epoch FROM clock_timestamp())::float8 AS now, pg_is_in_recovery() AS standby,
           current_setting('transaction_read_only')::bool AS read_only,
           pg_database_size(current_database()) AS bytes
"""
# pg_stat_activity names every session to everybody, if not what it does.
CONNECTIONS = """
    SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
               - coalesce(current_setting('reserved_connections', true)::int, 0) AS usable,
           (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS role_limit,
           count(*) FILTER (WHERE backend_type = 'client backend') AS used,
           count(*) FILTER (WHERE backend_type = 'client backend' AND usename = current_user) AS used_by_role
    FROM pg_stat_activity
"""
PARTITIONED = "SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass('telemetry')"
HAS_DAY = "SELECT to_regclass('telemetry_' || to_char($1::date, 'YYYYMMDD')) IS NOT NULL"
DAYS_LOOKED_AT_MAX = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What it says of itself; `clock_offset_s` is how far its clock is ahead of ours, `tier` None before any table."""

    version: str
    number: int
    clock_offset_s: float
    round_trip_s: float
    standby: bool
    read_only: bool
    bytes: int
    tier: Tier | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """In use, of those that a role without privileges may have; `role_limit` is negative where there is none."""

    used: int
    usable: int
    used_by_role: int
    role_limit: int


class DatabaseFacts:
    """Asks on `pool`, in transactions that write nothing."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def server(self) -> Server:
        async with transaction(self._pool) as connection:
            asked_at, started = time.time(), time.monotonic()
            row = await connection.fetchrow(SERVER)
            took_s = time.monotonic() - started
            storage = await read_storage(connection)
        assert row is not None
        return Server(
            version=row["version"],
            number=row["number"],
            clock_offset_s=row["now"] - asked_at - took_s / 2,
            round_trip_s=took_s,
            standby=row["standby"],
            read_only=row["read_only"],
            bytes=row["bytes"],
            tier=None if storage is None else storage.tier,
        )

    async def connections(self) -> Connections:
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow(CONNECTIONS)
        assert row is not None
        return Connections(**row)

    async def migrations_left(self) -> list[str]:
        """Migrations of this Pulse that are not applied. Raises ConfigurationError where the database is another's."""
        async with transaction(self._pool) as connection:
            return [f"{each.number:04}_{each.name}" for each in await pending(connection, available())]

    async def partitions_ahead(self) -> int | None:
        """Days after today that have a partition, without a gap; -1: not even today; None: there are no partitions."""
        async with transaction(self._pool) as connection:
            if not await connection.fetchval(PARTITIONED):
                return None
            today = datetime.now(UTC).date()
            for ahead in range(DAYS_LOOKED_AT_MAX):
                if not await connection.fetchval(HAS_DAY, today + timedelta(days=ahead)):
                    return ahead - 1
        return DAYS_LOOKED_AT_MAX
