"""Which of three ways telemetry is kept; decided once, by migration 0008, and told by `pulse migrate`.

    native       PostgreSQL's own partitions, one a day
    apache       a hypertable with a chunk a day; TimescaleDB under the Apache licence alone
    community    the same, with all of TimescaleDB

Retention and rollups are Pulse's own in all three: `apache` has no policies and no continuous aggregates, and
`community` can compress no table with row-level security.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from pulse.adapters.postgres.errors import mapped
from pulse.adapters.postgres.pool import Connection


class Tier(StrEnum):
    """How telemetry is kept."""

    NATIVE = "native"
    APACHE = "apache"
    COMMUNITY = "community"


# The functions of migration 0008 are not asked: a dry run may come before it.
SELECT_STORAGE = """
    SELECT (SELECT relkind = 'r' FROM pg_class WHERE oid = to_regclass('telemetry')),
           (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'),
           current_setting('timescaledb.license', true),
           EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb')
"""


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """What a database is found to be; `version`: of the extension in it; `available`: whether it could be added."""

    tier: Tier
    version: str | None
    available: bool

    def describe(self) -> str:
        """One line for an operator."""
        if self.tier is not Tier.NATIVE:
            edition = "Apache" if self.tier is Tier.APACHE else "community"
            return f"telemetry is a hypertable, a chunk a day (TimescaleDB {self.version}, {edition} edition)"
        native = "telemetry is partitioned by the day, by PostgreSQL itself"
        if self.version is not None:
            return f"{native}; TimescaleDB {self.version} came when it had rows already"
        if self.available:
            return f"{native}; for a hypertable, CREATE EXTENSION timescaledb in an empty database, then migrate"
        return native


def tier_of(*, hypertable: bool, license_name: str | None) -> Tier:
    """The tier by what the table is and the setting `timescaledb.license` (`apache` or `timescale`)."""
    if not hypertable:
        return Tier.NATIVE
    return Tier.APACHE if license_name == "apache" else Tier.COMMUNITY


async def read_storage(connection: Connection) -> Storage | None:
    """How telemetry is kept; None where it is not there yet. Raises Outage."""
    with mapped():
        row = await connection.fetchrow(SELECT_STORAGE)
    if row is None or row[0] is None:
        return None
    hypertable, version, license_name, available = row
    return Storage(tier=tier_of(hypertable=hypertable, license_name=license_name), version=version, available=available)
