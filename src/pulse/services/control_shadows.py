"""What the control API needs of the shadows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pulse.domain.shadow import Change, Shadow, ShadowKey
from pulse.domain.shadow_requests import Changed


class Shadows(Protocol):
    """What devices should be, and what they say they are."""

    async def shadow(self, key: ShadowKey) -> Shadow:
        """The shadow as it is; one that never was has version 0."""

    async def names(self, tenant_id: str, device_id: str) -> list[str]:
        """The names of the shadows that a device has; the unnamed one's is empty."""

    async def changes(self, key: ShadowKey) -> list[Change]:
        """The last changes, oldest first."""

    async def change(self, key: ShadowKey, decide: Callable[[Shadow], Changed]) -> Changed:
        """Make the shadow what `decide` makes of it, and enter what the device hears; what it raises undoes all."""
