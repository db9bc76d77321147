"""What the OpenAPI document says of a route's match and destination; `domain/route.py` is what checks them."""

from __future__ import annotations

from pydantic import JsonValue

from pulse.domain.labels import ATTRIBUTE_NAME_LENGTH_MAX, ATTRIBUTES_MAX
from pulse.domain.route import (
    DEVICES_NAMED_MAX,
    EXPRESSION_LENGTH_MAX,
    HEADER_VALUE_LENGTH_MAX,
    HEADERS_MAX,
    MATCHED_TYPES,
)
from pulse.domain.route_topic import TEMPLATE_LENGTH_MAX as TOPIC_LENGTH_MAX
from pulse.domain.webhook_url import URL_LENGTH_MAX

_ID: dict[str, JsonValue] = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_PREFIX: dict[str, JsonValue] = {"type": "string", "pattern": "^[A-Za-z0-9_-]{0,64}$"}
_VALUE: dict[str, JsonValue] = {"anyOf": [{"type": each} for each in ("string", "number", "boolean")]}


def _object(properties: dict[str, JsonValue], **more: JsonValue) -> dict[str, JsonValue]:
    return {"type": "object", "additionalProperties": False, "properties": properties, **more}


DEVICES = _object(
    {
        "ids": {"type": "array", "items": _ID, "maxItems": DEVICES_NAMED_MAX},
        "prefix": _PREFIX,
        "attributes": {
            "type": "object",
            "maxProperties": ATTRIBUTES_MAX,
            "propertyNames": {"minLength": 1, "maxLength": ATTRIBUTE_NAME_LENGTH_MAX},
            "additionalProperties": _VALUE,
        },
    },
    description="All that is given has to hold; nothing is every device.",
)
MATCH = _object(
    {
        "message_types": {
            "type": "array",
            "items": {"type": "string", "enum": [str(each) for each in MATCHED_TYPES]},
            "minItems": 1,
            "uniqueItems": True,
            "default": ["telemetry"],
        },
        "devices": DEVICES,
        "expression": {
            "type": "string",
            "maxLength": EXPRESSION_LENGTH_MAX,
            "description": "CEL over metrics, payload, device, tenant, ts; an error or a missing key is no match.",
            "examples": ["metrics.temp > 80.0 && device.attributes.site == 'north'"],
        },
    }
)
WEBHOOK = _object(
    {
        "kind": {"const": "webhook"},
        "url": {"type": "string", "maxLength": URL_LENGTH_MAX, "examples": ["https://hooks.example.com/pulse"]},
        "headers": {
            "type": "object",
            "maxProperties": HEADERS_MAX,
            "additionalProperties": {"type": "string", "maxLength": HEADER_VALUE_LENGTH_MAX},
            "description": "Sent beside ours; the values are sealed, and never told again.",
        },
        "timeout_s": {"type": "number", "minimum": 0.5, "maximum": 20, "default": 10},
    },
    required=["kind", "url"],
)
REPUBLISH = _object(
    {
        "kind": {"const": "mqtt"},
        "topic": {
            "type": "string",
            "maxLength": TOPIC_LENGTH_MAX,
            "description": "Below tenant/{tenant_id}/route/, with places like ${device.id}.",
            "examples": ["alerts/${device.id}"],
        },
    },
    required=["kind", "topic"],
)
