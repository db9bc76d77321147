"""Fleet commands: noted at once, made and ended lot by lot.

A lot is one transaction: the commands of the next devices in the order of their ids, and how far that is. So each
device gets one, whenever who makes them dies; and the id of a command is made of its fleet's and its device's, so that
there could not be a second one.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from pulse.adapters.postgres.command_rows import COLUMNS, Moved, command_of, write_moved
from pulse.adapters.postgres.outbox import put_into_outbox
from pulse.adapters.postgres.pool import Pool, transaction
from pulse.domain.command import Event, State, Word, downward, made_id, moved
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.fleet import Filter, Fleet, Lot, NewFleet, Stage

if TYPE_CHECKING:
    import asyncpg

    from pulse.adapters.postgres.pool import Connection

LOT_MAX = 1000
"""Devices that are looked at, and commands that are ended, in one transaction."""

FLEET = """
    tenant_id, fleet_id, name, payload, filter, stage, created_ms, expires_ms, timeout_ms, created_by, devices,
    coalesce((
        SELECT json_object_agg(state, count) FROM (
            SELECT state, count(*) AS count FROM commands
            WHERE (tenant_id, fleet_id) = (fleet_commands.tenant_id, fleet_commands.fleet_id) GROUP BY state
        ) AS counted
    ), '{}') AS counts
"""
INSERT = """
    INSERT INTO fleet_commands (tenant_id, fleet_id, name, payload, filter, created_ms, expires_ms, timeout_ms,
                                created_by, idempotency_key)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT DO NOTHING RETURNING fleet_id
"""
SELECT_FLEET = f"SELECT {FLEET} FROM fleet_commands WHERE (tenant_id, fleet_id) = ($1, $2)"  # noqa: S608
SELECT_BY_KEY = f"SELECT {FLEET} FROM fleet_commands WHERE (tenant_id, idempotency_key) = ($1, $2)"  # noqa: S608
SELECT_PAGE = f"""
    SELECT {FLEET} FROM fleet_commands
    WHERE tenant_id = $1 AND ($2::bigint IS NULL OR (created_ms, fleet_id) < ($2, $3::text))
    ORDER BY created_ms DESC, fleet_id DESC LIMIT $4
"""  # noqa: S608 - a constant
# Those of which something is open, or may be yet; a fleet command has one command a device, so that this bounds both.
COUNT_OPEN = """
    SELECT count(*) FROM (
        SELECT FROM fleet_commands AS fleet
        WHERE tenant_id = $1 AND (stage IN ('expanding', 'cancelling') OR EXISTS (
            SELECT FROM commands
            WHERE (tenant_id, fleet_id) = (fleet.tenant_id, fleet.fleet_id)
                AND state IN ('queued', 'sent', 'acknowledged')
        ))
        ORDER BY created_ms DESC, fleet_id DESC LIMIT $2
    ) AS open
"""
SELECT_MISSING = """
    SELECT wanted FROM unnest($2::text[]) AS wanted
    WHERE NOT EXISTS (SELECT FROM devices WHERE (tenant_id, device_id) = ($1, wanted)) LIMIT 1
"""
CANCEL = """
    UPDATE fleet_commands SET stage = 'cancelling', cancelled_by = $3
    WHERE (tenant_id, fleet_id) = ($1, $2) AND stage IN ('expanding', 'expanded')
"""
LOCK_NEXT = """
    SELECT tenant_id, fleet_id, name, payload, filter, stage, last_device, created_ms, expires_ms, timeout_ms,
           created_by, cancelled_by
    FROM fleet_commands WHERE stage IN ('expanding', 'cancelling')
    ORDER BY turn_ms LIMIT 1 FOR UPDATE SKIP LOCKED
"""
# Of so many devices, those that the filter holds for: a lot takes the same time, however few of them these are.
SELECT_DEVICES = """
    SELECT device_id,
           ($3 OR ((device_id = ANY($4::text[]) OR $4::text[] = '{}') AND starts_with(device_id, $5)
                   AND attributes @> $6::jsonb)) AS wanted
    FROM devices
    WHERE tenant_id = $1 AND device_id > $2 AND ($4::text[] = '{}' OR device_id = ANY($4::text[]))
    ORDER BY device_id LIMIT $7
"""
INSERT_COMMANDS = f"""
    INSERT INTO commands (tenant_id, command_id, device_id, name, payload, created_ms, expires_ms, timeout_ms, due_ms,
                          said_ms, says, created_by, fleet_id)
    SELECT $1, command_id, device_id, $4, $5, $6, $7::bigint, $8, $7, $9, 1, $10, $11
    FROM unnest($2::text[], $3::text[]) AS made (command_id, device_id)
    RETURNING {COLUMNS}
"""  # noqa: S608 - a constant
INSERT_MOVES = """
    INSERT INTO command_moves (tenant_id, command_id, state, at_ms, who)
    SELECT $1, command_id, 'queued', $3, $4 FROM unnest($2::text[]) AS command_id
"""
ADVANCE = """
    UPDATE fleet_commands SET last_device = $3, devices = devices + $4, stage = $5, turn_ms = $6
    WHERE (tenant_id, fleet_id) = ($1, $2)
"""
LOCK_OPEN = f"""
    SELECT {COLUMNS} FROM commands
    WHERE (tenant_id, fleet_id) = ($1, $2) AND state IN ('queued', 'sent', 'acknowledged')
    ORDER BY tenant_id, command_id LIMIT $3 FOR UPDATE
"""  # noqa: S608 - a constant
ADVANCE_CANCEL = "UPDATE fleet_commands SET stage = $3, turn_ms = $4 WHERE (tenant_id, fleet_id) = ($1, $2)"

_filters = msgspec.json.Decoder(Filter)
_counts = msgspec.json.Decoder(dict[State, int])


class FleetLots:
    """Makes the commands of fleets, and ends those of cancelled ones; satisfies `services.fleets.Store`."""

    def __init__(self, pool: Pool, *, lot_max: int = LOT_MAX, probe: Callable[[str], None] = lambda _: None) -> None:
        self._pool = pool
        self._lot_max = lot_max
        self._probe = probe

    async def advance(self, at_ms: int) -> Lot | None:
        """Make, or end, the next lot of the fleet that had its turn longest ago; None where nothing is left to others.

        Raises Outage.
        """
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow(LOCK_NEXT)
            if row is None:
                return None
            if row["stage"] == Stage.EXPANDING:
                lot = Lot(await self._expand(connection, row, at_ms), 0)
            else:
                lot = Lot(0, await self._cancel(connection, row, at_ms))
            self._probe("fleets.before_commit")
        return lot

    async def _expand(self, connection: Connection, fleet: asyncpg.Record, at_ms: int) -> int:
        looked_at = await self._devices(connection, fleet)
        device_ids = [device_id for device_id, wanted in looked_at if wanted]
        tenant_id, fleet_id = fleet["tenant_id"], fleet["fleet_id"]
        if device_ids:
            ids = [_command_id(fleet, device_id) for device_id in device_ids]
            rows = await connection.fetch(
                INSERT_COMMANDS,
                tenant_id,
                ids,
                device_ids,
                fleet["name"],
                fleet["payload"],
                fleet["created_ms"],
                fleet["expires_ms"],
                fleet["timeout_ms"],
                at_ms,
                fleet["created_by"],
                fleet_id,
            )
            await connection.execute(INSERT_MOVES, tenant_id, ids, at_ms, fleet["created_by"])
            if at_ms < fleet["expires_ms"]:
                await put_into_outbox(connection, [downward(command_of(row)) for row in rows])
        stage = Stage.EXPANDED if len(looked_at) < self._lot_max else Stage.EXPANDING
        last = looked_at[-1][0] if looked_at else fleet["last_device"]
        await connection.execute(ADVANCE, tenant_id, fleet_id, last, len(device_ids), stage.value, at_ms)
        return len(device_ids)

    async def _devices(self, connection: Connection, fleet: asyncpg.Record) -> Sequence[tuple[str, bool]]:
        """The next devices, and whether the filter holds for each."""
        wanted = _filters.decode(fleet["filter"])
        rows = await connection.fetch(
            SELECT_DEVICES,
            fleet["tenant_id"],
            fleet["last_device"],
            wanted.all,
            list(wanted.devices),
            wanted.prefix,
            msgspec.json.encode(wanted.attributes).decode(),
            self._lot_max,
        )
        return [(row["device_id"], row["wanted"]) for row in rows]

    async def _cancel(self, connection: Connection, fleet: asyncpg.Record, at_ms: int) -> int:
        key = fleet["tenant_id"], fleet["fleet_id"]
        word = Word(Event.CANCEL, at_ms, fleet["cancelled_by"])
        steps = []
        for command in map(command_of, await connection.fetch(LOCK_OPEN, *key, self._lot_max)):
            cancelled = moved(command, word)
            assert cancelled is not None, "an open command can be cancelled"
            steps.append(Moved(command, cancelled, [(cancelled.state, word)]))
        await write_moved(connection, steps, at_ms=at_ms)
        stage = Stage.CANCELLED if len(steps) < self._lot_max else Stage.CANCELLING
        await connection.execute(ADVANCE_CANCEL, *key, stage.value, at_ms)
        return len(steps)


class MadeBefore(Exception):
    """The same request has made this; whoever repeats it changes nothing, and no change is recorded."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet


async def create(connection: Connection, new: NewFleet, *, who: str, at_ms: int, open_max: int) -> Fleet:
    """See CommandStore; raises MadeBefore."""
    await _leave_if_made_before(connection, new)
    count = await connection.fetchval(COUNT_OPEN, new.tenant_id, open_max)
    if count >= open_max:
        raise LimitExceeded(
            Reason.CONFLICT,
            f"tenant {new.tenant_id!r} has {count} open fleet commands",
            limit="command_open_max",
            value=open_max,
        )
    missing = await connection.fetchval(SELECT_MISSING, new.tenant_id, list(new.filter.devices))
    if missing is not None:
        message = f"tenant {new.tenant_id!r} has no device {missing!r}"
        raise Refusal(Reason.NOT_FOUND, message, field="filter.devices")
    fleet_id = await connection.fetchval(
        INSERT,
        new.tenant_id,
        made_id(at_ms, secrets.token_bytes(10)),
        new.name,
        new.payload.decode(),
        msgspec.json.encode(new.filter).decode(),
        at_ms,
        at_ms + new.ttl_ms,
        new.timeout_ms,
        who,
        new.idempotency_key,
    )
    if fleet_id is None:
        await _leave_if_made_before(connection, new)
        raise AssertionError("only its key can be in the way")
    return await read(connection, new.tenant_id, fleet_id)


async def read(connection: Connection, tenant_id: str, fleet_id: str) -> Fleet:
    """See CommandStore."""
    row = await connection.fetchrow(SELECT_FLEET, tenant_id, fleet_id)
    if row is None:
        raise Refusal(Reason.NOT_FOUND, f"tenant {tenant_id!r} has no fleet command {fleet_id!r}", field="fleet_id")
    return _fleet(row)


async def page(connection: Connection, tenant_id: str, *, before: tuple[int, str] | None, limit: int) -> list[Fleet]:
    """See CommandStore."""
    created_ms, fleet_id = before or (None, None)
    return list(map(_fleet, await connection.fetch(SELECT_PAGE, tenant_id, created_ms, fleet_id, limit)))


async def cancel(connection: Connection, tenant_id: str, fleet_id: str, *, who: str) -> Fleet:
    """See CommandStore."""
    changed = await connection.execute(CANCEL, tenant_id, fleet_id, who)
    fleet = await read(connection, tenant_id, fleet_id)
    if changed == "UPDATE 0":
        raise Refusal(Reason.CONFLICT, f"fleet command {fleet_id!r} is {fleet.stage}", field="stage")
    return fleet


async def _leave_if_made_before(connection: Connection, new: NewFleet) -> None:
    """Raise MadeBefore where the same request has made a fleet command; Refusal CONFLICT where it was another one."""
    row = new.idempotency_key and await connection.fetchrow(SELECT_BY_KEY, new.tenant_id, new.idempotency_key)
    if not row:
        return
    made = _fleet(row)
    asked = (made.name, _value(made.payload), made.filter, made.expires_ms - made.created_ms, made.timeout_ms)
    if asked != (new.name, _value(new.payload), new.filter, new.ttl_ms, new.timeout_ms):
        raise Refusal(Reason.CONFLICT, "this key has made another fleet command", field="idempotency_key")
    raise MadeBefore(made)


def _value(payload: bytes) -> object:
    return msgspec.json.decode(payload)


def _command_id(fleet: asyncpg.Record, device_id: str) -> str:
    """The same whenever it is asked for; 80 bits tell it from those of the tenant that were made in the same ms."""
    made_of = f"{fleet['fleet_id']}/{device_id}".encode()
    return made_id(fleet["created_ms"], hashlib.sha256(made_of).digest()[:10])


def _fleet(row: asyncpg.Record) -> Fleet:
    values = dict(row)
    values["payload"] = values["payload"].encode()
    values["filter"] = _filters.decode(values["filter"])
    values["stage"] = Stage(values["stage"])
    values["counts"] = _counts.decode(values["counts"])
    return Fleet(**values)
