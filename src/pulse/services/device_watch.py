"""What an open page of one device is told: readings as they are stored, and when its shadow or commands have moved.

Of shadow and commands only a mark is told, which differs when they do: the page asks for them anew, as HTML.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec

from pulse.domain.command import Command, State
from pulse.domain.errors import PulseError
from pulse.domain.shadow import Shadow, ShadowKey
from pulse.services.live_tail import INTERVAL_S, DeviceTail, Lines

COMMANDS_SHOWN = 20
"""The newest ones of a device; `pulse command list` has all."""


class Shadows(Protocol):
    """Raises Outage."""

    async def shadow(self, key: ShadowKey) -> Shadow:
        """The shadow as it is."""


class Commands(Protocol):
    """Raises Outage."""

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
        """A page, the newest first."""


def mark_of(shadow: Shadow, commands: Sequence[Command]) -> str:
    """Differs where a shadow or the commands that are shown differ."""
    told = [(each.command_id, each.state, each.sends, each.held) for each in commands]
    return hashlib.sha256(msgspec.json.encode((shadow.version, shadow.exists, told))).hexdigest()[:16]


class DeviceWatch:
    """Looks at one device once a second."""

    def __init__(self, tail: DeviceTail, *, shadows: Shadows, commands: Commands, key: ShadowKey) -> None:
        self._tail = tail
        self._shadows = shadows
        self._commands = commands
        self._key = key

    async def watch(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """`rows`: JSON of Lines, at each look; `mark`: a JSON string, at first and when it is another one."""
        said = ""
        while True:
            try:
                rows, mark = await self._tail.look(), await self.mark()
            except PulseError as error:
                rows, mark = Lines(away=error.message), said
            yield "rows", msgspec.json.encode(rows)
            if mark != said:
                said = mark
                yield "mark", msgspec.json.encode(mark)
            await asyncio.sleep(INTERVAL_S)

    async def mark(self) -> str:
        """As `mark_of`. Raises Outage."""
        shown = await self._commands.commands(self._key.tenant_id, device_id=self._key.device_id, limit=COMMANDS_SHOWN)
        return mark_of(await self._shadows.shadow(self._key), shown)
