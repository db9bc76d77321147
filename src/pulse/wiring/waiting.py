"""What a worker waits for, for `/readyz`: PostgreSQL may answer, and yet take no rows (a full disk, a standby)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from pulse.adapters.postgres.command_settling import CommandSettling
from pulse.adapters.postgres.dead_letters import RescueStore
from pulse.adapters.postgres.shadow_settling import ShadowSettlements
from pulse.adapters.postgres.telemetry import TelemetryStore
from pulse.domain.command_words import Said, Settled
from pulse.domain.device_state import Device, DeviceState
from pulse.domain.errors import Outage
from pulse.domain.ledger import PositionSet
from pulse.domain.settlement import DeadLetter, Settlement
from pulse.domain.shadow_requests import Answers, Request
from pulse.runtime.health import Dependency


@contextmanager
def told(check: Dependency) -> Iterator[None]:
    """Tell `check` how a call to the database ended: away from an Outage until the next call that meets none."""
    try:
        yield
    except Outage as outage:
        check.down(f"{outage.system}: {outage.message}")
        raise
    check.up()


class WatchedTelemetryStore:
    """A `services.ingest.Store` that tells `check`."""

    def __init__(self, store: TelemetryStore, check: Dependency) -> None:
        self._store = store
        self._check = check

    async def check(self) -> None:
        with told(self._check):
            await self._store.check()

    async def epoch(self, created_ns: int) -> int:
        with told(self._check):
            return await self._store.epoch(created_ns)

    async def settle(self, settlement: Settlement) -> PositionSet:
        with told(self._check):
            return await self._store.settle(settlement)

    async def dead_among(self, settled: PositionSet) -> PositionSet:
        with told(self._check):
            return await self._store.dead_among(settled)

    async def write_states(self, states: Mapping[Device, DeviceState]) -> None:
        with told(self._check):
            await self._store.write_states(states)


class WatchedShadowSettlements:
    """A `services.shadow.Store` that tells `check`."""

    def __init__(self, store: ShadowSettlements, check: Dependency) -> None:
        self._store = store
        self._check = check

    async def check(self) -> None:
        with told(self._check):
            await self._store.check()

    async def epoch(self, created_ns: int) -> int:
        with told(self._check):
            return await self._store.epoch(created_ns)

    async def settle(self, requests: Sequence[Request], dead: Sequence[DeadLetter]) -> tuple[Answers, PositionSet]:
        with told(self._check):
            return await self._store.settle(requests, dead)


class WatchedCommandSettling:
    """A `services.commands.Store` that tells `check`."""

    def __init__(self, store: CommandSettling, check: Dependency) -> None:
        self._store = store
        self._check = check

    async def check(self) -> None:
        with told(self._check):
            await self._store.check()

    async def epoch(self, created_ns: int) -> int:
        with told(self._check):
            return await self._store.epoch(created_ns)

    async def settle(self, said: Sequence[Said], dead: Sequence[DeadLetter], *, at_ms: int) -> Settled:
        with told(self._check):
            return await self._store.settle(said, dead, at_ms=at_ms)


class WatchedRescueStore:
    """A `services.rescue.Store` that tells `check`."""

    def __init__(self, store: RescueStore, check: Dependency) -> None:
        self._store = store
        self._check = check

    async def check(self) -> None:
        with told(self._check):
            await self._store.check()

    async def epoch(self, stream: str, created_ns: int) -> int:
        with told(self._check):
            return await self._store.epoch(stream, created_ns)

    async def is_settled(self, at: int) -> bool:
        with told(self._check):
            return await self._store.is_settled(at)

    async def is_dead(self, at: int) -> bool:
        with told(self._check):
            return await self._store.is_dead(at)

    async def bury(self, stream: str, letter: DeadLetter) -> bool:
        with told(self._check):
            return await self._store.bury(stream, letter)
