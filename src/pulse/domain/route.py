"""A route: which messages it wants, what it makes of them, and where they go.

    {"name": "hot", "destination": {"kind": "webhook", "url": "https://…"}, "template": "{\"t\": \"${metrics.temp}\"}",
     "match": {"message_types": ["telemetry"], "devices": {"prefix": "boiler-"}, "expression": "metrics.temp > 80.0"}}

A device filter names devices, a prefix of their ids, attributes, or several of these, which all have to hold; an empty
one is every device. The secrets of a webhook are no part of its route: they never leave the database but to sign.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.identity import check_device_id, check_tenant_id, is_id
from pulse.domain.json_text import read_json
from pulse.domain.labels import check_attributes, check_name, check_text
from pulse.domain.limits import Rate, check_rate
from pulse.domain.route_topic import read_topic_template
from pulse.domain.subjects import MessageType
from pulse.domain.template import read_template
from pulse.domain.webhook_url import PUBLIC, Allowed, read_webhook_url

Tag = str | bool | int | float

MATCHED_TYPES = (MessageType.TELEMETRY, MessageType.HEARTBEAT, MessageType.SHADOW, MessageType.COMMANDS_ACK)
"""What devices say of themselves; what they only ask for is not for others."""
DEVICES_NAMED_MAX = 1000
EXPRESSION_LENGTH_MAX = 1024
HEADERS_MAX = 16
HEADER_VALUE_LENGTH_MAX = 1024

_HEADER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,63}")
_HEADERS_OURS = re.compile(
    r"(?i)webhook-.*|pulse-.*|host|content-(?!language).*|transfer-encoding|connection|keep-alive|te|trailer|upgrade"
    r"|proxy-.*|expect|date|cookie|set-cookie|forwarded|x-forwarded-.*|accept-encoding"
)


class DeviceFilter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which devices; all that is given has to hold, and attributes with exactly these values."""

    ids: tuple[str, ...] = ()
    prefix: str = ""
    attributes: Mapping[str, Tag] = {}


class Match(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which messages; `expression` is CEL, empty where it is not asked."""

    message_types: tuple[MessageType, ...] = (MessageType.TELEMETRY,)
    devices: DeviceFilter = DeviceFilter()
    expression: str = ""


class Webhook(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="webhook"):
    """An HTTP POST to `url`, with headers beside ours; `timeout_s` is for the whole of an attempt."""

    url: str
    headers: Mapping[str, str] = {}
    timeout_s: Annotated[float, Meta(ge=0.5, le=20)] = 10.0


class Republish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="mqtt"):
    """An MQTT publish, QoS 1, to the topic template below the tenant's own prefix (`route_topic.py`)."""

    topic: str


DestinationSpec = Webhook | Republish


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One route; `template` None sends the envelope as it is, `rate` None is as the settings say.

    `ordered`: of one device the next message is sent when the one before is delivered or dead (`line.py`).
    `revision` grows with every change, so that what was compiled of an older one is known.
    """

    tenant_id: str
    route_id: str
    destination: DestinationSpec
    name: str = ""
    match: Match = Match()
    template: str | None = None
    enabled: bool = True
    rate: Rate | None = None
    ordered: bool = False
    revision: int = 1


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands on `routes.{tenant_id}`: the envelope of the message, and which route wants it.

    It has no secret and no URL: both are looked up when it is delivered, so that a change holds for what waits, too.
    """

    v: Literal[1]
    tenant_id: str
    device_id: str
    msg_type: MessageType
    ts: int
    source: Literal["http", "mqtt"]
    payload: msgspec.Raw
    route_id: str
    position: int
    hops: int = 0
    name: str = ""

    @property
    def message_id(self) -> str:
        """Its `Nats-Msg-Id`, and the `webhook-id` of every attempt."""
        return message_id(self.position, self.route_id)


_route_decoder = msgspec.json.Decoder(Route)
_job_decoder = msgspec.json.Decoder(Job)
_encoder = msgspec.json.Encoder()


def check_route(route: Route, *, allowed: Allowed = PUBLIC) -> Route:
    """`route`, if it can be one; else Refusal with the path of what is at fault.

    Whether its expression compiles is for whoever has the compiler; the address behind a host name is looked at when
    something is sent.
    """
    check_tenant_id(route.tenant_id)
    if not is_id(route.route_id):
        raise Refusal(Reason.INVALID_IDENTITY, "route_id must be 1 to 64 of A-Z a-z 0-9 _ -", field="route_id")
    check_name(route.name)
    _check_match(route.match)
    if route.template is not None:
        read_template(route.template)
    if isinstance(route.destination, Webhook):
        read_webhook_url(route.destination.url, allowed=allowed)
        _check_headers(route.destination.headers)
    else:
        read_topic_template(route.destination.topic)
    if route.rate is not None:
        check_rate(route.rate, field="rate")
    return route


def _check_match(match: Match) -> None:
    if not match.message_types or len(set(match.message_types)) != len(match.message_types):
        raise Refusal(Reason.INVALID_REQUEST, "names each type once, and at least one", field="match.message_types")
    for number, message_type in enumerate(match.message_types):
        if message_type not in MATCHED_TYPES:
            message = f"a route matches {', '.join(MATCHED_TYPES)}"
            raise Refusal(Reason.INVALID_REQUEST, message, field=f"match.message_types[{number}]")
    devices, field = match.devices, "match.devices"
    if len(devices.ids) > DEVICES_NAMED_MAX:
        message = f"names at most {DEVICES_NAMED_MAX} devices; use attributes"
        raise LimitExceeded(
            Reason.TOO_LARGE, message, limit="route_devices_max", value=DEVICES_NAMED_MAX, field=f"{field}.ids"
        )
    for number, device_id in enumerate(devices.ids):
        check_device_id(device_id, field=f"{field}.ids[{number}]")
    if devices.prefix:
        check_device_id(devices.prefix, field=f"{field}.prefix")
    try:
        check_attributes(devices.attributes)
    except Refusal as refusal:
        raise Refusal(refusal.reason, refusal.message, field=f"{field}.{refusal.field}") from refusal
    if len(match.expression) > EXPRESSION_LENGTH_MAX:
        message = f"an expression has at most {EXPRESSION_LENGTH_MAX} characters"
        raise LimitExceeded(
            Reason.TOO_LARGE,
            message,
            limit="route_expression_length_max",
            value=EXPRESSION_LENGTH_MAX,
            field="match.expression",
        )


def _check_headers(headers: Mapping[str, str]) -> None:
    field = "destination.headers"
    if len(headers) > HEADERS_MAX:
        raise Refusal(Reason.INVALID_REQUEST, f"there may be {HEADERS_MAX} headers", field=field)
    if len({name.lower() for name in headers}) != len(headers):
        raise Refusal(Reason.INVALID_REQUEST, "the same header twice", field=field)
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or _HEADERS_OURS.fullmatch(name):
            raise Refusal(Reason.INVALID_REQUEST, f"{name[:64]!r} is no header of yours to set", field=field)
        check_text(value, field=f"{field}.{name}", length_max=HEADER_VALUE_LENGTH_MAX)
        if not value.isascii():
            raise Refusal(Reason.INVALID_REQUEST, "a header is plain ASCII", field=f"{field}.{name}")


def encode_route(route: Route) -> bytes:
    """A route as JSON, whole."""
    return _encoder.encode(route)


def encode_route_for_edge(route: Route) -> bytes:
    """The same for who matches and does not deliver: without the headers of a webhook, which may be passwords."""
    if isinstance(route.destination, Webhook):
        route = msgspec.structs.replace(route, destination=msgspec.structs.replace(route.destination, headers={}))
    return _encoder.encode(route)


def decode_route(text: bytes) -> Route:
    """A route from its JSON, unchecked; Refusal with the path or position where it is none."""
    return read_json(_route_decoder, text)


def message_id(position: int, route_id: str) -> str:
    """Names a job once and for all: the position of its message, and its route."""
    return f"{position}:{route_id}"


def make_job(envelope: bytes, *, route_id: str, position: int, hops: int = 0) -> bytes:
    """The body of a job: `envelope`, which must be a JSON object, with three members behind its own.

    The device's bytes stay as they came. A thousand routes that want one message cost a thousand short copies.
    """
    if not envelope.endswith(b"}"):
        raise ValueError("an envelope ends with a brace")
    return b'%b,"route_id":"%b","position":%d,"hops":%d}' % (envelope[:-1], route_id.encode("ascii"), position, hops)


def read_job(subject: str, body: bytes) -> Job:
    """Read a job; Refusal INVALID_ENVELOPE where it is none, or speaks for another tenant than its subject."""
    try:
        job = _job_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(Reason.INVALID_ENVELOPE, str(error)) from error
    if subject != f"routes.{job.tenant_id}" or not is_id(job.tenant_id):
        message = f"tenant {job.tenant_id!r} does not belong on subject {subject!r}"
        raise Refusal(Reason.INVALID_ENVELOPE, message, field="tenant_id")
    for field, text in (("device_id", job.device_id), ("route_id", job.route_id)):
        if not is_id(text):
            raise Refusal(Reason.INVALID_ENVELOPE, f"{text[:64]!r} is no id", field=field)
    if job.position <= 0 or job.hops < 0:
        raise Refusal(Reason.INVALID_ENVELOPE, "a position is positive, and hops are counted from 0", field="position")
    return job
