"""What time does to commands: it ends them, has them sent again, and drops those that ended long ago.

Each call is one transaction of a bounded length that passes by what others have locked, so that any number may sweep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING

from pulse.adapters.postgres.command_rows import COLUMNS, Moved, command_of, write_moved
from pulse.adapters.postgres.outbox import put_into_outbox
from pulse.adapters.postgres.pool import Pool, transaction
from pulse.domain.command import PULSE, Command, State, Word, downward, ended_by_time, moved
from pulse.domain.retention import Dropped

if TYPE_CHECKING:
    import asyncpg

LOT = 1000
"""Commands that are ended or dropped in one transaction."""
WINDOW = 5000
"""Open commands that are looked at in one transaction, to be sent again."""
PAUSE_MS_MAX = 3_600_000

LOCK_DUE = f"""
    SELECT {COLUMNS} FROM commands WHERE due_ms <= $1 ORDER BY due_ms LIMIT $2 FOR UPDATE SKIP LOCKED
"""  # noqa: S608 - a constant
# The pause is from when it was last said or sent. It doubles with each time that it was said, up to PAUSE_MS_MAX: who
# hears and never answers is not told for ever.
SELECT_WINDOW = """
    WITH looked_at AS (
        SELECT tenant_id, device_id, number, command_id, expires_ms,
               greatest(said_ms, sent_ms) + least($5::bigint << least(greatest(says - 1, 0), 20), $6) AS again_ms,
               state <> 'acknowledged' AND NOT held AS is_said
        FROM commands WHERE due_ms IS NOT NULL AND (tenant_id, device_id, number) > ($1, $2, $3)
        ORDER BY tenant_id, device_id, number LIMIT $4
    )
    SELECT looked_at.tenant_id, looked_at.device_id, number, command_id,
           is_said AND expires_ms > $7 AND again_ms <= $7
               AND coalesce(extract(epoch FROM last_seen) * 1000 > again_ms, false) AS is_due
    FROM looked_at LEFT JOIN device_state USING (tenant_id, device_id)
    ORDER BY looked_at.tenant_id, looked_at.device_id, number
"""
# What another sweep has said again in between, or a device has answered, is not said.
SAY_AGAIN = f"""
    UPDATE commands SET said_ms = $3, says = says + 1
    WHERE (tenant_id, command_id) IN (
        SELECT tenant_id, command_id FROM commands
        WHERE (tenant_id, command_id) IN (SELECT * FROM unnest($1::text[], $2::text[]))
            AND state IN ('queued', 'sent') AND said_ms <= $3::bigint - $4
        ORDER BY tenant_id, command_id FOR UPDATE SKIP LOCKED
    )
    RETURNING number, {COLUMNS}
"""  # noqa: S608 - a constant
DELETE_ENDED = """
    WITH ended AS (
        SELECT tenant_id, command_id FROM commands WHERE ended_ms < $1
        ORDER BY ended_ms LIMIT $2 FOR UPDATE SKIP LOCKED
    ), its_moves AS (
        DELETE FROM command_moves USING ended
        WHERE (command_moves.tenant_id, command_moves.command_id) = (ended.tenant_id, ended.command_id)
    ), gone AS (
        DELETE FROM commands USING ended
        WHERE (commands.tenant_id, commands.command_id) = (ended.tenant_id, ended.command_id)
        RETURNING octet_length(payload::text) + coalesce(octet_length(result::text), 0) AS bytes
    )
    SELECT count(*), coalesce(sum(bytes), 0)::bigint FROM gone
"""
DELETE_FLEETS = """
    DELETE FROM fleet_commands WHERE (tenant_id, fleet_id) IN (
        SELECT tenant_id, fleet_id FROM fleet_commands AS fleet
        WHERE stage IN ('expanded', 'cancelled') AND created_ms < $1 AND NOT EXISTS (
            SELECT FROM commands WHERE (tenant_id, fleet_id) = (fleet.tenant_id, fleet.fleet_id)
        )
        LIMIT $2 FOR UPDATE SKIP LOCKED
    )
"""

START = ("", "", 0)


class CommandSweep:
    """What is due now; satisfies `services.command_sweep.Store`. Every call raises Outage."""

    def __init__(self, pool: Pool, *, lot: int = LOT, window: int = WINDOW) -> None:
        self._pool = pool
        self._lot = lot
        self._window = window
        self._behind: tuple[str, str, int] = START

    async def end(self, *, due_ms: int, at_ms: int) -> Mapping[State, int]:
        """End a lot of what was due at `due_ms`; returns how many came into each state."""
        async with transaction(self._pool) as connection:
            steps = [_ended(command_of(row), at_ms) for row in await connection.fetch(LOCK_DUE, due_ms, self._lot)]
            await write_moved(connection, steps, at_ms=at_ms)
        return Counter(step.command.state for step in steps)

    async def say_again(self, *, pause_ms: int, at_ms: int) -> tuple[int, bool]:
        """Look at the next window of open commands, and have sent again what its device has not answered.

        That is what was sent `pause_ms` (doubled with each time) before its device was last heard of. Returns how many
        these are, and whether the window was the last one: the next is then the first again.
        """
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(SELECT_WINDOW, *self._behind, self._window, pause_ms, PAUSE_MS_MAX, at_ms)
            due = [row for row in rows if row["is_due"]]
            said = await connection.fetch(SAY_AGAIN, *_keys(due), at_ms, pause_ms) if due else []
            ordered = sorted(said, key=lambda row: row["number"])
            await put_into_outbox(connection, [downward(command_of(row)) for row in ordered])
        is_last = len(rows) < self._window
        last = rows[-1] if rows else None
        self._behind = START if is_last or last is None else (last["tenant_id"], last["device_id"], last["number"])
        return len(said), is_last


async def drop_commands(pool: Pool, before: date, *, lot: int = LOT) -> Dropped | None:
    """Delete a lot of the commands that ended before that day, and then fleets that have none left; None where none."""
    before_ms = int(datetime.combine(before, datetime.min.time(), UTC).timestamp()) * 1000
    async with transaction(pool) as connection:
        rows, size = await connection.fetchrow(DELETE_ENDED, before_ms, lot) or (0, 0)
        if not rows:
            await connection.execute(DELETE_FLEETS, before_ms, lot)
    return Dropped(series="commands", relation="commands", rows=rows, bytes=size) if rows else None


def _ended(command: Command, at_ms: int) -> Moved:
    word = Word(ended_by_time(command), at_ms, PULSE)
    ended = moved(command, word)
    assert ended is not None, "time ends whatever is open"
    return Moved(command, ended, [(ended.state, word)])


def _keys(rows: Sequence[asyncpg.Record]) -> tuple[list[str], list[str]]:
    return [row["tenant_id"] for row in rows], [row["command_id"] for row in rows]
