"""What was attempted, on record: gathered for a moment, written in one transaction, never in the way of a job.

It is for people to read, and for the decision that a route has failed for too long. So it is bounded, not durable: of
each route the last RING attempts between two writes, and what PostgreSQL cannot take for long is forgotten and counted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Protocol

import msgspec
import structlog

from pulse.domain.breaker import Circuit
from pulse.domain.delivery import GOOD_RECORD, Attempted, Endurance, Record
from pulse.domain.errors import Outage
from pulse.domain.stored_route import RouteAttempt
from pulse.services.route_book import RouteKey

log = structlog.get_logger()

RING = 100
"""Attempts that are kept of each route."""
ROUTES_MAX = 10_000
FLUSH_S = 1.0


class Told(msgspec.Struct):
    """What there is to tell of one route; `record` are the failures since it last delivered within this time, of which
    `first_failure_s` is when the first was; it `has_delivered` meanwhile, or not."""

    attempts: deque[RouteAttempt]
    delivered: int = 0
    dead: int = 0
    has_delivered: bool = False
    record: Record = GOOD_RECORD
    last_success_at: datetime | None = None
    last_failure_at: datetime | None = None
    circuit: Circuit = Circuit.CLOSED


class RecordStore(Protocol):
    """The database; every call raises Outage."""

    async def record(self, told: Mapping[RouteKey, Told]) -> Mapping[RouteKey, Record]:
        """Write it down; returns the failures of those that have some now, whoever told of them."""

    async def disable(self, key: RouteKey, reason: str) -> bool:
        """Disable the route, on record; False where it is disabled, or gone, already."""


class RecordMetrics(Protocol):
    """What is counted."""

    def unrecorded(self, count: int) -> None:
        """So many attempts are not on record."""


class Records:
    """Gathers; `run` writes."""

    def __init__(self, store: RecordStore, *, endurance: Endurance, metrics: RecordMetrics) -> None:
        self._store = store
        self._metrics = metrics
        self._endurance = endurance
        self._told: dict[RouteKey, Told] = {}
        self._to_disable: dict[RouteKey, str] = {}

    def note(
        self, key: RouteKey, attempt: RouteAttempt, attempted: Attempted, *, now_s: float, circuit: Circuit
    ) -> None:
        """One attempt."""
        told = self._told.get(key)
        if told is None:
            if len(self._told) >= ROUTES_MAX:
                self._metrics.unrecorded(1)
                return
            told = self._told[key] = Told(deque(maxlen=RING))
        told.attempts.append(attempt)
        told.record = told.record.after(attempted, now_s=now_s)
        told.circuit = circuit
        told.dead += attempt.outcome == "dead"
        if attempt.outcome == "delivered":
            told.delivered += 1
            told.has_delivered = True
            told.last_success_at = attempt.at
        else:
            told.last_failure_at = attempt.at

    def disable(self, key: RouteKey, reason: str) -> None:
        """Have the route disabled, as soon as that can be written."""
        if len(self._to_disable) < ROUTES_MAX:
            self._to_disable[key] = reason

    async def run(self, stop: asyncio.Event) -> None:
        """Write once in a while until `stop`, and a last time then."""
        while not stop.is_set():
            try:
                async with asyncio.timeout(FLUSH_S):
                    await stop.wait()
            except TimeoutError:
                pass
            await self._flush()

    async def _flush(self) -> None:
        told, self._told = self._told, {}
        try:
            if told:
                await self._judge(await self._store.record(told))
                told = {}
            for key, reason in list(self._to_disable.items()):
                if await self._store.disable(key, reason):
                    log.warning("route disabled", tenant=key.tenant_id, route=key.route_id, reason=reason)
                del self._to_disable[key]
        except Outage as outage:
            for key, each in told.items():
                self._keep(key, each)
            log.warning("attempts are not on record yet", error=str(outage), routes=len(self._told))

    async def _judge(self, records: Mapping[RouteKey, Record]) -> None:
        now_s = datetime.now(UTC).timestamp()
        for key, record in records.items():
            if record.exhausts(self._endurance, now_s=now_s):
                self.disable(key, f"nothing was delivered since {record.since():%Y-%m-%d %H:%M} UTC")

    def _keep(self, key: RouteKey, before: Told) -> None:
        """Put back what could not be written, in front of what came meanwhile."""
        now = self._told.get(key)
        if now is None:
            self._told[key] = before
            return
        now.attempts = deque([*before.attempts, *now.attempts], maxlen=RING)
        now.delivered += before.delivered
        now.dead += before.dead
        if not now.has_delivered:
            now.record = Record(
                before.record.since_s or now.record.since_s, before.record.failures + now.record.failures
            )
        now.has_delivered = now.has_delivered or before.has_delivered
        now.last_success_at = now.last_success_at or before.last_success_at
        now.last_failure_at = now.last_failure_at or before.last_failure_at
