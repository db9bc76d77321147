"""Jobs on their way to ROUTES, and what becomes of those that cannot go there.

    job ──► ROUTES ─┬─ stored ─────────────────────────────► counted
                    ├─ full, or the job is no message ──────► letter on dead.ROUTES ──► counted
                    └─ no answer ───────────────────────────► Outage: the worker waits, and sends it again under its id

A job of an ordered route goes to the line of its device, in PostgreSQL, in place of ROUTES; the rest is the same.

Telemetry never waits for room in ROUTES; where DEAD_LETTERS is full as well, it does, for nothing may be lost.
Invariant: no Refusal leaves this module, for a worker would take it for one of the message, which is stored.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
import structlog

from pulse.domain.dead_letter import Condemned
from pulse.domain.errors import Outage, Reason, Refusal, StreamFull
from pulse.domain.line import InLine
from pulse.domain.receipt import Receipt
from pulse.services.route_table import RouteKey

log = structlog.get_logger()

ROUTES = "ROUTES"
WINDOW_JOBS = 2000
WINDOW_BYTES = 4 * 1024 * 1024
"""So much is on its way to JetStream for one batch."""
ANSWERED_MAX = 50_000
"""Jobs of which it is remembered that they were answered: an outage in the middle of many is not all of them again."""

_encode = msgspec.json.Encoder().encode


class Publisher(Protocol):
    """Group commit to JetStream."""

    def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        """Store it; raises, or the future gets, Refusal, Outage, or StreamFull."""


class Lines(Protocol):
    """The lines of ordered routes."""

    async def add(self, jobs: Sequence[InLine]) -> Sequence[Receipt | StreamFull]:
        """Put jobs in, together; returns of each that it stands there, or that there is no room. Raises Outage."""


class JobMetrics(Protocol):
    """What is counted."""

    def routed(self, *, jobs: int, no_room: int, refused: int) -> None:
        """So many jobs were made, and so many became dead letters: for want of room, or because they are too large."""


class Job(NamedTuple):
    """One job: the message at a position, for a route; the `position` is told of one that is to be sent in order."""

    tenant_id: str
    route_id: str
    device_id: str
    message_id: str
    body: bytes
    position: int | None = None

    @property
    def subject(self) -> str:
        """Where it goes."""
        return f"routes.{self.tenant_id}"


class _Dead(NamedTuple):
    job: Job
    reason: Reason
    error: str

    def letter(self, *, with_body: bool) -> Condemned:
        return Condemned(
            stream=ROUTES,
            subject=self.job.subject,
            reason=self.reason,
            error=f"{self.error}; job {self.job.message_id}",
            body=self.job.body if with_body else b"",
            tenant_id=self.job.tenant_id,
            device_id=self.job.device_id,
            published_ns=time.time_ns(),
        )


Answer = asyncio.Future[Receipt] | Refusal | Outage


class JobSender:
    """Sends jobs through `publisher`, those of any number of batches at once."""

    def __init__(self, *, publisher: Publisher, lines: Lines, metrics: JobMetrics) -> None:
        self._publisher = publisher
        self._lines = lines
        self._metrics = metrics
        self._counts: dict[RouteKey, list[int]] = {}
        self._answered: deque[str] = deque(maxlen=ANSWERED_MAX)
        self._answered_before: frozenset[str] = frozenset()

    def take_counts(self) -> dict[RouteKey, list[int]]:
        """Of each route the jobs, and those that found no room, since this was last asked."""
        counts, self._counts = self._counts, {}
        return counts

    def is_answered(self, job_id: str) -> bool:
        """Whether it was, before the last outage."""
        return job_id in self._answered_before

    def interrupted(self) -> None:
        """There was an outage: what is answered by now need not be sent again."""
        self._answered_before = frozenset(self._answered)

    def send(self, subject: str, body: bytes, job_id: str) -> Answer:
        """Send it on its way."""
        try:
            return self._publisher.submit(subject, body, message_id=job_id)
        except (Refusal, Outage) as error:
            return error

    async def line_up(self, jobs: Sequence[tuple[Job, int]]) -> None:
        """Put jobs in their lines, and bury what finds no room there; raises Outage."""
        now_ms = time.time_ns() // 1_000_000
        told = [
            InLine(
                tenant_id=job.tenant_id,
                route_id=job.route_id,
                device_id=job.device_id,
                position=position,
                body=job.body,
                since_ms=now_ms,
            )
            for job, position in jobs
        ]
        await self.judge([job for job, _ in jobs], await self._lines.add(told))

    async def judge(self, jobs: Sequence[Job], answers: Sequence[Receipt | Refusal | Outage]) -> None:
        """Count what was stored, bury what was refused; raises the Outage of what is neither."""
        made = 0
        dead: list[_Dead] = []
        outage: Outage | None = None
        for job, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, Receipt):
                made += self._count(job, answer, 0)
            elif isinstance(answer, StreamFull):
                dead.append(_Dead(job, Reason.ROUTES_FULL, "the queue of jobs is full"))
            elif isinstance(answer, Refusal):
                dead.append(_Dead(job, answer.reason, answer.message))
            else:
                outage = answer
        self._metrics.routed(jobs=made, no_room=0, refused=0)
        if dead:
            await self._bury(dead)
        if outage is not None:
            raise outage

    async def _bury(self, dead: Sequence[_Dead]) -> None:
        """A letter is larger than its job. One that NATS does not take goes without the body: the message is stored."""
        left = await self._post(dead, with_body=True)
        if left and (left := await self._post(left, with_body=False)):
            raise Outage("nats", f"the dead letter of job {left[0].job.message_id} is refused")

    async def _post(self, dead: Sequence[_Dead], *, with_body: bool) -> list[_Dead]:
        """Publish the letters of these; returns those that were refused. Raises Outage."""
        letters = [each.letter(with_body=with_body) for each in dead]
        sent = [
            self.send(letter.carrier, _encode(letter), each.job.message_id)
            for letter, each in zip(letters, dead, strict=True)
        ]
        left: list[_Dead] = []
        outage: Outage | None = None
        buried: dict[bool, int] = {True: 0, False: 0}
        for each, answer in zip(dead, await heard(sent), strict=True):
            if isinstance(answer, Receipt):
                buried[each.reason is Reason.ROUTES_FULL] += self._count(each.job, answer, 1)
            elif isinstance(answer, Refusal):
                left.append(each)
            else:
                outage = answer
        if buried[True] or buried[False]:
            self._metrics.routed(jobs=0, no_room=buried[True], refused=buried[False])
            log.warning("jobs became dead letters", jobs=buried[True] + buried[False], reason=dead[0].reason)
        if outage is not None:
            raise outage
        return left

    def _count(self, job: Job, receipt: Receipt, which: int) -> int:
        """1 where it is new."""
        self._answered.append(job.message_id)
        if receipt.duplicate:
            return 0
        self._counts.setdefault((job.tenant_id, job.route_id), [0, 0])[which] += 1
        return 1


class Jobs:
    """The jobs of one batch, sent while they are added."""

    def __init__(self, sender: JobSender) -> None:
        self._sender = sender
        self._jobs: list[Job] = []
        self._sent: list[Answer] = []
        self._ordered: list[tuple[Job, int]] = []
        self._bytes = 0

    async def add(self, job: Job) -> None:
        """Send one more; where much is on its way, returns when that is answered. Raises Outage."""
        if job.position is None:
            self._jobs.append(job)
            self._sent.append(self._sender.send(job.subject, job.body, job.message_id))
        else:
            self._ordered.append((job, job.position))
        self._bytes += len(job.body)
        if len(self._jobs) + len(self._ordered) >= WINDOW_JOBS or self._bytes >= WINDOW_BYTES:
            await self.close()

    async def close(self) -> None:
        """Returns when all of them are on disk, or buried; raises Outage where they are not."""
        ordered, self._ordered = self._ordered, []
        if self._jobs:
            jobs, answers = self._jobs, await self.abandon()
            await self._sender.judge(jobs, answers)
        self._bytes = 0
        if ordered:
            await self._sender.line_up(ordered)

    async def abandon(self) -> Sequence[Receipt | Refusal | Outage]:
        """Wait for what is on its way; somebody will ask for it again."""
        sent, self._sent, self._jobs, self._bytes = self._sent, [], [], 0
        return await heard(sent)


async def heard(sent: Sequence[Answer]) -> list[Receipt | Refusal | Outage]:
    """What became of each; a bug is raised."""
    if not sent:
        return []
    heard: list[Receipt | Refusal | Outage] = []
    for each in sent:
        try:
            heard.append(await each if isinstance(each, asyncio.Future) else each)
        except (Refusal, Outage) as error:
            heard.append(error)
    return heard
