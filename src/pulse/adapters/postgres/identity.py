"""Tenants, devices and tokens in PostgreSQL: the truth, of which the registry in JetStream is a projection.

Every method is one transaction. They raise Refusal CONFLICT for what is there already, Refusal NOT_FOUND for what is
not, Refusal INVALID_IDENTITY for an id that is none, and Outage where PostgreSQL is away.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from itertools import islice

import asyncpg
import msgspec

from pulse.adapters.postgres.pool import Database, transaction
from pulse.adapters.postgres.tenant_limits import LIMIT_COLUMNS, limit_values, limits_of
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import (
    TOKEN_RANDOM_BYTES,
    TOKENS_PER_DEVICE_MAX,
    DeviceDetails,
    NewDevice,
    TenantDetails,
    TokenDetails,
    check_device_id,
    check_tenant_id,
    digest,
    make_token,
)
from pulse.domain.labels import merged_attributes
from pulse.domain.limits import TenantLimits
from pulse.domain.presence import PresenceAfter

BULK_ROWS = 10_000
"""Rows of one statement of a bulk insert; about a tenth of a second."""

TENANT_COLUMNS = f"tenant_id, name, enabled, {LIMIT_COLUMNS}, created_at, updated_at"
INSERT_TENANT = f"INSERT INTO tenants (tenant_id, name) VALUES ($1, $2) RETURNING {TENANT_COLUMNS}"  # noqa: S608
SELECT_TENANT = f"SELECT {TENANT_COLUMNS} FROM tenants WHERE tenant_id = $1"  # noqa: S608 - constants, as above
SELECT_TENANTS = f"""
    SELECT {TENANT_COLUMNS} FROM tenants
    WHERE tenant_id > $1 AND ($2::boolean IS NULL OR enabled = $2)
    ORDER BY tenant_id LIMIT $3
"""  # noqa: S608
COUNT_DEVICES = "SELECT count(*) FROM devices WHERE tenant_id = $1"
SET_TENANT_ENABLED = """
    UPDATE tenants SET enabled = $2, updated_at = now() WHERE tenant_id = $1
"""
SET_TENANT_LIMITS = f"UPDATE tenants SET ({LIMIT_COLUMNS}, updated_at) = ($2, $3, $4, $5, now()) WHERE tenant_id = $1"  # noqa: S608

INSERT_DEVICES = """
    INSERT INTO devices (tenant_id, device_id, name, attributes)
    SELECT $1, * FROM unnest($2::text[], $3::text[], $4::jsonb[])
"""
INSERT_DEVICES_NOT_THERE = INSERT_DEVICES + " ON CONFLICT DO NOTHING RETURNING device_id"
DELETE_TOKENS = "DELETE FROM device_tokens WHERE tenant_id = $1 AND device_id = ANY($2::text[])"
INSERT_TOKENS = """
    INSERT INTO device_tokens (tenant_id, device_id, digest) SELECT $1, * FROM unnest($2::text[], $3::bytea[])
"""
DEVICE_COLUMNS = """
    tenant_id, device_id, name, enabled, attributes, created_at, updated_at, last_seen,
    extract(epoch FROM now() - last_seen)::float8 AS silent_s
    FROM devices LEFT JOIN device_state USING (tenant_id, device_id)
"""
SELECT_DEVICES = f"""
    SELECT {DEVICE_COLUMNS}
    WHERE (tenant_id, device_id) > ($1, $2)
      AND ($3::text IS NULL OR tenant_id = $3)
      AND ($4::boolean IS NULL OR enabled = $4)
      AND starts_with(device_id, $5)
    ORDER BY tenant_id, device_id LIMIT $6
"""
SELECT_DEVICE = f"SELECT {DEVICE_COLUMNS} WHERE tenant_id = $1 AND device_id = $2"
LOCK_ATTRIBUTES = "SELECT attributes FROM devices WHERE tenant_id = $1 AND device_id = $2 FOR UPDATE"
UPDATE_DEVICE = """
    UPDATE devices SET name = coalesce($3, name), attributes = $4::jsonb, updated_at = now()
    WHERE tenant_id = $1 AND device_id = $2
"""
SELECT_TOKENS = """
    SELECT created_at, expires_at FROM device_tokens
    WHERE tenant_id = $1 AND device_id = $2 AND (expires_at IS NULL OR expires_at > now())
    ORDER BY created_at DESC
"""
SET_DEVICE_ENABLED = """
    UPDATE devices SET enabled = $3, updated_at = now() WHERE tenant_id = $1 AND device_id = $2
"""
TOUCH_DEVICE = "UPDATE devices SET updated_at = now() WHERE tenant_id = $1 AND device_id = $2"
END_TOKENS = """
    UPDATE device_tokens SET expires_at = least(expires_at, now() + make_interval(secs => $3))
    WHERE tenant_id = $1 AND device_id = $2
"""
DELETE_ENDED_AND_OLDEST = """
    DELETE FROM device_tokens WHERE tenant_id = $1 AND device_id = $2 AND digest NOT IN (
        SELECT digest FROM device_tokens
        WHERE tenant_id = $1 AND device_id = $2 AND expires_at > now()
        ORDER BY created_at DESC LIMIT $3
    )
"""


class IdentityStore:
    """Reads and writes identities."""

    def __init__(self, pool: Database, *, presence_after: PresenceAfter) -> None:
        self._presence_after = presence_after
        self._pool = pool

    async def add_tenant(self, tenant_id: str, *, name: str = "") -> TenantDetails:
        """Make a tenant, enabled."""
        check_tenant_id(tenant_id)
        try:
            async with transaction(self._pool) as connection:
                return _tenant(*await connection.fetch(INSERT_TENANT, tenant_id, name))
        except asyncpg.UniqueViolationError as error:
            raise Refusal(Reason.CONFLICT, f"tenant {tenant_id!r} is there already", field="tenant_id") from error

    async def tenant(self, tenant_id: str) -> TenantDetails:
        """The tenant of that id."""
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow(SELECT_TENANT, tenant_id)
        if row is None:
            raise _no_tenant(tenant_id)
        return _tenant(row)

    async def tenants(self, *, after: str = "", enabled: bool | None = None, limit: int = 100) -> list[TenantDetails]:
        """A page of at most `limit`, by id, of those behind `after`; the next page begins after its last id."""
        async with transaction(self._pool) as connection:
            return [_tenant(row) for row in await connection.fetch(SELECT_TENANTS, after, enabled, limit)]

    async def device_count(self, tenant_id: str) -> int:
        """How many devices the tenant has; reads an index, about 0.1 s for a million."""
        async with transaction(self._pool) as connection:
            return int(await connection.fetchval(COUNT_DEVICES, tenant_id))

    async def set_tenant_enabled(self, tenant_id: str, enabled: bool) -> None:
        """Let the tenant's devices speak, or none of them."""
        async with transaction(self._pool) as connection:
            if not _changed(await connection.execute(SET_TENANT_ENABLED, tenant_id, enabled)):
                raise _no_tenant(tenant_id)

    async def set_tenant_limits(self, tenant_id: str, limits: TenantLimits) -> None:
        """Give the tenant these limits, in place of those that it had; the settings hold for what is None."""
        values = limit_values(limits)
        async with transaction(self._pool) as connection:
            if not _changed(await connection.execute(SET_TENANT_LIMITS, tenant_id, *values)):
                raise _no_tenant(tenant_id)

    async def add_devices(
        self, tenant_id: str, devices: Sequence[NewDevice], *, reissue: bool = False
    ) -> dict[str, str]:
        """Make devices, enabled, with a token each; all of them or none. Returns device_id to token, in their order.

        The token is not kept: this is the only time it can be read. `reissue`: a device that is there already keeps
        its name and attributes and gets a new token, and its old ones end at once; else it is a CONFLICT.
        """
        check_tenant_id(tenant_id)
        tokens = {check_device_id(device.device_id): _new_token() for device in devices}
        if len(tokens) != len(devices):
            raise Refusal(Reason.CONFLICT, "the same device_id is given twice", field="device_id")
        insert = INSERT_DEVICES_NOT_THERE if reissue else INSERT_DEVICES
        remaining = iter(devices)
        try:
            async with transaction(self._pool) as connection:
                while chunk := list(islice(remaining, BULK_ROWS)):
                    ids = [device.device_id for device in chunk]
                    names = [device.name for device in chunk]
                    attributes = [msgspec.json.encode(device.attributes).decode() for device in chunk]
                    await connection.execute(insert, tenant_id, ids, names, attributes)
                    if reissue:
                        await connection.execute(DELETE_TOKENS, tenant_id, ids)
                    digests = [digest(tokens[device_id]) for device_id in ids]
                    await connection.execute(INSERT_TOKENS, tenant_id, ids, digests)
        except asyncpg.UniqueViolationError as error:
            alone = f"device {devices[0].device_id!r} of tenant {tenant_id!r} is there already"
            message = alone if len(devices) == 1 else f"one of these devices is there already: {error.detail}"
            raise Refusal(Reason.CONFLICT, message, field="device_id") from error
        except asyncpg.ForeignKeyViolationError as error:
            raise _no_tenant(tenant_id) from error
        return tokens

    async def add_missing_devices(self, tenant_id: str, devices: Sequence[NewDevice]) -> dict[str, str]:
        """Make those of `devices` (at most BULK_ROWS, no id twice) that are not there yet; their device_id to token."""
        check_tenant_id(tenant_id)
        ids = [check_device_id(device.device_id) for device in devices]
        names = [device.name for device in devices]
        attributes = [msgspec.json.encode(device.attributes).decode() for device in devices]
        try:
            async with transaction(self._pool) as connection:
                made = await connection.fetch(INSERT_DEVICES_NOT_THERE, tenant_id, ids, names, attributes)
                tokens = {str(row["device_id"]): _new_token() for row in made}
                digests = [digest(token) for token in tokens.values()]
                await connection.execute(INSERT_TOKENS, tenant_id, list(tokens), digests)
        except asyncpg.ForeignKeyViolationError as error:
            raise _no_tenant(tenant_id) from error
        return tokens

    async def update_device(
        self, tenant_id: str, device_id: str, *, name: str | None, attributes: Mapping[str, object]
    ) -> None:
        """Give the device another name (None: as it is) and merge `attributes` into its own; null removes one."""
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow(LOCK_ATTRIBUTES, tenant_id, device_id)
            if row is None:
                raise _no_device(tenant_id, device_id)
            merged = merged_attributes(msgspec.json.decode(row["attributes"]), attributes)
            encoded = msgspec.json.encode(merged).decode()
            await connection.execute(UPDATE_DEVICE, tenant_id, device_id, name, encoded)

    async def device(self, tenant_id: str, device_id: str) -> DeviceDetails:
        """The device of that id, with its tokens."""
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow(SELECT_DEVICE, tenant_id, device_id)
            if row is None:
                raise _no_device(tenant_id, device_id)
            tokens = await connection.fetch(SELECT_TOKENS, tenant_id, device_id)
        return msgspec.structs.replace(
            self._device(row),
            tokens=tuple(TokenDetails(created_at=made, expires_at=ends) for made, ends in tokens),
        )

    async def devices(
        self,
        *,
        tenant_id: str | None = None,
        enabled: bool | None = None,
        prefix: str = "",
        after: tuple[str, str] = ("", ""),
        limit: int = 100,
    ) -> list[DeviceDetails]:
        """A page of at most `limit`, by (tenant_id, device_id), of those behind `after`; without their tokens.

        `prefix` is how their device_id begins.
        """
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(SELECT_DEVICES, *after, tenant_id, enabled, prefix, limit)
        return [self._device(row) for row in rows]

    async def set_device_enabled(self, tenant_id: str, device_id: str, enabled: bool) -> None:
        """Let the device speak, or not; its tokens stay."""
        async with transaction(self._pool) as connection:
            if not _changed(await connection.execute(SET_DEVICE_ENABLED, tenant_id, device_id, enabled)):
                raise _no_device(tenant_id, device_id)

    async def rotate_token(self, tenant_id: str, device_id: str, *, overlap_s: float) -> str:
        """Give the device a new token; the old ones end after `overlap_s` at the latest, 0 being at once.

        No more than TOKENS_PER_DEVICE_MAX are valid together: the oldest end first.
        """
        token = _new_token()
        async with transaction(self._pool) as connection:
            # the row's lock makes two rotations of one device take turns
            if not _changed(await connection.execute(TOUCH_DEVICE, tenant_id, device_id)):
                raise _no_device(tenant_id, device_id)
            await connection.execute(END_TOKENS, tenant_id, device_id, float(overlap_s))
            await connection.execute(DELETE_ENDED_AND_OLDEST, tenant_id, device_id, TOKENS_PER_DEVICE_MAX - 1)
            await connection.execute(INSERT_TOKENS, tenant_id, [device_id], [digest(token)])
        return token

    def _device(self, row: asyncpg.Record) -> DeviceDetails:
        values = {**row, "attributes": msgspec.json.decode(row["attributes"])}
        return DeviceDetails(presence=self._presence_after.of(values.pop("silent_s")), **values)


def _new_token() -> str:
    return make_token(secrets.token_bytes(TOKEN_RANDOM_BYTES))


def _changed(status: str) -> bool:
    """Whether an UPDATE found its row, from the status that PostgreSQL gave it (`UPDATE 1`)."""
    return status != "UPDATE 0"


def _no_tenant(tenant_id: str) -> Refusal:
    message = f"there is no tenant {tenant_id!r}: make it with `pulse tenant add {tenant_id}`"
    return Refusal(Reason.NOT_FOUND, message, field="tenant_id")


def _no_device(tenant_id: str, device_id: str) -> Refusal:
    message = f"tenant {tenant_id!r} has no device {device_id!r}: `pulse device list --tenant {tenant_id}` lists them"
    return Refusal(Reason.NOT_FOUND, message, field="device_id")


def _tenant(row: asyncpg.Record) -> TenantDetails:
    return TenantDetails(
        tenant_id=row["tenant_id"],
        name=row["name"],
        enabled=row["enabled"],
        limits=limits_of(row),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
