"""Reads all parts of the pipeline again and again, once for everybody who watches.

Watched, every second; else every IDLE_INTERVAL_S, so that whoever comes sees the last minutes at once. What takes more
than a look (counts in PostgreSQL, the audit) is read less often. An outage of one part leaves the others readable.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec
import structlog

from pulse.domain.audit import StreamAudit
from pulse.domain.errors import ConfigurationError, Outage, PulseError
from pulse.domain.picture import picture
from pulse.domain.pipeline import SPARK_POINTS, Edge, Fleet, Picture, Reading, StreamLevel, SystemState
from pulse.services.audit import Auditor

log = structlog.get_logger()

T = TypeVar("T")

INTERVAL_S = 1.0
IDLE_INTERVAL_S = 5.0
READINGS_MAX = 90
SPARK_EVERY_S = 5.0
STREAMS_SYSTEM = "nats"
FLEET_EVERY_S = 5.0
AUDIT_EVERY_S = 10.0
SILENT_LOOKS = 2
"""Looks one after the other at streams that do not answer, and NATS is called away: a client learns of a server that
was stopped in the middle by its pings alone, half a minute later."""
READ_S_MAX = 3.0
"""Of one part; what takes longer counts as not readable this time."""


class Levels(Protocol):
    """The streams; raises Outage."""

    async def levels(self) -> Mapping[str, StreamLevel]:
        """Each declared stream that is there."""


class EdgeMetrics(Protocol):
    """The roles' own metrics."""

    async def edge(self) -> Edge:
        """What those say that answer."""


class FleetCounts(Protocol):
    """Devices and dead letters; raises Outage."""

    async def fleet(self) -> Fleet:
        """How many there are."""


class Pipeline:
    """The picture, and those who watch it; one a process. Owns no ack."""

    name = "pipeline"

    def __init__(
        self,
        *,
        levels: Levels,
        edge: EdgeMetrics,
        fleet: FleetCounts,
        auditor: Auditor,
        audited: str,
        systems: Callable[[], Sequence[SystemState]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._levels = levels
        self._edge = edge
        self._fleet_counts = fleet
        self._auditor = auditor
        self._audited = audited
        self._systems = systems
        self._clock = clock
        self._readings: deque[Reading] = deque(maxlen=READINGS_MAX)
        self._sparks: dict[str, deque[float | None]] = {}
        self._spark_at = 0.0
        self._fleet: tuple[float, Fleet | None] = (0.0, None)
        self._audit: tuple[float, StreamAudit | None] = (0.0, None)
        self._picture: Picture | None = None
        self._encoded = b"{}"
        self._changed = asyncio.Event()
        self._silent_looks = 0
        self._silent_since_s = 0.0
        self._watchers = 0
        self._wanted = asyncio.Event()

    @property
    def picture(self) -> Picture | None:
        """The last one; None before the first."""
        return self._picture

    def systems(self) -> Sequence[SystemState]:
        """NATS and PostgreSQL as this process sees them, read from memory."""
        found = self._systems()
        if self._silent_looks < SILENT_LOOKS:
            return found
        silent = SystemState(
            name=STREAMS_SYSTEM, ok=False, since=self._silent_since_s, detail="no answer from JetStream"
        )
        return [silent if each.ok and each.name == STREAMS_SYSTEM else each for each in found]

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """The picture as JSON, at once and at each change; encoded once for all."""
        self._watchers += 1
        self._wanted.set()
        try:
            if self._picture is not None:
                yield self._encoded
            while True:
                await self._changed.wait()
                yield self._encoded
        finally:
            self._watchers -= 1

    async def run(self, stop: asyncio.Event) -> None:
        """Read until `stop` is set."""
        while not stop.is_set():
            started_s = self._clock()
            await self.look()
            interval_s = INTERVAL_S if self._watchers or self._silent_looks else IDLE_INTERVAL_S
            self._wanted.clear()
            await self._rest(stop, max(0.1, started_s + interval_s - self._clock()))

    async def look(self) -> None:
        """Read all parts once, and tell who watches."""
        now_s = self._clock()
        levels, edge, fleet, audit = await asyncio.gather(
            self._read("streams", self._levels.levels), self._read("metrics", self._edge.edge),
            self._fleet_now(now_s), self._audit_now(now_s),
        )  # fmt: skip
        self._hear(now_s, answered=levels is not None)
        self._readings.append(
            Reading(
                at_s=now_s,
                systems=tuple(self.systems()),
                streams=levels,
                edge=edge or Edge(),
                fleet=fleet,
                audit=audit,
            )
        )
        made = picture(tuple(self._readings))
        self._note(now_s, made.figures)
        self._picture = msgspec.structs.replace(made, sparks={name: list(kept) for name, kept in self._sparks.items()})
        self._encoded = msgspec.json.encode(self._picture)
        self._changed.set()
        self._changed = asyncio.Event()

    def _hear(self, now_s: float, *, answered: bool) -> None:
        if not answered and not self._silent_looks:
            self._silent_since_s = now_s
        self._silent_looks = 0 if answered else self._silent_looks + 1

    def _note(self, now_s: float, figures: Mapping[str, float | None]) -> None:
        if now_s - self._spark_at < SPARK_EVERY_S - 0.5:
            for name, kept in self._sparks.items():
                kept[-1] = figures[name]
            return
        self._spark_at = now_s
        for name, value in figures.items():
            self._sparks.setdefault(name, deque(maxlen=SPARK_POINTS)).append(value)

    async def _fleet_now(self, now_s: float) -> Fleet | None:
        if now_s - self._fleet[0] >= FLEET_EVERY_S or self._fleet[1] is None:
            self._fleet = (now_s, await self._read("fleet", self._fleet_counts.fleet))
        return self._fleet[1]

    async def _audit_now(self, now_s: float) -> StreamAudit | None:
        if now_s - self._audit[0] >= AUDIT_EVERY_S or self._audit[1] is None:
            makings = await self._read("audit", lambda: self._auditor.audit(self._audited))
            self._audit = (now_s, _together(makings) if makings else None)
        return self._audit[1]

    async def _read(self, part: str, read: Callable[[], Awaitable[T]]) -> T | None:
        try:
            async with asyncio.timeout(READ_S_MAX):
                return await read()
        except (Outage, ConfigurationError, TimeoutError) as error:
            why = str(error) if isinstance(error, PulseError) else f"no answer within {READ_S_MAX} s"
            log.info("a part of the pipeline cannot be read", every_s=60.0, every_key=part, part=part, error=why)
            return None

    async def _rest(self, stop: asyncio.Event, seconds: float) -> None:
        """Until the next look, `stop`, or the first who watches."""
        waits = [asyncio.ensure_future(stop.wait())]
        if not self._watchers:
            waits.append(asyncio.ensure_future(self._wanted.wait()))
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*waits, return_exceptions=True)


def _together(makings: Sequence[StreamAudit]) -> StreamAudit:
    """The equation over all makings of a stream."""
    last = makings[-1]
    return StreamAudit(
        stream=last.stream,
        epoch=last.epoch,
        accepted=sum(each.accepted for each in makings),
        stored=sum(each.stored for each in makings),
        dead=sum(each.dead for each in makings),
        in_flight=sum(each.in_flight for each in makings),
        expired=sum(each.expired for each in makings),
    )
