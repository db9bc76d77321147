"""A message as routes look at it: what expressions, templates and topics may name.

    tenant     "acme"                          msg_type   "telemetry"
    device     {"id": …, "attributes": {…}}    source     "http" | "mqtt"
    ts         when the edge received it       metrics    {…} of telemetry, {} otherwise
    payload    all that the device said

A path names a value: `device.attributes.site`, `payload.state.door`, `metrics["temp.inside"]`, `payload.list[0]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from pulse.domain.errors import Reason, Refusal
from pulse.domain.subjects import MessageType

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Path: TypeAlias = tuple[str | int, ...]

ROOTS = frozenset({"tenant", "device", "msg_type", "source", "ts", "metrics", "payload"})
PATH_LENGTH_MAX = 256
MISSING = msgspec.UNSET
"""What a path leads to where there is nothing; null is a value."""

_STEP = re.compile(r"\.([A-Za-z_][A-Za-z0-9_-]{0,127})|\[([0-9]{1,6})\]|\[(\"(?:[^\"\\\x00-\x1f]|\\.){0,256}\")\]")
_ROOT = re.compile(r"[a-z_]+")
NOTHING: Mapping[str, Json] = {}


class RoutedMessage:
    """One message, decoded once for all routes that look at it.

    `body` is its envelope as it stands in the stream, `position` where; `attributes` are its device's.
    """

    __slots__ = (
        "attributes",
        "body",
        "device_id",
        "hops",
        "message_type",
        "payload",
        "position",
        "source",
        "tenant_id",
        "ts_ms",
    )

    def __init__(
        self,
        *,
        tenant_id: str,
        device_id: str,
        message_type: MessageType,
        source: str,
        ts_ms: int,
        payload: Mapping[str, Json],
        attributes: Mapping[str, Json] = NOTHING,
        body: bytes = b"",
        position: int = 0,
        hops: int = 0,
    ) -> None:
        self.tenant_id = tenant_id
        self.device_id = device_id
        self.message_type = message_type
        self.source = source
        self.ts_ms = ts_ms
        self.payload = payload
        self.attributes = attributes
        self.body = body
        self.position = position
        self.hops = hops

    @property
    def metrics(self) -> Mapping[str, Json]:
        """Of telemetry; of anything else there are none."""
        metrics = self.payload.get("metrics")
        return metrics if isinstance(metrics, dict) else NOTHING

    def root(self, name: str) -> Json | Mapping[str, Json]:
        """What a path begins with."""
        match name:
            case "payload":
                return self.payload
            case "metrics":
                return self.metrics
            case "device":
                return {"id": self.device_id, "attributes": dict(self.attributes)}
            case "tenant":
                return self.tenant_id
            case "ts":
                return self.ts_ms
            case "msg_type":
                return self.message_type.value
        return self.source

    def find(self, path: Path) -> Json | Mapping[str, Json] | msgspec.UnsetType:
        """What `path` leads to, or MISSING."""
        first, *rest = path
        value = self.root(str(first))
        for step in rest:
            if isinstance(step, str):
                if not isinstance(value, Mapping) or step not in value:
                    return MISSING
                value = value[step]
            else:
                if not isinstance(value, list) or step >= len(value):
                    return MISSING
                value = value[step]
        return value


def read_path(text: str, *, field: str) -> Path:
    """The steps of a path; Refusal INVALID_REQUEST that names `field` where it is none."""
    root = _ROOT.match(text)
    if len(text) > PATH_LENGTH_MAX or root is None or root[0] not in ROOTS:
        message = f"{text[:64]!r}: a path begins with one of {', '.join(sorted(ROOTS))}"
        raise Refusal(Reason.INVALID_REQUEST, message, field=field)
    path: list[str | int] = [root[0]]
    at = root.end()
    while at < len(text):
        step = _STEP.match(text, at)
        if step is None:
            message = f'{text[:64]!r} is no path: .name, ["any name"] or [0] is expected after {text[:at][-32:]!r}'
            raise Refusal(Reason.INVALID_REQUEST, message, field=field)
        path.append(step[1] or (int(step[2]) if step[2] else _quoted(step[3], field)))
        at = step.end()
    return tuple(path)


def _quoted(text: str, field: str) -> str:
    try:
        return msgspec.json.decode(text, type=str)
    except msgspec.DecodeError as error:
        raise Refusal(Reason.INVALID_REQUEST, f"{text} is no JSON string", field=field) from error
