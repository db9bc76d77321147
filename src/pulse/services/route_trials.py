"""Tries a route with one message, now: as the delivery role sends, but in no queue, on no record and of no job.

It takes no turn at the destination's gate and moves no circuit: who tries a route wants to hear what the destination
says, above all where it is failing. What bounds it is a rate for each route and each tenant.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from pulse.domain.delivery import Attempted
from pulse.domain.errors import LimitExceeded, Outage, Reason, Refusal
from pulse.domain.limits import Rate, RateLimits
from pulse.domain.route import DeviceFilter, Job
from pulse.domain.route_trial import Trial, TrialJob, marked, refused, told, trial_job
from pulse.domain.routed import RoutedMessage
from pulse.domain.subjects import MessageType
from pulse.domain.webhook_url import Allowed
from pulse.services.route_book import Found, RouteKey, Sendable, sendable

ROUTE_RATE, TENANT_RATE = Rate(0.5, 5), Rate(2.0, 20)
CONNECT_S_MAX = 5.0
"""How long a trial waits for a connection to the MQTT broker, which is opened when it is first needed."""
CONNECT_POLL_S = 0.05


class Routes(Protocol):
    """The database; raises Outage."""

    async def load(self, known: Mapping[RouteKey, int | None]) -> Mapping[RouteKey, Found | None]:
        """Those of `known` that are at another revision by now; None for a route that is not there."""


class Messages(Protocol):
    """What is stored; raises Outage."""

    async def recent(self, tenant_id: str, devices: DeviceFilter, *, limit: int) -> Sequence[RoutedMessage]:
        """The last telemetry of the devices that the filter holds for, newest first."""


class Sender(Protocol):
    """Makes attempts."""

    async def attempt(self, job: Job, sendable: Sendable) -> Attempted:
        """One attempt; Refusal where this job can never be sent so, Outage where nothing was tried."""


class RouteTrials:
    """Answers who asks that a route be tried."""

    def __init__(self, *, routes: Routes, messages: Messages, sender: Sender, allowed: Allowed) -> None:
        self._routes = routes
        self._messages = messages
        self._sender = sender
        self._allowed = allowed
        self._limits = RateLimits(device=ROUTE_RATE, tenant=TENANT_RATE)

    async def answer(self, tenant_id: str, route_id: str, _question: bytes) -> bytes:
        """A Trial, as JSON. Raises Refusal where there is no such route or it is tried too often, Outage."""
        return msgspec.json.encode(await self.run(tenant_id, route_id))

    async def run(self, tenant_id: str, route_id: str) -> Trial:
        """Try the route, enabled or not."""
        key = RouteKey(tenant_id, route_id)
        found = (await self._routes.load({key: None})).get(key)
        if found is None:
            raise Refusal(Reason.NOT_FOUND, f"tenant {tenant_id!r} has no route {route_id!r}")
        try:
            self._limits.admit(tenant_id, route_id, time.monotonic_ns())
        except LimitExceeded as exceeded:
            message = f"routes are not tried that often; again in {exceeded.retry_after_s or 1:.0f} s"
            raise Refusal(Reason.RATE_LIMITED, message) from exceeded
        like = None
        if MessageType.TELEMETRY in found.route.match.message_types:
            like = next(iter(await self._messages.recent(tenant_id, found.route.match.devices, limit=1)), None)
        job = trial_job(found.route, like, trial_id=secrets.token_hex(8), now_ms=time.time_ns() // 1_000_000)
        read = sendable(found, allowed=self._allowed)
        if read.refusal or read.is_sealed:
            return refused(found.route, job, read.refusal or "nobody here has the key that its secret is sealed with")
        try:
            attempted = await self._attempt(job, msgspec.structs.replace(read, route=marked(read.route)))
        except Refusal as refusal:
            return refused(found.route, job, str(refusal))
        return told(found.route, job, attempted)

    async def _attempt(self, job: TrialJob, to: Sendable) -> Attempted:
        """One attempt, where there is a connection to what it needs by then."""
        give_up_at = time.monotonic() + CONNECT_S_MAX
        while True:
            try:
                return await self._sender.attempt(job, to)
            except Outage:
                if time.monotonic() >= give_up_at:
                    raise
            await asyncio.sleep(CONNECT_POLL_S)
