"""Keeping the registry at the edge what PostgreSQL says, whatever was lost between a commit and its projection.

PostgreSQL always wins. What looks different is not repaired with what was read: it is projected anew, key by key, by
compare-and-set, so a change that commits meanwhile is never undone. Nothing here holds more than a page.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from typing import Protocol

import msgspec
import structlog

from pulse.domain.registry import Record, record_key, same_admission

logger = structlog.get_logger()

PAGE_RECORDS = 1000

Loader = Callable[[Sequence[str]], Awaitable[Mapping[str, Record]]]


class Truth(Protocol):
    """PostgreSQL."""

    def pages(self, size: int) -> AsyncGenerator[list[Record], None]:
        """Everything that the registry should hold, in pages."""
        ...

    async def load(self, keys: Sequence[str]) -> Mapping[str, Record]:
        """What the registry should hold under `keys`; a key that is absent in the answer should not be there."""
        ...


class Projection(Protocol):
    """The registry in JetStream."""

    def key_pages(self) -> AsyncGenerator[list[str], None]:
        """All keys that are there, in pages."""
        ...

    async def read(self, keys: Sequence[str]) -> Mapping[str, Record | None]:
        """What stands under `keys`; None for a value that cannot be read, absent where there is none."""
        ...

    async def project(self, keys: Sequence[str], load: Loader) -> AbstractSet[str]:
        """Make the entries under `keys` what `load` says, by compare-and-set; returns the keys that were changed."""
        ...


class Repairs(msgspec.Struct, frozen=True, kw_only=True):
    """What one reconciliation looked at and mended, in entries."""

    checked: int = 0
    missing: int = 0
    stale: int = 0
    surplus: int = 0

    @property
    def total(self) -> int:
        """Entries that were mended."""
        return self.missing + self.stale + self.surplus


class RegistryReconciler:
    """Compares everything, both ways; see `reconcile_once`."""

    def __init__(self, *, truth: Truth, projection: Projection, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._truth = truth
        self._projection = projection
        self._clock_ns = clock_ns

    async def reconcile_once(self) -> Repairs:
        """Go through PostgreSQL for what is missing or stale, then through the registry for what is surplus.

        May run at any time, many times at once, and be cut off anywhere. Raises Outage where either system is away.
        """
        checked = missing = stale = surplus = 0
        async with aclosing(self._truth.pages(PAGE_RECORDS)) as pages:
            async for page in pages:
                checked += len(page)
                missing_here, stale_here = await self._repair(page)
                missing += missing_here
                stale += stale_here
        async with aclosing(self._projection.key_pages()) as pages_of_keys:
            async for keys in pages_of_keys:
                surplus += await self._remove_surplus(keys)
        repairs = Repairs(checked=checked, missing=missing, stale=stale, surplus=surplus)
        if repairs.total:
            logger.warning("registry repaired", **msgspec.structs.asdict(repairs))
        return repairs

    async def _repair(self, page: Sequence[Record]) -> tuple[int, int]:
        """How many were missing, and how many stale."""
        wanted = {record_key(record): record for record in page}
        found = await self._projection.read(list(wanted))
        now_ms = self._clock_ns() // 1_000_000
        different = [key for key, record in wanted.items() if not same_admission(record, found.get(key), now_ms)]
        changed = await self._projection.project(different, self._truth.load) if different else frozenset()
        missing = sum(key not in found for key in changed)
        return missing, len(changed) - missing

    async def _remove_surplus(self, keys: Sequence[str]) -> int:
        known = await self._truth.load(keys)
        surplus = [key for key in keys if key not in known]
        return len(await self._projection.project(surplus, self._truth.load)) if surplus else 0
