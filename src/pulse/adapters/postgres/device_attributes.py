"""The attributes of devices in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from pulse.adapters.postgres.pool import Pool, transaction

SELECT_ATTRIBUTES = """
    SELECT device_id, attributes FROM devices
    WHERE tenant_id = $1 AND device_id = ANY($2::text[]) AND attributes <> '{}'
"""

_decode = msgspec.json.Decoder(dict[str, str | bool | int | float | None]).decode


class DeviceAttributeStore:
    """Reads them; satisfies `services.device_attributes.AttributeStore`. Raises Outage."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def attributes(
        self, tenant_id: str, device_ids: Sequence[str]
    ) -> Mapping[str, tuple[Mapping[str, str | bool | int | float | None], int]]:
        """The attributes of those devices that have any, and how long they are as JSON."""
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(SELECT_ATTRIBUTES, tenant_id, list(device_ids))
        return {device_id: (_decode(text), len(text)) for device_id, text in rows}
