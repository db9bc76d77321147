"""Shadows and their last changes; whatever a change has to say to its device is in the outbox before it commits.

The row of a device's unnamed shadow is the lock of all its shadows: it is locked, in the order of devices, before any
of them is read. So of two that change one shadow the second sees what the first has made of it, and who counts the
names of a device counts all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from pulse.adapters.postgres.outbox import put_into_outbox
from pulse.adapters.postgres.pool import Database, transaction
from pulse.domain.device_state import Device
from pulse.domain.shadow import Change, Section, Shadow, ShadowKey, check_room
from pulse.domain.shadow_merge import Mark
from pulse.domain.shadow_requests import Changed, is_made

if TYPE_CHECKING:
    import asyncpg

    from pulse.adapters.postgres.pool import Connection

SLOTS = 20
"""How many changes are kept of each shadow."""

COLUMNS = """
    tenant_id, device_id, name, version, present, desired, desired_mark, reported, reported_mark, updated_ms, position,
    deleted, forgotten
"""
DEVICES = "SELECT * FROM unnest($1::text[], $2::text[])"
KEYS = "SELECT * FROM unnest($1::text[], $2::text[], $3::text[])"
SELECT_SHADOWS = f"SELECT {COLUMNS} FROM shadows WHERE (tenant_id, device_id, name) IN ({KEYS})"  # noqa: S608
SELECT_NAMES = "SELECT name FROM shadows WHERE (tenant_id, device_id) = ($1, $2) AND present ORDER BY name"
SELECT_CHANGES = """
    SELECT tenant_id, device_id, name, version, changed_ms, who, patch FROM shadow_changes
    WHERE (tenant_id, device_id, name) = ($1, $2, $3) ORDER BY version
"""
MAKE_LOCKS = f"INSERT INTO shadows (tenant_id, device_id) {DEVICES} ON CONFLICT DO NOTHING"
LOCK_DEVICES = f"""
    SELECT {COLUMNS} FROM shadows WHERE (tenant_id, device_id) IN ({DEVICES}) AND name = ''
    ORDER BY tenant_id, device_id FOR UPDATE
"""  # noqa: S608 - constants
COUNT_NAMES = f"""
    SELECT tenant_id, device_id, count(*) FROM shadows
    WHERE (tenant_id, device_id) IN ({DEVICES}) AND name <> '' AND present GROUP BY 1, 2
"""  # noqa: S608 - constants
# Of the shadows that were deleted, those go first that were deleted first: with the others no more than the bound stay.
FORGET_DELETED = f"""
    DELETE FROM shadows USING (
        SELECT tenant_id, device_id, name, row_number() OVER (
            PARTITION BY tenant_id, device_id ORDER BY present DESC, updated_ms DESC
        ) AS place
        FROM shadows WHERE (tenant_id, device_id) IN ({DEVICES}) AND name <> ''
    ) AS ranked
    WHERE (shadows.tenant_id, shadows.device_id, shadows.name) = (ranked.tenant_id, ranked.device_id, ranked.name)
        AND NOT shadows.present AND ranked.place > $3
"""  # noqa: S608 - constants
WRITE_SHADOWS = f"""
    INSERT INTO shadows ({COLUMNS})
    SELECT tenant_id, device_id, name, version, present, desired::json, desired_mark::json, reported::json,
           reported_mark::json, updated_ms, position, deleted, forgotten
    FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::boolean[], $6::text[], $7::text[], $8::text[],
                $9::text[], $10::bigint[], $11::bigint[], $12::bigint[], $13::bigint[]) AS new ({COLUMNS})
    ON CONFLICT (tenant_id, device_id, name)
    DO UPDATE SET version = excluded.version, present = excluded.present, desired = excluded.desired,
        desired_mark = excluded.desired_mark, reported = excluded.reported, reported_mark = excluded.reported_mark,
        updated_ms = excluded.updated_ms, position = excluded.position, deleted = excluded.deleted,
        forgotten = excluded.forgotten
"""  # noqa: S608 - constants
WRITE_CHANGES = """
    INSERT INTO shadow_changes (tenant_id, device_id, name, slot, version, changed_ms, who, patch)
    SELECT tenant_id, device_id, name, slot, version, changed_ms, who, patch::json
    FROM unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::bigint[], $6::bigint[], $7::text[], $8::text[])
        AS new (tenant_id, device_id, name, slot, version, changed_ms, who, patch)
    ON CONFLICT (tenant_id, device_id, name, slot)
    DO UPDATE SET version = excluded.version, changed_ms = excluded.changed_ms, who = excluded.who,
        patch = excluded.patch
"""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_decode_mark = msgspec.json.Decoder(Mark).decode


class ShadowStore:
    """Reads and changes shadows; satisfies `services.control_shadows.Shadows`. Every call raises Outage."""

    def __init__(self, database: Database, *, names_max: int) -> None:
        self._database = database
        self._names_max = names_max

    async def shadow(self, key: ShadowKey) -> Shadow:
        """The shadow as it is; one that never was has version 0."""
        async with transaction(self._database) as connection:
            return (await read_shadows(connection, [key]))[key]

    async def names(self, tenant_id: str, device_id: str) -> list[str]:
        """The names of the shadows that a device has; the unnamed one's is empty."""
        async with transaction(self._database) as connection:
            return [row["name"] for row in await connection.fetch(SELECT_NAMES, tenant_id, device_id)]

    async def changes(self, key: ShadowKey) -> list[Change]:
        """The last changes, oldest first."""
        async with transaction(self._database) as connection:
            return [_change(row) for row in await connection.fetch(SELECT_CHANGES, *_parts(key))]

    async def change(self, key: ShadowKey, decide: Callable[[Shadow], Changed]) -> Changed:
        """Make the shadow what `decide` makes of it, and enter what the device hears; what it raises undoes all.

        Raises LimitExceeded where the device would have more named shadows than it may.
        """
        async with transaction(self._database) as connection:
            shadow = (await lock_shadows(connection, [key]))[key]
            changed = decide(shadow)
            if is_made(key, shadow):
                check_room((await count_names(connection, [key.device]))[key.device], self._names_max)
            await write_shadows(connection, {key: changed.shadow}, [changed.change])
            await put_into_outbox(connection, changed.said)
            if is_made(key, shadow):
                await forget_deleted(connection, [key.device], self._names_max)
        return changed


async def lock_shadows(connection: Connection, keys: Iterable[ShadowKey]) -> dict[ShadowKey, Shadow]:
    """These shadows, which nobody else changes until the transaction ends."""
    keys = set(keys)
    devices = _columns(sorted({key.device for key in keys}))
    await connection.execute(MAKE_LOCKS, *devices)
    unnamed = _by_key(await connection.fetch(LOCK_DEVICES, *devices))
    named = {key for key in keys if key.name}
    shadows = unnamed | (await read_shadows(connection, named) if named else {})
    return {key: shadows[key] for key in keys}


async def read_shadows(connection: Connection, keys: Iterable[ShadowKey]) -> dict[ShadowKey, Shadow]:
    """These shadows; those that never were have version 0."""
    keys = list(keys)
    found = _by_key(await connection.fetch(SELECT_SHADOWS, *_columns(map(_parts, keys))))
    return dict.fromkeys(keys, Shadow()) | found


async def count_names(connection: Connection, devices: Iterable[Device]) -> dict[Device, int]:
    """How many named shadows each of these devices has."""
    devices = list(devices)
    rows = await connection.fetch(COUNT_NAMES, *_columns(devices))
    return dict.fromkeys(devices, 0) | {(tenant_id, device_id): count for tenant_id, device_id, count in rows}


async def forget_deleted(connection: Connection, devices: Iterable[Device], names_max: int) -> None:
    """Keep no more than `names_max` named shadows of each device, those that were deleted included."""
    await connection.execute(FORGET_DELETED, *_columns(devices), names_max)


async def write_shadows(connection: Connection, shadows: Mapping[ShadowKey, Shadow], changes: Sequence[Change]) -> None:
    """Write shadows that are locked, and the last of their `changes`, which come oldest first."""
    if not shadows:
        return
    await connection.execute(WRITE_SHADOWS, *_columns(map(_shadow_row, shadows.items())))
    last = {(change.key, change.version % SLOTS): change for change in changes}
    await connection.execute(WRITE_CHANGES, *_columns(map(_change_row, last.values())))


def _columns(rows: Iterable[Sequence[object]]) -> list[Sequence[object]]:
    """What unnest takes for `rows`, of which there is at least one."""
    return list(zip(*rows, strict=True))


def _parts(key: ShadowKey) -> tuple[str, str, str]:
    return key.tenant_id, key.device_id, key.name


def _shadow_row(item: tuple[ShadowKey, Shadow]) -> tuple[object, ...]:
    key, shadow = item
    return (
        *_parts(key),
        shadow.version,
        shadow.exists,
        _json(shadow.desired.state),
        _json(shadow.desired.mark),
        _json(shadow.reported.state),
        _json(shadow.reported.mark),
        shadow.updated_ms,
        shadow.position,
        shadow.deleted,
        shadow.forgotten,
    )


def _change_row(change: Change) -> tuple[object, ...]:
    patch = None if change.patch is None else _json(change.patch)
    return (*_parts(change.key), change.version % SLOTS, change.version, change.at_ms, change.who, patch)


def _json(value: object) -> str:
    return _encode(value).decode()


def _by_key(rows: Iterable[asyncpg.Record]) -> dict[ShadowKey, Shadow]:
    return {ShadowKey(row["tenant_id"], row["device_id"], row["name"]): _shadow(row) for row in rows}


def _shadow(row: asyncpg.Record) -> Shadow:
    return Shadow(
        Section(_decode(row["desired"]), _decode_mark(row["desired_mark"])),
        Section(_decode(row["reported"]), _decode_mark(row["reported_mark"])),
        row["version"],
        row["updated_ms"],
        row["present"],
        row["position"],
        row["deleted"],
        row["forgotten"],
    )


def _change(row: asyncpg.Record) -> Change:
    key = ShadowKey(row["tenant_id"], row["device_id"], row["name"])
    patch = None if row["patch"] is None else _decode(row["patch"])
    return Change(key, row["version"], row["changed_ms"], row["who"], patch)
