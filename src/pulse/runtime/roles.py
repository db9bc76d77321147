"""The roles that a process may have."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What `pulse serve` can run."""

    GATEWAY = "gateway"
    INGEST = "ingest"
    MAINTENANCE = "maintenance"
    UI = "ui"
    RESCUE = "rescue"
    BRIDGE = "bridge"
    SHADOW = "shadow"
    COMMANDS = "commands"
    DELIVERY = "delivery"
