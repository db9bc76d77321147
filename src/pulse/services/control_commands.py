"""What the control API needs of the commands."""

from __future__ import annotations

from typing import Protocol

from pulse.domain.command import Command, Move, NewCommand, State
from pulse.domain.fleet import Fleet, NewFleet


class Commands(Protocol):
    """What devices were told to do. Refusal NOT_FOUND for what is not there."""

    async def create(self, new: NewCommand, *, who: str, at_ms: int) -> tuple[Command, bool]:
        """Make a command, and whether this made it: False where its idempotency key had made it before.

        Raises Refusal CONFLICT for another request under that key, LimitExceeded where its device has too many.
        """

    async def command(self, tenant_id: str, command_id: str) -> Command:
        """The command of that id."""

    async def moves(self, tenant_id: str, command_id: str) -> list[Move]:
        """Which states it came into, the first one first."""

    async def commands(
        self,
        tenant_id: str,
        *,
        device_id: str | None = None,
        state: State | None = None,
        fleet_id: str | None = None,
        before: tuple[int, str] | None = None,
        limit: int = 100,
    ) -> list[Command]:
        """A page, the newest first, of those before (created_ms, command_id)."""

    async def cancel(self, tenant_id: str, command_id: str, *, who: str, at_ms: int) -> Command:
        """End a command. Raises Refusal CONFLICT where it has ended."""

    async def create_fleet(self, new: NewFleet, *, who: str, at_ms: int) -> tuple[Fleet, bool]:
        """Note that many are to be made, and whether this noted it; as `create`."""

    async def fleet(self, tenant_id: str, fleet_id: str) -> Fleet:
        """The fleet command of that id."""

    async def fleets(self, tenant_id: str, *, before: tuple[int, str] | None = None, limit: int = 100) -> list[Fleet]:
        """A page, the newest first, of those before (created_ms, fleet_id)."""

    async def cancel_fleet(self, tenant_id: str, fleet_id: str, *, who: str, at_ms: int) -> Fleet:
        """Make no more of its commands, and end those that are open. Raises Refusal CONFLICT where it is cancelled."""
