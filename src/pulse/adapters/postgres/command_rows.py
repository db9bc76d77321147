"""Rows of `commands`: read, locked, and written as domain/command.py has moved them.

What is moved is locked first. Of the ordered ones of a device and name only one is open and not held: the transaction
that ends it tells the device of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from pulse.adapters.postgres.outbox import put_into_outbox
from pulse.domain.command import Command, State, Word, downward

if TYPE_CHECKING:
    import asyncpg

    from pulse.adapters.postgres.pool import Connection

CommandKey = tuple[str, str]
"""Tenant and id of a command."""

COLUMNS = ", ".join(Command.__struct_fields__)
LOCK = f"""
    SELECT {COLUMNS} FROM commands
    WHERE (tenant_id, command_id) IN (SELECT * FROM unnest($1::text[], $2::text[]))
    ORDER BY tenant_id, command_id FOR UPDATE
"""  # noqa: S608 - a constant
WRITE = """
    UPDATE commands SET state = new.state, due_ms = new.due_ms, sent_ms = new.sent_ms, sends = new.sends,
        result = new.result, error = new.error, ended_ms = new.ended_ms
    FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::int[], $7::json[], $8::text[],
                $9::bigint[])
        AS new (tenant_id, command_id, state, due_ms, sent_ms, sends, result, error, ended_ms)
    WHERE (commands.tenant_id, commands.command_id) = (new.tenant_id, new.command_id)
"""
WRITE_MOVES = """
    INSERT INTO command_moves (tenant_id, command_id, state, at_ms, who)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[])
"""
HELD = """
    SELECT DISTINCT ON (tenant_id, device_id, name) tenant_id, command_id
    FROM commands
    WHERE held AND due_ms IS NOT NULL
        AND (tenant_id, device_id, name) IN (SELECT * FROM unnest($1::text[], $2::text[], $3::text[]))
    ORDER BY tenant_id, device_id, name, number
"""
RELEASE = f"""
    UPDATE commands SET held = false, said_ms = $3, says = 1
    WHERE held AND due_ms IS NOT NULL AND (tenant_id, command_id) IN (SELECT * FROM unnest($1::text[], $2::text[]))
    RETURNING {COLUMNS}
"""  # noqa: S608 - a constant


class Moved(msgspec.Struct, frozen=True):
    """A command as it was and as it is now, and the words that moved it, each with the state that it led to."""

    before: Command
    command: Command
    steps: Sequence[tuple[State, Word]]


def command_of(row: asyncpg.Record) -> Command:
    """The command that a row of COLUMNS, and perhaps more, is."""
    values = {name: row[name] for name in Command.__struct_fields__}
    values["payload"] = values["payload"].encode()
    values["result"] = values["result"] and values["result"].encode()
    values["state"] = State(values["state"])
    return Command(**values)


async def lock_commands(connection: Connection, keys: Iterable[CommandKey]) -> dict[CommandKey, Command]:
    """Those of these commands that there are, which nobody else moves until the transaction ends."""
    wanted = sorted(set(keys))
    rows = await connection.fetch(LOCK, *_columns(wanted, 2))
    return {(row["tenant_id"], row["command_id"]): command_of(row) for row in rows}


async def write_moved(connection: Connection, moved: Sequence[Moved], *, at_ms: int) -> int:
    """Write what was locked and is moved, and say what has its turn now; returns how many commands those are."""
    if not moved:
        return 0
    await connection.execute(WRITE, *_columns([_written(each) for each in moved], 9))
    steps = [
        (each.command.tenant_id, each.command.command_id, state, word.at_ms, word.who)
        for each in moved
        for state, word in each.steps
    ]
    await connection.execute(WRITE_MOVES, *_columns(steps, 5))
    ended = [
        (each.command.tenant_id, each.command.device_id, each.command.name)
        for each in moved
        if each.command.ordered and not each.command.held and each.command.state.final
    ]
    released = await _release(connection, ended, at_ms=at_ms)
    await put_into_outbox(connection, [downward(command) for command in released])
    return len(released)


async def _release(connection: Connection, ended: Sequence[tuple[str, str, str]], *, at_ms: int) -> list[Command]:
    """Give each of these devices and names the next that is held.

    Somebody may end that one at this moment: then our update passes it by, and the one behind it has its turn.
    """
    released: list[Command] = []
    while ended:
        held = await connection.fetch(HELD, *_columns(ended, 3))
        if not held:
            break
        rows = await connection.fetch(RELEASE, *_columns([tuple(row) for row in held], 2), at_ms)
        released += map(command_of, rows)
        done = {(row["tenant_id"], row["device_id"], row["name"]) for row in rows}
        ended = [each for each in ended if each not in done] if len(rows) < len(held) else []
    return released


def _written(moved: Moved) -> tuple[object, ...]:
    command = moved.command
    return (
        command.tenant_id,
        command.command_id,
        command.state.value,
        command.due_ms,
        command.sent_ms,
        command.sends,
        command.result and command.result.decode(),
        command.error,
        moved.steps[-1][1].at_ms if command.state.final else None,
    )


def _columns(rows: Sequence[tuple[object, ...]], width: int) -> list[list[object]]:
    """`rows` as an array for each column, also where there are none."""
    return [[row[column] for row in rows] for column in range(width)]
