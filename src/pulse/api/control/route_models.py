"""The bodies about routes. What a match and a destination may be is checked by `domain`, which names the path that is
at fault; `route_schemas.py` tells of it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, WithJsonSchema

from pulse.api.control import route_schemas as schemas
from pulse.api.control.models import WHOLE, Answer, Attributes, Id, Name, NewRate, Rate, Request
from pulse.domain.template import TEMPLATE_BYTES_MAX
from pulse.domain.webhook import OVERLAP_S_MAX

OVERLAP_S_DEFAULT = 86_400
Match = Annotated[dict[str, Any], WithJsonSchema(schemas.MATCH)]
Destination = Annotated[dict[str, Any], WithJsonSchema({"oneOf": [schemas.WEBHOOK, schemas.REPUBLISH]})]
Patch = Annotated[dict[str, Any], WithJsonSchema({"type": "object"})]
Template = Annotated[
    str,
    Field(
        max_length=TEMPLATE_BYTES_MAX,
        description="JSON with places; without one the whole envelope is sent.",
        examples=['{"text": "${device.id} is at ${metrics.temp}"}'],
    ),
]
EXAMPLE: JsonValue = {
    "name": "too hot",
    "match": {"expression": "metrics.temp > 80.0"},
    "destination": {"kind": "webhook", "url": "https://hooks.example.com/pulse"},
}


class Draft(Request):
    """A route as it is asked for.

    `ordered`: of one device, the next message is sent when the one before is delivered or a dead letter, so a
    destination that is away holds all behind it. The order is that of the stream; a message may still come twice.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    destination: Destination
    name: Name = ""
    match: Annotated[Match, Field(default_factory=dict)]
    template: Template | None = None
    enabled: bool = True
    rate: NewRate | None = None
    ordered: bool = False


class NewRoute(Draft):
    """A route to be made; without a `route_id` it gets one."""

    route_id: Id | None = None


class RoutePatch(Request):
    """What is to change, a JSON Merge Patch (RFC 7396). Headers that it does not name keep their values, unless the
    webhook goes to another host; null removes one. A destination of another kind is taken whole.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"match": {"expression": "metrics.temp > 90.0"}}]})

    name: Name | None = None
    match: Patch | None = None
    destination: Patch | None = None
    template: Template | None = None
    enabled: bool | None = None
    rate: Patch | None = None
    ordered: bool | None = None


class SecretRotation(Request):
    """How long the secret before stays valid, in seconds, beside the new one; 0 ends it at once."""

    overlap_s: Annotated[int, Field(ge=0, le=OVERLAP_S_MAX), WHOLE] = OVERLAP_S_DEFAULT


class DevicesOfRoute(Answer):
    """Which devices: all that is given has to hold."""

    ids: list[str]
    prefix: str
    attributes: Attributes


class MatchOfRoute(Answer):
    """Which messages."""

    message_types: list[str]
    devices: DevicesOfRoute
    expression: str


class WebhookOfRoute(Answer):
    """An HTTP POST; of its headers the names, never the values."""

    kind: Literal["webhook"]
    url: str
    header_names: list[str]
    timeout_s: float


class RepublishOfRoute(Answer):
    """An MQTT publish below `tenant/{tenant_id}/route/`."""

    kind: Literal["mqtt"]
    topic: str


class Signing(Answer):
    """Since when the newest secret is valid, and until when the one before is too."""

    since: datetime
    previous_until: datetime | None


class Route(Answer):
    """A route. `revision` grows with every change; `disabled_reason` says why Pulse disabled it by itself."""

    route_id: str
    name: str
    enabled: bool
    disabled_reason: str
    match: MatchOfRoute
    destination: WebhookOfRoute | RepublishOfRoute
    template: str | None
    rate: Rate | None
    ordered: bool
    revision: int
    signing: Signing | None
    created_at: datetime
    updated_at: datetime


class RouteChanged(Answer):
    """A route after a change; `projected` is false where the workers will learn of it a little later.

    `secret` is what its webhook is signed with from now on, where it is a new one: it cannot be read again.
    """

    route: Route
    projected: bool
    secret: str | None = None


class RoutePage(Answer):
    """Routes by id; `next` is the `after` of the next page, null where there is none."""

    routes: list[Route]
    next: str | None


class Attempt(Answer):
    """One attempt: `outcome` is `delivered`, `retry` or `dead`; without a `status` its `failure` says why."""

    at: datetime
    message_id: str
    device_id: str
    attempt: int
    outcome: str
    status: int | None
    failure: str
    error: str
    elapsed_ms: float
    excerpt: str


class Trial(Answer):
    """What became of a test message: `delivered` is a status of 2xx; without a `status`, `failure` and `error` say why.

    `message_id` is its `webhook-id`. It is like the last message of `device_id`; its payload has `"test": true`, and a
    webhook the header `Pulse-Test: true`.
    """

    delivered: bool
    to: str
    message_id: str
    device_id: str
    status: int | None
    failure: str
    error: str
    elapsed_ms: float
    excerpt: str


class Attempts(Answer):
    """The last attempts, newest first: as many as are kept of each route."""

    attempts: list[Attempt]


class Health(Answer):
    """How the destination is, as the role that delivers last told, and what the workers made for it.

    `circuit` is `closed` (well), `open` (nothing is sent for a while) or `half_open` (being tried). `unanswered` counts
    messages of which the expression said neither yes nor no. Of an `ordered` route so many wait `in_line`.
    """

    circuit: str
    delivered: int
    dead: int
    failures: int
    failing_since: datetime | None
    last_delivered_at: datetime | None
    last_failed_at: datetime | None
    told_at: datetime | None
    jobs: int
    no_room: int
    unanswered: int
    in_line: int


class Sample(Answer):
    """What would be sent for one message, `to` a URL or a topic; or why nothing could be (`refused`)."""

    position: int
    device_id: str
    ts_ms: int
    to: str
    header_names: list[str]
    body: str
    body_bytes: int
    refused: str


class Unanswered(Answer):
    """Why the expression said neither yes nor no, of how many messages, one of them at `position`."""

    why: str
    count: int
    position: int


class DryRun(Answer):
    """What the route would do with the last messages of the devices that its filter holds for; nothing is sent.

    `complete` is false where time ran out. `destination_refused` says why nothing may be sent there, empty: it may.
    """

    examined: int
    matched: int
    refused: int
    unanswered: int
    reasons: list[Unanswered]
    samples: list[Sample]
    complete: bool
    destination_refused: str
    ordered: bool
