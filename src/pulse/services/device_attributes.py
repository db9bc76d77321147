"""The attributes of devices, for whoever looks at them message by message: read in one query, kept for seconds.

They are not in the registry at the edge: for a million devices they would be as large as all the rest of it, and only
a tenant's routes ever ask for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from pulse.domain.routed import NOTHING, Json

AGE_S_MAX = 5.0
"""So long after it was changed an attribute may be taken for what it was."""
DEVICES_MAX = 50_000
BYTES_MAX = 16 * 1024 * 1024
"""As JSON; what is kept is some five times as large."""


class AttributeStore(Protocol):
    """The devices in PostgreSQL; raises Outage where it is away."""

    async def attributes(
        self, tenant_id: str, device_ids: Sequence[str]
    ) -> Mapping[str, tuple[Mapping[str, Json], int]]:
        """The attributes of those devices that have any, and how long they are as JSON."""


class AttributeCache:
    """What `store` says, at most `age_s_max` old; all of it is forgotten together."""

    def __init__(
        self, store: AttributeStore, *, age_s_max: float = AGE_S_MAX, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._age_s_max = age_s_max
        self._clock = clock
        self._known: dict[tuple[str, str], Mapping[str, Json]] = {}
        self._bytes = 0
        self._since = 0.0

    async def of(self, tenant_id: str, device_ids: Iterable[str]) -> Mapping[str, Mapping[str, Json]]:
        """The attributes of these devices; those that have none, or are not there, have none. Raises Outage."""
        now = self._clock()
        if now - self._since > self._age_s_max or len(self._known) > DEVICES_MAX or self._bytes > BYTES_MAX:
            self._known, self._bytes, self._since = {}, 0, now
        known = self._known
        found: dict[str, Mapping[str, Json]] = {}
        missing: list[str] = []
        for device_id in device_ids:
            attributes = known.get((tenant_id, device_id))
            if attributes is None:
                missing.append(device_id)
            else:
                found[device_id] = attributes
        if missing:
            read = await self._store.attributes(tenant_id, missing)
            for device_id in missing:
                attributes, size = read.get(device_id, (NOTHING, 0))
                found[device_id] = known[tenant_id, device_id] = attributes
                self._bytes += size
        return found
