"""Dry runs: a route, or a draft of one, against the last messages of its tenant that are stored.

Rows and time are bounded: a run that has had RUN_S_MAX says what it has seen by then. It works in a thread, so that
whoever else asks meanwhile is answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from pulse.domain.dry_run import MESSAGES_MAX, REASONS_MAX, SAMPLES_MAX, DryRun, Renderer, Sample, Unanswered
from pulse.domain.errors import Reason, Refusal
from pulse.domain.route import DeviceFilter, Route, Webhook
from pulse.domain.route_index import Candidate, RouteIndex, wanting
from pulse.domain.routed import RoutedMessage
from pulse.domain.subjects import MessageType
from pulse.domain.webhook_url import Allowed, WebhookUrl, read_webhook_url

RUN_S_MAX = 2.0


class StoredMessages(Protocol):
    """The tables; raises Outage."""

    async def recent(self, tenant_id: str, devices: DeviceFilter, *, limit: int) -> Sequence[RoutedMessage]:
        """The last telemetry of the devices that the filter holds for, newest first."""


class Expression(Protocol):
    """A compiled expression."""

    def __call__(self, scope: object, /) -> bool:
        """Whether a message is wanted."""

    def why_unanswered(self, scope: object, /) -> str:
        """Why there is no answer; empty where there is one."""


class Expressions(Protocol):
    """Compiles expressions, and makes messages into what they look at."""

    def compile(self, text: str) -> Expression:
        """Refusal INVALID_REQUEST with the position where it does not read."""

    def scope(self, message: RoutedMessage) -> object:
        """What expressions see of `message`."""


class Destinations(Protocol):
    """Looks up where a webhook would go."""

    async def why_refused(self, url: WebhookUrl) -> str:
        """Why nothing may be sent there now; empty where it may."""


class DryRuns:
    """Tries routes; one a process."""

    def __init__(
        self,
        *,
        expressions: Expressions,
        destinations: Destinations,
        allowed: Allowed,
        body_bytes_max: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.allowed = allowed
        self._expressions = expressions
        self._destinations = destinations
        self._body_bytes_max = body_bytes_max
        self._clock = clock

    def check(self, route: Route) -> Route:
        """`route`, if its expression compiles; else Refusal with the position."""
        self.check_expression(route.match.expression)
        return route

    def check_expression(self, text: str) -> None:
        """Refusal with the position where `text` does not read; an empty one asks nothing."""
        if text:
            self._expressions.compile(text)

    async def run(self, route: Route, stored: StoredMessages, *, limit: int) -> DryRun:
        """What `route`, enabled or not, would do with the last `limit` messages. Raises Refusal, Outage."""
        if MessageType.TELEMETRY not in route.match.message_types:
            message = "a dry run looks at stored telemetry, which this route does not match"
            raise Refusal(Reason.INVALID_REQUEST, message, field="match.message_types")
        self.check(route)
        messages = await stored.recent(route.tenant_id, route.match.devices, limit=min(limit, MESSAGES_MAX))
        refused = ""
        if isinstance(route.destination, Webhook):
            refused = await self._destinations.why_refused(
                read_webhook_url(route.destination.url, allowed=self.allowed)
            )
        return await asyncio.to_thread(self._run, route, messages, refused)

    def _run(self, route: Route, messages: Sequence[RoutedMessage], destination_refused: str) -> DryRun:
        until = self._clock() + RUN_S_MAX
        expression = self._expressions.compile(route.match.expression) if route.match.expression else None
        index, renderer = RouteIndex(), Renderer(route, bytes_max=self._body_bytes_max)
        index.replace(route.tenant_id, [_enabled(route, expression)])
        examined = matched = refused = unanswered = 0
        samples: list[Sample] = []
        why: dict[str, tuple[int, int]] = {}
        for message in messages:
            if self._clock() > until:
                break
            examined += 1
            near = index.near(message.tenant_id, message.message_type, message.device_id, message.attributes)
            if not near:
                continue
            if wanting(near, message, self._expressions.scope):
                sample = renderer.sample(message)
                matched += 1
                refused += bool(sample.refused)
                if len(samples) < SAMPLES_MAX:
                    samples.append(sample)
            elif expression is not None and (reason := expression.why_unanswered(self._expressions.scope(message))):
                unanswered += 1
                count, position = why.get(reason, (0, message.position))
                if reason in why or len(why) < REASONS_MAX:
                    why[reason] = count + 1, position
        return DryRun(
            examined=examined,
            matched=matched,
            refused=refused,
            unanswered=unanswered,
            reasons=[Unanswered(why=text, count=count, position=at) for text, (count, at) in why.items()],
            samples=samples,
            complete=examined == len(messages),
            destination_refused=destination_refused,
            ordered=route.ordered,
        )


def _enabled(route: Route, expression: Expression | None) -> Candidate:
    return Candidate(msgspec.structs.replace(route, enabled=True), expression)
