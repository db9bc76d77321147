"""Commands: made, read, cancelled; whatever has to reach a device is in the outbox before it commits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from pulse.adapters.postgres import command_fleets
from pulse.adapters.postgres.command_rows import COLUMNS, Moved, command_of, lock_commands, write_moved
from pulse.adapters.postgres.outbox import put_into_outbox
from pulse.adapters.postgres.pool import Database, Pool, transaction
from pulse.domain.command import Command, Event, Move, NewCommand, State, Word, downward, made_id, moved
from pulse.domain.errors import LimitExceeded, Outage, Reason, Refusal
from pulse.domain.fleet import Fleet, NewFleet

if TYPE_CHECKING:
    from pulse.adapters.postgres.pool import Connection

OPEN_MAX = 1000
"""Commands of one device, and fleet commands of one tenant, that may be open."""
RACES_MAX = 20
"""How often another ordered command of the same device and name may come or end in between."""

# Nothing where there is no such device.
COUNT_OPEN = """
    SELECT (
        SELECT count(*) FROM (
            SELECT FROM commands WHERE (tenant_id, device_id) = ($1, $2) AND due_ms IS NOT NULL LIMIT $3
        ) AS open
    )
    FROM devices WHERE (tenant_id, device_id) = ($1, $2)
"""
# Who ends it has to wait for us, and then sees what we have made to wait for that end.
LOCK_FIRST = """
    SELECT FROM commands
    WHERE (tenant_id, device_id, name) = ($1, $2, $3) AND ordered AND NOT held AND due_ms IS NOT NULL FOR UPDATE
"""
INSERT = f"""
    WITH made AS (
        INSERT INTO commands (tenant_id, command_id, device_id, name, payload, ordered, held, created_ms, expires_ms,
                              timeout_ms, due_ms, said_ms, says, created_by, idempotency_key)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8::bigint, $9, $10, $9, CASE WHEN $7 THEN 0 ELSE $8 END,
                CASE WHEN $7 THEN 0 ELSE 1 END, $11, $12)
        ON CONFLICT DO NOTHING RETURNING {COLUMNS}
    ), noted AS (
        INSERT INTO command_moves (tenant_id, command_id, state, at_ms, who)
        SELECT tenant_id, command_id, state, created_ms, created_by FROM made
    )
    SELECT * FROM made
"""  # noqa: S608 - a constant
SELECT_BY_KEY = f"SELECT {COLUMNS} FROM commands WHERE (tenant_id, idempotency_key) = ($1, $2)"  # noqa: S608
SELECT_COMMAND = f"SELECT {COLUMNS} FROM commands WHERE (tenant_id, command_id) = ($1, $2)"  # noqa: S608
SELECT_MOVES = "SELECT state, at_ms, who FROM command_moves WHERE (tenant_id, command_id) = ($1, $2)"
# Planned with its arguments, as it is never prepared by name: each combination finds its own index.
SELECT_PAGE = f"""
    SELECT {COLUMNS} FROM commands
    WHERE tenant_id = $1 AND ($2::text IS NULL OR device_id = $2) AND ($3::text IS NULL OR state = $3)
        AND ($4::text IS NULL OR fleet_id = $4) AND ($5::bigint IS NULL OR (created_ms, command_id) < ($5, $6::text))
    ORDER BY created_ms DESC, command_id DESC LIMIT $7
"""  # noqa: S608 - a constant

SELECT_OPEN = f"""
    SELECT {COLUMNS} FROM commands
    WHERE (tenant_id, device_id) = ($1, $2) AND due_ms IS NOT NULL AND state <> 'acknowledged' AND NOT held
        AND expires_ms > $3
    ORDER BY number LIMIT $4
"""  # noqa: S608 - a constant

ORDER_OF_STATES = tuple(State)


class CommandStore:
    """Makes and reads commands; satisfies `services.control.Commands`. Every call raises Outage.

    Refusal NOT_FOUND for what is not there.
    """

    def __init__(self, database: Database, *, open_max: int = OPEN_MAX) -> None:
        self._database = database
        self._open_max = open_max

    async def create(self, new: NewCommand, *, who: str, at_ms: int) -> tuple[Command, bool]:
        """Make a command, and whether this made it: False where its idempotency key had made it before.

        Raises Refusal NOT_FOUND for a device that is not registered, CONFLICT for another request under the same key,
        LimitExceeded where its device has `open_max` open ones.
        """
        try:
            async with transaction(self._database) as connection:
                await _leave_if_made_before(connection, new)
                await self._check_device(connection, new)
                for _ in range(RACES_MAX):
                    command = await _insert(connection, new, who=who, at_ms=at_ms)
                    if command is not None:
                        break
                    await _leave_if_made_before(connection, new)
                else:
                    raise Outage("postgresql", f"{RACES_MAX} other {new.name!r} for {new.device_id!r} were quicker")
                if not command.held:
                    await put_into_outbox(connection, [downward(command)])
        except _MadeBefore as before:
            return before.command, False
        return command, True

    async def command(self, tenant_id: str, command_id: str) -> Command:
        """The command of that id."""
        async with transaction(self._database) as connection:
            row = await connection.fetchrow(SELECT_COMMAND, tenant_id, command_id)
        if row is None:
            raise _no_command(tenant_id, command_id)
        return command_of(row)

    async def moves(self, tenant_id: str, command_id: str) -> list[Move]:
        """Which states it came into, the first one first; none where there is no such command."""
        async with transaction(self._database) as connection:
            rows = await connection.fetch(SELECT_MOVES, tenant_id, command_id)
        moves = [Move(State(row["state"]), row["at_ms"], row["who"]) for row in rows]
        return sorted(moves, key=lambda move: ORDER_OF_STATES.index(move.state))

    async def commands(
        self,
        tenant_id: str,
        *,
        device_id: str | None = None,
        state: State | None = None,
        fleet_id: str | None = None,
        before: tuple[int, str] | None = None,
        limit: int = 100,
    ) -> list[Command]:
        """A page, the newest first, of those before (created_ms, command_id)."""
        created_ms, command_id = before or (None, None)
        async with transaction(self._database) as connection:
            rows = await connection.fetch(
                SELECT_PAGE, tenant_id, device_id, state and state.value, fleet_id, created_ms, command_id, limit
            )
        return list(map(command_of, rows))

    async def cancel(self, tenant_id: str, command_id: str, *, who: str, at_ms: int) -> Command:
        """End a command. Raises Refusal CONFLICT where it has ended."""
        async with transaction(self._database) as connection:
            command = (await lock_commands(connection, [(tenant_id, command_id)])).get((tenant_id, command_id))
            if command is None:
                raise _no_command(tenant_id, command_id)
            word = Word(Event.CANCEL, at_ms, who)
            cancelled = moved(command, word)
            if cancelled is None:
                raise Refusal(Reason.CONFLICT, f"command {command_id!r} has ended: {command.state}", field="state")
            step = Moved(command, cancelled, [(cancelled.state, word)])
            await write_moved(connection, [step], at_ms=at_ms)
        return cancelled

    async def create_fleet(self, new: NewFleet, *, who: str, at_ms: int) -> tuple[Fleet, bool]:
        """Note that many are to be made, and whether this noted it; as `create`.

        Raises Refusal NOT_FOUND where the filter names a device that is not registered, LimitExceeded where the tenant
        has `open_max` open ones.
        """
        try:
            async with transaction(self._database) as connection:
                fleet = await command_fleets.create(connection, new, who=who, at_ms=at_ms, open_max=self._open_max)
                return fleet, True
        except command_fleets.MadeBefore as before:
            return before.fleet, False

    async def fleet(self, tenant_id: str, fleet_id: str) -> Fleet:
        """The fleet command of that id."""
        async with transaction(self._database) as connection:
            return await command_fleets.read(connection, tenant_id, fleet_id)

    async def fleets(self, tenant_id: str, *, before: tuple[int, str] | None = None, limit: int = 100) -> list[Fleet]:
        """A page, the newest first, of those before (created_ms, fleet_id)."""
        async with transaction(self._database) as connection:
            return await command_fleets.page(connection, tenant_id, before=before, limit=limit)

    async def cancel_fleet(self, tenant_id: str, fleet_id: str, *, who: str, at_ms: int) -> Fleet:
        """Make no more of its commands, and have those that are open ended, which goes on for a while.

        Raises Refusal CONFLICT where it is cancelled.
        """
        async with transaction(self._database) as connection:
            return await command_fleets.cancel(connection, tenant_id, fleet_id, who=who)

    async def _check_device(self, connection: Connection, new: NewCommand) -> None:
        count = await connection.fetchval(COUNT_OPEN, new.tenant_id, new.device_id, self._open_max)
        if count is None:
            message = f"tenant {new.tenant_id!r} has no device {new.device_id!r}"
            raise Refusal(Reason.NOT_FOUND, message, field="device_id")
        if count >= self._open_max:
            raise LimitExceeded(
                Reason.CONFLICT,
                f"device {new.device_id!r} has {count} open commands",
                limit="command_open_max",
                value=self._open_max,
            )


async def open_commands(pool: Pool, tenant_id: str, device_id: str, *, at_ms: int, limit: int) -> list[Command]:
    """What the device has yet to answer for, the oldest first. Raises Outage."""
    async with transaction(pool) as connection:
        return list(map(command_of, await connection.fetch(SELECT_OPEN, tenant_id, device_id, at_ms, limit)))


async def _insert(connection: Connection, new: NewCommand, *, who: str, at_ms: int) -> Command | None:
    """The command, made; None where something is in the way: its key, or another ordered one."""
    held = False
    if new.ordered:
        held = await connection.fetchrow(LOCK_FIRST, new.tenant_id, new.device_id, new.name) is not None
    row = await connection.fetchrow(
        INSERT,
        new.tenant_id,
        made_id(at_ms, secrets.token_bytes(10)),
        new.device_id,
        new.name,
        new.payload.decode(),
        new.ordered,
        held,
        at_ms,
        at_ms + new.ttl_ms,
        new.timeout_ms,
        who,
        new.idempotency_key,
    )
    return command_of(row) if row else None


class _MadeBefore(Exception):
    """The same request has made this; whoever repeats it changes nothing, and no change is recorded."""

    def __init__(self, command: Command) -> None:
        self.command = command


async def _leave_if_made_before(connection: Connection, new: NewCommand) -> None:
    """Raise _MadeBefore where the same request has made a command; Refusal CONFLICT where it was another one."""
    if new.idempotency_key is None:
        return
    row = await connection.fetchrow(SELECT_BY_KEY, new.tenant_id, new.idempotency_key)
    if row is None:
        return
    made = command_of(row)
    if _asked(made) != (new.device_id, new.name, _value(new.payload), new.ttl_ms, new.timeout_ms, new.ordered):
        raise Refusal(Reason.CONFLICT, "this key has made another command", field="idempotency_key")
    raise _MadeBefore(made)


def _asked(command: Command) -> Sequence[object]:
    ttl_ms = command.expires_ms - command.created_ms
    value = _value(command.payload)
    return (command.device_id, command.name, value, ttl_ms, command.timeout_ms, command.ordered)


def _value(payload: bytes) -> object:
    return msgspec.json.decode(payload)


def _no_command(tenant_id: str, command_id: str) -> Refusal:
    return Refusal(Reason.NOT_FOUND, f"tenant {tenant_id!r} has no command {command_id!r}", field="command_id")
