"""What may be asked of a device, or of many: a command's name and payload, and how long it has.

`ttl_s` is how long it is sent to a device that has not answered, `timeout_s` how long a device that has acknowledged it
has for its result; what is not said is as the settings have it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from pulse.domain.command import NewCommand, storable_json
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.fleet import Filter, NewFleet
from pulse.domain.json_text import check_storable, read_json

NAME_PATTERN = "[A-Za-z0-9_.-]{1,64}"
KEY_PATTERN = r"[\x21-\x7e]{1,128}"
SECONDS_MIN = 1.0
PAYLOAD_DEPTH_MAX = 32
"""Objects and arrays within one another."""

_NAME = re.compile(NAME_PATTERN)
_KEY = re.compile(KEY_PATTERN)
_filters = msgspec.json.Decoder(Filter)


class CommandBounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a command may be; `command_ttl_s` and `command_timeout_s` hold where nothing is said."""

    command_payload_bytes_max: int
    command_ttl_s: float
    command_ttl_s_max: float
    command_timeout_s: float
    command_timeout_s_max: float


class Asked(NamedTuple):
    """What is asked, not checked yet; `payload` is any JSON, read."""

    name: str
    payload: object
    ttl_s: float | None = None
    timeout_s: float | None = None
    idempotency_key: str | None = None


def new_command(asked: Asked, *, tenant_id: str, device_id: str, ordered: bool, bounds: CommandBounds) -> NewCommand:
    """The command for one device. Raises Refusal with the path of what is at fault, LimitExceeded with the bound."""
    ttl_ms, timeout_ms = _times(asked, bounds)
    return NewCommand(
        tenant_id=tenant_id,
        device_id=device_id,
        name=_checked_name(asked.name),
        payload=_checked_payload(asked.payload, bounds),
        ttl_ms=ttl_ms,
        timeout_ms=timeout_ms,
        ordered=ordered,
        idempotency_key=_checked_key(asked.idempotency_key),
    )


def new_fleet(asked: Asked, *, tenant_id: str, wanted: Filter, bounds: CommandBounds) -> NewFleet:
    """The command for each device that `wanted` holds for. Raises what `new_command` does."""
    ttl_ms, timeout_ms = _times(asked, bounds)
    return NewFleet(
        tenant_id=tenant_id,
        name=_checked_name(asked.name),
        payload=_checked_payload(asked.payload, bounds),
        ttl_ms=ttl_ms,
        timeout_ms=timeout_ms,
        filter=_checked_filter(wanted),
        idempotency_key=_checked_key(asked.idempotency_key),
    )


def _times(asked: Asked, bounds: CommandBounds) -> tuple[int, int]:
    """ttl and timeout, in ms."""
    return (
        _milliseconds(asked.ttl_s, bounds.command_ttl_s, bounds.command_ttl_s_max, "ttl_s"),
        _milliseconds(asked.timeout_s, bounds.command_timeout_s, bounds.command_timeout_s_max, "timeout_s"),
    )


def _milliseconds(given: float | None, default: float, most: float, field: str) -> int:
    seconds = default if given is None else given
    if not seconds >= SECONDS_MIN:
        raise Refusal(Reason.INVALID_REQUEST, f"must be {SECONDS_MIN:g} or more", field=field)
    if seconds > most:
        raise LimitExceeded(
            Reason.INVALID_REQUEST,
            f"may be {most:.10g} at the most",
            limit=f"command_{field}_max",
            value=most,
            field=field,
        )
    return round(seconds * 1000)


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise Refusal(Reason.INVALID_REQUEST, "must be 1 to 64 of A-Z a-z 0-9 _ . -", field="name")
    return name


def _checked_payload(payload: object, bounds: CommandBounds) -> bytes:
    check_storable(payload, "payload", depth_max=PAYLOAD_DEPTH_MAX, limit="command_payload_depth_max")
    return storable_json(msgspec.json.encode(payload), field="payload", bytes_max=bounds.command_payload_bytes_max)


def _checked_filter(wanted: Filter) -> Filter:
    """As the store will read it again: whoever made it may have done so without its type's bounds."""
    wanted.check()
    check_storable(wanted.attributes, "filter.attributes", depth_max=1, limit="")
    try:
        return read_json(_filters, msgspec.json.encode(wanted))
    except Refusal as refusal:
        refusal.field = f"filter.{refusal.field}"
        raise


def _checked_key(key: str | None) -> str | None:
    if key is not None and not _KEY.fullmatch(key):
        raise Refusal(Reason.INVALID_REQUEST, "may have 1 to 128 visible ASCII characters", field="idempotency_key")
    return key
