"""One message that a route is tried with for real: sent to its destination at once, stored nowhere, and marked.

The message is the last one of a device that the filter holds for, or an example where there is none; its payload says
`"test": true`, and a webhook has the header `Pulse-Test: true` as well. It is not matched against the expression.
"""

from __future__ import annotations

import msgspec

from pulse.domain.delivery import Attempted
from pulse.domain.route import Job, Route, Webhook
from pulse.domain.routed import RoutedMessage
from pulse.domain.subjects import MessageType

HEADER = ("Pulse-Test", "true")
EXAMPLE_DEVICE = "test-device"
EXAMPLE = {"metrics": {"example": 21.5}}


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it: `delivered` is a status of 2xx; else `failure` and `error` say what there was in place of one.

    `to` is a URL, or the template of a topic; `message_id` the `webhook-id`; `excerpt` the beginning of the answer.
    """

    delivered: bool
    to: str
    message_id: str
    device_id: str
    status: int | None = None
    failure: str = ""
    error: str = ""
    elapsed_ms: float = 0.0
    excerpt: str = ""


class TrialJob(Job, frozen=True, kw_only=True):
    """A job of no message: its id is its own, so that a receiver never takes it for one that it had."""

    trial_id: str

    @property
    def message_id(self) -> str:
        """The `webhook-id`."""
        return f"test-{self.trial_id}:{self.route_id}"


def trial_job(route: Route, like: RoutedMessage | None, *, trial_id: str, now_ms: int) -> TrialJob:
    """The job for `route`, with a message that is `like` a stored one."""
    payload = {**(EXAMPLE if like is None else like.payload), "test": True}
    types = route.match.message_types
    return TrialJob(
        v=1,
        tenant_id=route.tenant_id,
        device_id=EXAMPLE_DEVICE if like is None else like.device_id,
        msg_type=MessageType.TELEMETRY if like is not None or MessageType.TELEMETRY in types else types[0],
        ts=now_ms,
        source="http",
        payload=msgspec.Raw(msgspec.json.encode(payload)),
        route_id=route.route_id,
        position=0,
        trial_id=trial_id,
    )


def marked(route: Route) -> Route:
    """The same, with our header at its webhook."""
    to = route.destination
    if not isinstance(to, Webhook):
        return route
    headers = {**to.headers, HEADER[0]: HEADER[1]}
    return msgspec.structs.replace(route, destination=msgspec.structs.replace(to, headers=headers))


def destination_of(route: Route) -> str:
    """Where it goes, for people."""
    to = route.destination
    return to.url if isinstance(to, Webhook) else f"tenant/{route.tenant_id}/route/{to.topic}"


def told(route: Route, job: TrialJob, attempted: Attempted) -> Trial:
    """What became of `job`."""
    return Trial(
        delivered=attempted.status is not None and 200 <= attempted.status < 300,
        to=destination_of(route),
        message_id=job.message_id,
        device_id=job.device_id,
        status=attempted.status,
        failure=attempted.failure or "",
        error=attempted.error,
        elapsed_ms=round(attempted.elapsed_s * 1000, 1),
        excerpt=attempted.excerpt.decode("utf-8", "replace"),
    )


def refused(route: Route, job: TrialJob, why: str) -> Trial:
    """That nothing could be sent."""
    return Trial(
        delivered=False,
        to=destination_of(route),
        message_id=job.message_id,
        device_id=job.device_id,
        failure="refused",
        error=why,
    )
