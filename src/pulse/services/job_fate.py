"""What becomes of one job, here and now: delivered, again at a time, or dead. No stream is touched."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from pulse.domain.delivery import Attempted, Dead, Delivered, RetryAt, RetryPolicy, decide
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.route import Job
from pulse.domain.stored_route import RouteAttempt
from pulse.domain.waiting_job import Past
from pulse.services.delivery_record import Records
from pulse.services.route_book import RouteBook, RouteKey, Sendable
from pulse.services.sending import Sending
from pulse.services.turns import RouteRates, Turn, Turns, Where

UNKNOWN_S = 5.0
"""After which a job comes again whose route nobody could tell, or whose broker is away; up to twice as long."""


class AttemptMetrics(Protocol):
    """What is counted."""

    def attempted(self, kind: str, attempted: Attempted) -> None:
        """One attempt at a `webhook`, or at `mqtt`."""


class Again(NamedTuple):
    """The job comes again at `at_s` with so many `attempts` behind it; `parked`: none was made now."""

    at_s: float
    attempts: int
    parked: bool = True


class Dying(NamedTuple):
    """The job is dead."""

    reason: Reason
    error: str
    attempts: int


class InOrder(NamedTuple):
    """The job's route is ordered: it goes to the line of its device, and is attempted when it is its head."""


Fate = Delivered | Again | Dying | InOrder


class Fates:
    """Makes the attempt, if it is the job's turn, and decides."""

    def __init__(
        self,
        *,
        book: RouteBook,
        turns: Turns,
        rates: RouteRates,
        sending: Sending,
        records: Records,
        metrics: AttemptMetrics,
        retry: RetryPolicy,
        job_age_s_max: float,
        probe: Callable[[str], None],
    ) -> None:
        self._book = book
        self._turns = turns
        self._rates = rates
        self._sending = sending
        self._records = records
        self._metrics = metrics
        self._retry = retry
        self._job_age_s_max = job_age_s_max
        self._probe = probe
        self._open: set[asyncio.Task[object]] = set()
        self._cut: set[asyncio.Task[object]] = set()

    def cut(self, tasks: Iterable[asyncio.Task[object]]) -> None:
        """Decide what is open of `tasks` now: what is cut off comes again, and no attempt is counted."""
        for task in self._open.intersection(tasks):
            self._cut.add(task)
            task.cancel()

    async def of(self, job: Job, past: Past, *, is_head: bool = False) -> Fate:
        """What becomes of `job`; one of an ordered route has to be the head of its line to be attempted."""
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            return await self._decide(job, past, is_head=is_head)
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            task.uncancel()
            return Again(time.time(), past.attempts)
        finally:
            self._open.discard(task)
            self._cut.discard(task)

    async def _decide(self, job: Job, past: Past, *, is_head: bool) -> Fate:
        now_s = time.time()
        if now_s - past.since_ms / 1000 > self._job_age_s_max:
            return Dying(Reason.EXPIRED, f"it has waited for more than {self._job_age_s_max:g} s", past.attempts)
        key = RouteKey(job.tenant_id, job.route_id)
        try:
            found = await self._book.find(key)
        except Outage:
            return self._soon(past)
        if found is None or not found.route.enabled:
            why = "there is no such route any more" if found is None else "the route is disabled"
            return Dying(Reason.ROUTE_GONE, why, past.attempts)
        if found.route.ordered and not is_head:
            return InOrder()
        if found.refusal:
            return Dying(Reason.INVALID_REQUEST, found.refusal, past.attempts)
        if found.is_sealed:
            return self._soon(past)
        if (at_s := self._rates.come_again_s(key, found.route.rate)) is not None:
            return Again(at_s, past.attempts)
        where: Where = (job.tenant_id, found.url.destination if found.url else None)
        turn = await self._turns.take(where)
        if isinstance(turn, float):
            return Again(turn, past.attempts)
        self._rates.count(key, found.route.rate)
        return await self._attempt(job, past, found, turn, where)

    async def _attempt(self, job: Job, past: Past, found: Sendable, turn: Turn, where: Where) -> Fate:
        attempted: Attempted | None = None
        try:
            attempted = await self._sending.attempt(job, found)
        except Refusal as refusal:
            return Dying(refusal.reason, str(refusal), past.attempts)
        except Outage:
            return self._soon(past)
        finally:
            if attempted is None:
                self._turns.withdrawn(turn)
        self._turns.ended(turn, attempted)
        self._probe("delivery.attempted")
        return self._decided(job, past, found, attempted, where)

    def _decided(self, job: Job, past: Past, found: Sendable, attempted: Attempted, where: Where) -> Fate:
        now_s, attempts = time.time(), past.attempts + 1
        decision = decide(
            attempted,
            attempt=attempts,
            now_s=now_s,
            policy=self._retry,
            random=random.random(),  # noqa: S311 jitter, not a secret
        )
        key = RouteKey(job.tenant_id, job.route_id)
        self._metrics.attempted(kind_of(found), attempted)
        outcome = {Delivered: "delivered", RetryAt: "retry", Dead: "dead"}[type(decision)]
        attempt = RouteAttempt(
            at=datetime.fromtimestamp(now_s, UTC),
            message_id=job.message_id,
            device_id=job.device_id,
            attempt=attempts,
            outcome=outcome,
            status=attempted.status,
            failure=attempted.failure or "",
            error=attempted.error,
            elapsed_ms=round(attempted.elapsed_s * 1000, 1),
            excerpt=attempted.excerpt.decode("utf-8", "replace"),
        )
        self._records.note(key, attempt, attempted, now_s=now_s, circuit=self._turns.circuit(where))
        match decision:
            case Delivered():
                return decision
            case RetryAt(at_s):
                return Again(at_s, attempts, parked=False)
            case Dead(reason, disable_route):
                if disable_route:
                    self._book.disable(key)
                    self._records.disable(key, f"the destination answered {attempted.name}: nobody is there any more")
                return Dying(Reason(reason.value), f"attempt {attempts}: {attempted.error or attempted.name}", attempts)

    def _soon(self, past: Past) -> Again:
        return Again(time.time() + UNKNOWN_S * (1.0 + random.random()), past.attempts)  # noqa: S311 jitter


def kind_of(found: Sendable) -> str:
    """What kind of destination it is, for the metrics."""
    return "mqtt" if found.topic is not None else "webhook"
