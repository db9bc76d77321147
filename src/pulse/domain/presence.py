"""Whether a device is there, by how long it has been silent."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Presence(StrEnum):
    """Online: heard of lately. Stale: it should have spoken. Offline: nobody would call it there, or it never spoke."""

    ONLINE = "online"
    STALE = "stale"
    OFFLINE = "offline"


class PresenceAfter(msgspec.Struct, frozen=True, kw_only=True):
    """After how many seconds of silence a device is stale, and after how many it is offline."""

    stale_s: float = 120.0
    offline_s: float = 600.0

    def of(self, silent_s: float | None) -> Presence:
        """The presence of a device that has been silent for so long; None: it was never heard of."""
        if silent_s is None or silent_s >= self.offline_s:
            return Presence.OFFLINE
        return Presence.STALE if silent_s >= self.stale_s else Presence.ONLINE


PRESENCE_AFTER = PresenceAfter()
