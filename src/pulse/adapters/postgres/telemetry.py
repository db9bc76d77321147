"""Settling telemetry: ledger, rows and dead letters in one transaction; device states apart, whenever they are due."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import date, timedelta
from operator import attrgetter
from typing import TYPE_CHECKING

import asyncpg

from pulse.adapters.postgres.binary_copy import HEADER, TELEMETRY_COLUMNS, TRAILER, telemetry_rows
from pulse.adapters.postgres.device_state import write_states
from pulse.adapters.postgres.ledger import record_epoch
from pulse.adapters.postgres.pool import transaction
from pulse.adapters.postgres.settling import Entry, claim, refused, write_dead_letters
from pulse.domain.device_state import Device, DeviceState
from pulse.domain.ledger import PositionSet
from pulse.domain.rollup import HOUR_US
from pulse.domain.settlement import Row, Settlement
from pulse.domain.telemetry import EPOCH

if TYPE_CHECKING:
    from pulse.adapters.postgres.pool import Connection, Pool

DAY_US = 24 * HOUR_US
SELECT_DEAD = """
    SELECT coalesce(range_agg(settled.dead * asked.positions), '{}')::text
    FROM (SELECT $1::text::int8multirange AS positions) AS asked
    JOIN ledger AS settled ON settled.positions && asked.positions
"""
CHECK_TABLES = "SELECT FROM ledger, telemetry, dead_letters, device_state, stream_epochs LIMIT 0"
ROWS_AT_ONCE = 500
_device_id = attrgetter("device_id")


class TelemetryStore:
    """Writes settlements of one stream; satisfies `services.ingest.Store`."""

    def __init__(self, pool: Pool, *, stream: str, probe: Callable[[str], None] = lambda _: None) -> None:
        self._pool = pool
        self._stream = stream
        self._probe = probe
        self._days: set[date] = set()

    async def epoch(self, created_ns: int) -> int:
        """The number of the making of the stream at `created_ns`, recorded where it is new. Raises Outage."""
        return await record_epoch(self._pool, self._stream, created_ns)

    async def check(self) -> None:
        """Returns where the tables can be reached. Raises Outage, and asyncpg's own error where they are not there."""
        async with transaction(self._pool) as connection:
            await connection.execute(CHECK_TABLES)

    async def settle(self, settlement: Settlement) -> PositionSet:
        """Write `settlement`, all or nothing; returns the positions that others had settled, which are left out.

        Raises Outage where PostgreSQL is away, Refusal REFUSED_BY_DATABASE where it can never take these rows.
        """
        with refused():
            try:
                return await self._settle(settlement)
            except asyncpg.CheckViolationError:
                # A row found no partition: somebody has dropped that of a day that we believe to be there.
                self._days.clear()
                return await self._settle(settlement)

    async def dead_among(self, settled: PositionSet) -> PositionSet:
        """Those of these settled positions that are dead letters. Raises Outage."""
        async with transaction(self._pool) as connection:
            return PositionSet.parse(await connection.fetchval(SELECT_DEAD, str(settled)))

    async def write_states(self, states: Mapping[Device, DeviceState]) -> None:
        """Take these into account. Raises Outage; then some may be written."""
        await write_states(self._pool, states)

    async def _settle(self, settlement: Settlement) -> PositionSet:
        await self._ensure_days(settlement.rows)
        async with transaction(self._pool) as connection:
            already = await claim(connection, lambda settled: _entry(_left(settlement, settled)))
            left = _left(settlement, already)
            if len(left):
                self._probe("ingest.ledger_written")
                await self._write(connection, left)
                self._probe("ingest.before_commit")
        return already

    async def _write(self, connection: Connection, settlement: Settlement) -> None:
        if settlement.rows:
            # Rows of one device side by side find their place in the index near one another: 1 µs a row in PostgreSQL.
            rows = sorted(settlement.rows, key=_device_id)
            await connection.copy_to_table(
                "telemetry", source=_copied(rows), columns=TELEMETRY_COLUMNS, format="binary"
            )
            self._probe("ingest.rows_copied")
        await write_dead_letters(connection, self._stream, settlement.dead_letters)

    async def _ensure_days(self, rows: Iterable[Row]) -> None:
        """A partition for each day; in a transaction of its own, so that its lock is short."""
        days = {row.ts_us // DAY_US for row in rows}
        missing = {(EPOCH + timedelta(days=day)).date() for day in days} - self._days
        for day in sorted(missing):
            async with transaction(self._pool) as connection:
                await connection.execute("SELECT ensure_telemetry_day($1)", day)
            self._days.add(day)


def _left(settlement: Settlement, settled: PositionSet) -> Settlement:
    return settlement.without(settled) if settled else settlement


def _entry(settlement: Settlement) -> Entry:
    positions = settlement.positions
    assert len(positions) == len(settlement), "a settlement has two fates for one position"
    hours = PositionSet.of({row.ts_us // HOUR_US for row in settlement.rows})
    return Entry(positions, settlement.dead_positions, len(settlement.rows), hours)


async def _copied(rows: Sequence[Row]) -> AsyncIterator[bytes]:
    """`rows` for COPY, piece by piece: PostgreSQL works on one while the next is put together."""
    yield HEADER
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield telemetry_rows(rows[start : start + ROWS_AT_ONCE])
        await asyncio.sleep(0)
    yield TRAILER
