"""A route as the editor's form has it: the fields, what they ask for, and which of them a refusal means.

Values of headers stand in the form only as somebody types them: those that are there are named, and kept, or removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pulse.domain.errors import Reason, Refusal
from pulse.domain.route import MATCHED_TYPES, Route, Webhook
from pulse.ui.security import Form

TYPES = tuple((str(each), str(each).replace("-", " ")) for each in MATCHED_TYPES)
TEXTS = (
    "tenant_id", "route_id", "name", "devices", "prefix", "attributes", "expression", "kind", "url", "timeout_s",
    "headers", "topic", "template", "per_s", "burst",
)  # fmt: skip
NEW = dict.fromkeys(TEXTS, "") | {"kind": "webhook", "timeout_s": "10", "type_telemetry": "yes", "enabled": "yes"}
FIELD_OF = (
    ("match.message_types", "types"),
    ("match.devices.ids", "devices"),
    ("match.devices.prefix", "prefix"),
    ("match.devices.attributes", "attributes"),
    ("match.expression", "expression"),
    ("destination.url", "url"),
    ("destination.timeout_s", "timeout_s"),
    ("destination.headers", "headers"),
    ("destination.topic", "topic"),
    ("rate.burst", "burst"),
    ("rate", "per_s"),
)
"""Where a refusal's path begins so, it is about this field."""
LABELS = {
    "types": "Messages",
    "devices": "Devices",
    "prefix": "Ids begin with",
    "attributes": "Attributes",
    "expression": "Condition",
    "url": "URL",
    "timeout_s": "Seconds for an answer",
    "headers": "Headers",
    "topic": "Topic",
    "template": "Body",
    "per_s": "Messages a second",
    "burst": "At once",
    "ordered": "In order",
    "name": "Name",
    "route_id": "Route id",
    "tenant_id": "Tenant",
}


def values_of_form(form: Form) -> dict[str, str]:
    """All that was typed, with the line ends of everybody else in place of a browser's."""
    texts = {name: form.raw(name).replace("\r\n", "\n") for name in TEXTS}
    return texts | {name: form[name] for name in (*(f"type_{each}" for each, _ in TYPES), "ordered", "enabled")}


def values_of_route(route: Route) -> dict[str, str]:
    """The form for a route that is there."""
    devices, to = route.match.devices, route.destination
    webhook = to if isinstance(to, Webhook) else None
    return dict.fromkeys(TEXTS, "") | {
        "tenant_id": route.tenant_id,
        "route_id": route.route_id,
        "name": route.name,
        "devices": "\n".join(devices.ids),
        "prefix": devices.prefix,
        "attributes": "\n".join(_attribute_line(*each) for each in devices.attributes.items()),
        "expression": route.match.expression,
        "kind": "webhook" if webhook else "mqtt",
        "url": webhook.url if webhook else "",
        "timeout_s": f"{webhook.timeout_s:g}" if webhook else "10",
        "topic": "" if isinstance(to, Webhook) else to.topic,
        "template": route.template or "",
        "per_s": "" if route.rate is None else f"{route.rate.per_s:g}",
        "burst": "" if route.rate is None else str(route.rate.burst),
        "ordered": "yes" if route.ordered else "",
        "enabled": "yes" if route.enabled else "",
        **{f"type_{each}": "yes" for each in route.match.message_types},
    }


def asked_of(values: Mapping[str, str], *, removed: Iterable[str] = ()) -> dict[str, Any]:
    """What the form asks for, as `domain.route_requests` reads it; None for each of the headers that are `removed`.

    Raises Refusal with the path of what cannot even be asked.
    """
    asked: dict[str, Any] = {
        "name": values["name"].strip(),
        "match": {
            "message_types": [each for each, _ in TYPES if values.get(f"type_{each}") == "yes"],
            "devices": {
                "ids": values["devices"].replace(",", " ").split(),
                "prefix": values["prefix"].strip(),
                "attributes": dict(_attribute(line) for line in _lines(values["attributes"])),
            },
            "expression": values["expression"].strip(),
        },
        "template": values["template"].strip() or None,
        "enabled": values.get("enabled") == "yes",
        "rate": _rate(values),
        "ordered": values.get("ordered") == "yes",
    }
    if values["kind"] == "mqtt":
        return {**asked, "destination": {"kind": "mqtt", "topic": values["topic"].strip()}}
    headers: dict[str, str | None] = dict.fromkeys(removed)
    headers |= dict(_header(line) for line in _lines(values["headers"]))
    destination: dict[str, Any] = {"kind": "webhook", "url": values["url"].strip(), "headers": headers}
    if values["timeout_s"].strip():
        destination["timeout_s"] = _number(values["timeout_s"], "destination.timeout_s")
    return {**asked, "destination": destination}


def field_of(refusal: Refusal) -> str:
    """Which field of the form a refusal is about; empty where it is about none."""
    path = refusal.field
    found = (field for begin, field in FIELD_OF if path == begin or path.startswith((f"{begin}.", f"{begin}[")))
    return next(found, path.split(".")[0].split("[")[0] if path.split(".")[0] in LABELS else "")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _attribute_line(name: str, value: object) -> str:
    return f"{name}={value}" if isinstance(value, str) else f"{name}:={msgspec.json.encode(value).decode()}"


def _attribute(line: str) -> tuple[str, object]:
    """`NAME=VALUE` is a text, `NAME:=VALUE` a number, true or false; as on the command line."""
    name, separator, value = line.partition("=")
    field = "match.devices.attributes"
    if not separator or not name.removesuffix(":").strip():
        raise Refusal(Reason.INVALID_REQUEST, f"a line is NAME=VALUE, or NAME:=NUMBER, not {line[:64]!r}", field=field)
    if not name.endswith(":"):
        return name.strip(), value.strip()
    try:
        return name[:-1].strip(), msgspec.json.decode(value.encode(), type=int | float | bool)
    except msgspec.DecodeError as error:
        message = f"NAME:=VALUE takes a number, true or false, not {value[:64]!r}"
        raise Refusal(Reason.INVALID_REQUEST, message, field=field) from error


def _header(line: str) -> tuple[str, str]:
    name, separator, value = line.partition(":")
    if not separator:
        raise Refusal(Reason.INVALID_REQUEST, "a line is NAME: VALUE", field="destination.headers")
    return name.strip(), value.strip()


def _rate(values: Mapping[str, str]) -> dict[str, Any] | None:
    if not values["per_s"].strip():
        return None
    per_s = _number(values["per_s"], "rate.per_s")
    if not values["burst"].strip():
        return {"per_s": per_s, "burst": max(1, math.ceil(per_s))}
    if not values["burst"].strip().isdecimal() or len(values["burst"].strip()) > 12:
        raise Refusal(Reason.INVALID_REQUEST, "is a whole number of messages", field="rate.burst")
    return {"per_s": per_s, "burst": int(values["burst"])}


def _number(text: str, field: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise Refusal(Reason.INVALID_REQUEST, "is a number", field=field) from error
    if not math.isfinite(number):
        raise Refusal(Reason.INVALID_REQUEST, "is a number", field=field)
    return number
