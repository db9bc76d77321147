"""What is said of shadows: to devices on their topics, and to whoever asks the control API.

    …/update/accepted   {"state": the sections that were asked for, "version", "timestamp", "clientToken"}
    …/update/rejected   {"code", "message", "version" after a conflict, "timestamp", "clientToken"}
    …/update/delta      {"state": delta, "metadata": when each was desired, "version", "timestamp"}
    …/get/accepted      {"state": {"desired", "reported", "delta"}, "metadata", "version", "timestamp", "clientToken"}
    …/get/rejected      as update/rejected

The topics are below `tenant/{t}/device/{d}/shadow`, or `…/shadow/name/{name}` of a named shadow. Times are in ms since
the epoch. A delta is said whenever an accepted update leaves one that is not the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from pulse.domain.downward import Downward
from pulse.domain.errors import Reason, Refusal, VersionConflict
from pulse.domain.shadow import Shadow, ShadowKey, Update, same
from pulse.domain.shadow_merge import Object, Times

CODES = {
    Reason.INVALID_JSON: 400,
    Reason.NOT_FOUND: 404,
    Reason.CONFLICT: 409,
    Reason.TOO_LARGE: 413,
    Reason.INVALID_PAYLOAD: 422,
}
"""The HTTP status that says the same."""

_encode = msgspec.json.Encoder().encode


def updated(key: ShadowKey, update: Update, before: Shadow, after: Shadow) -> list[Downward]:
    """What the device hears after an update was accepted."""
    said = [_said(key, "update/accepted", _answer(after, update.client_token, state=update.patch))]
    return said + announced(key, before, after)


def announced(key: ShadowKey, before: Shadow, after: Shadow) -> list[Downward]:
    """The delta, where a change has left one that is not the one before."""
    left = after.delta
    if not left or same(left, before.delta):
        return []
    metadata = _restricted(after.desired.times, left)
    return [_said(key, "update/delta", _answer(after, UNSET, state=left, metadata=metadata))]


def asked(key: ShadowKey, shadow: Shadow, client_token: str | UnsetType) -> Downward:
    """The answer to a device that asks for its shadow."""
    if not shadow.exists:
        return rejected(
            key, "get", Refusal(Reason.NOT_FOUND, "there is no such shadow"), client_token, shadow.updated_ms
        )
    return _said(key, "get/accepted", document(shadow) | _token(client_token))


def rejected(key: ShadowKey, what: str, refusal: Refusal, client_token: str | UnsetType, at_ms: int) -> Downward:
    """What a device hears that asked for something that cannot be; `what` is `update` or `get`."""
    where = f"{refusal.field}: " if refusal.field else ""
    answer: dict[str, object] = {"code": CODES.get(refusal.reason, 400), "message": where + refusal.message}
    if isinstance(refusal, VersionConflict):
        answer["version"] = refusal.version
    return _said(key, f"{what}/rejected", answer | {"timestamp": at_ms} | _token(client_token))


def document(shadow: Shadow) -> dict[str, Any]:
    """The whole shadow."""
    state = {"desired": shadow.desired.state, "reported": shadow.reported.state, "delta": shadow.delta}
    metadata = {"desired": shadow.desired.times, "reported": shadow.reported.times}
    return _answer(shadow, UNSET, state=state, metadata=metadata)


def _said(key: ShadowKey, what: str, document: Mapping[str, object]) -> Downward:
    topic = f"shadow/name/{key.name}/{what}" if key.name else f"shadow/{what}"
    return Downward(key.tenant_id, key.device_id, topic, _encode(document))


def _answer(shadow: Shadow, client_token: str | UnsetType, **parts: object) -> dict[str, Any]:
    return {**parts, "version": shadow.version, "timestamp": shadow.updated_ms, **_token(client_token)}


def _token(client_token: str | UnsetType) -> dict[str, object]:
    return {} if client_token is UNSET else {"clientToken": client_token}


def _restricted(times: Times, wanted: Object) -> Times:
    """Those of `times` that belong to what `wanted` names."""
    restricted: dict[str, int | Times] = {}
    for name, value in wanted.items():
        since = times[name]
        if isinstance(since, Mapping) and isinstance(value, Mapping):
            restricted[name] = _restricted(since, value)
        else:
            restricted[name] = since
    return restricted
