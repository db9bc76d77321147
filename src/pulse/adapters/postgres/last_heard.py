"""When devices were last heard of, beside telemetry: whoever settles what they say notes it, in the same transaction.

It goes last: the rows are those of the ingest workers as well, which lock them for one statement, in the order of ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pulse.domain.device_state import Device

if TYPE_CHECKING:
    from pulse.adapters.postgres.pool import Connection

UPSERT = """
    INSERT INTO device_state AS known (tenant_id, device_id, last_seen)
    SELECT tenant_id, device_id, 'epoch'::timestamptz + at_ms * interval '1 millisecond'
    FROM unnest($1::text[], $2::text[], $3::bigint[]) AS heard (tenant_id, device_id, at_ms)
    ORDER BY tenant_id, device_id
    ON CONFLICT (tenant_id, device_id) DO UPDATE SET last_seen = excluded.last_seen
    WHERE known.last_seen < excluded.last_seen
"""


async def note_heard(connection: Connection, heard: Iterable[tuple[Device, int]]) -> None:
    """These devices were heard of, each at a time in ms since the epoch; nothing moves back."""
    last: dict[Device, int] = {}
    for device, at_ms in heard:
        last[device] = max(at_ms, last.get(device, at_ms))
    if last:
        tenants, devices = zip(*last, strict=True)
        await connection.execute(UPSERT, tenants, devices, list(last.values()))
