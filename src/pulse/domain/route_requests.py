"""What a sender may ask about routes: make one, patch it, or put another in its place; checked, with paths.

A patch is a JSON Merge Patch (RFC 7396) of what the sender may set. Values of headers are never told, so those that a
change does not name stay as they are, and null removes one. They may hold passwords: where a webhook goes to another
destination they have to be given again, or whoever may change a route could have them sent to himself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pulse.domain.errors import LimitExceeded, Reason, Refusal, VersionConflict
from pulse.domain.json_text import read_json
from pulse.domain.route import Route, Webhook, check_route
from pulse.domain.webhook_url import Allowed, read_webhook_url

SETTABLE = ("name", "match", "destination", "template", "enabled", "rate", "ordered")
ROUTE_ID_BYTES = 8
PATCH_DEPTH_MAX = 16

_routes = msgspec.json.Decoder(Route)
_encoder = msgspec.json.Encoder()


def new_route(asked: Mapping[str, Any], *, tenant_id: str, route_id: str, allowed: Allowed) -> Route:
    """The route that is asked for. Raises Refusal with the path of what is at fault."""
    return _checked(_read(asked, tenant_id=tenant_id, route_id=route_id, revision=1), allowed)


def patched(route: Route, patch: Mapping[str, Any], *, allowed: Allowed) -> Route:
    """`route` after a merge patch; `destination` is taken whole where its kind is another one."""
    before = _settable(route)
    destination = patch.get("destination")
    if (
        isinstance(destination, dict)
        and destination.get("kind", before["destination"]["kind"]) != (before["destination"]["kind"])
    ):
        before["destination"] = {}
    return _changed(route, _merged(before, patch, depth=0), allowed)


def replaced(route: Route, asked: Mapping[str, Any], *, allowed: Allowed) -> Route:
    """What is asked for in place of `route`; but the values of headers that it does not name."""
    wanted = dict(asked)
    destination, before = wanted.get("destination"), _settable(route)["destination"]
    if isinstance(destination, dict) and destination.get("kind") == before["kind"] == "webhook":
        given = destination.get("headers", {})
        if isinstance(given, dict):
            wanted["destination"] = {**destination, "headers": _merged(before.get("headers", {}), given, depth=0)}
    return _changed(route, wanted, allowed)


def check_revision(route: Route, expected: int | None) -> None:
    """Raise VersionConflict where a change was meant for another revision; None is whichever there is."""
    if expected is not None and route.revision != expected:
        raise VersionConflict(route.revision, what="route")


def with_enabled(route: Route, enabled: bool) -> Route:
    """The same route, taking messages or not."""
    return msgspec.structs.replace(route, enabled=enabled)


def masked(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for as the log of changes may keep it: without the values of headers."""
    destination = asked.get("destination")
    headers = destination.get("headers") if isinstance(destination, Mapping) else None
    if not isinstance(destination, Mapping) or not isinstance(headers, Mapping):
        return dict(asked)
    names = {name: None if value is None else "********" for name, value in headers.items()}
    return {**asked, "destination": {**destination, "headers": names}}


def _changed(before: Route, asked: Mapping[str, Any], allowed: Allowed) -> Route:
    read = _read(asked, tenant_id=before.tenant_id, route_id=before.route_id, revision=before.revision)
    after = _checked(read, allowed)
    old, new = before.destination, after.destination
    if isinstance(old, Webhook) and isinstance(new, Webhook):
        kept = [name for name, value in new.headers.items() if old.headers.get(name) == value]
        if kept and _destination(old.url) != _destination(new.url):
            message = f"give the value of {kept[0]} again, or null: it was meant for another destination"
            raise Refusal(Reason.INVALID_REQUEST, message, field=f"destination.headers.{kept[0]}")
    return after


def _destination(url: str) -> object:
    """Scheme, host and port; a URL that is no longer allowed is like no other."""
    try:
        return read_webhook_url(url, allowed=_ANYWHERE).destination
    except Refusal:
        return url


_ANYWHERE = Allowed(ports=frozenset(range(65_536)))


def _settable(route: Route) -> dict[str, Any]:
    """All that a sender may set, as JSON has it."""
    whole: dict[str, Any] = msgspec.json.decode(_encoder.encode(route))
    return {name: whole[name] for name in SETTABLE}


def _read(asked: Mapping[str, Any], **ours: str | int) -> Route:
    for name in asked:
        if name not in SETTABLE:
            raise Refusal(Reason.INVALID_REQUEST, f"may be one of {', '.join(SETTABLE)}", field=name)
    try:
        return read_json(_routes, _encoder.encode({**asked, **ours}))
    except Refusal as refusal:
        refusal.reason = Reason.INVALID_REQUEST
        raise


def _checked(route: Route, allowed: Allowed) -> Route:
    """What is too large is a part of the request here, and not the request itself."""
    try:
        return check_route(route, allowed=allowed)
    except LimitExceeded as exceeded:
        exceeded.reason = Reason.INVALID_REQUEST
        raise


def _merged(value: object, patch: object, *, depth: int) -> Any:
    """RFC 7396."""
    if depth > PATCH_DEPTH_MAX:
        raise LimitExceeded(
            Reason.TOO_LARGE, "is nested too deeply", limit="route_patch_depth_max", value=PATCH_DEPTH_MAX
        )
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(value) if isinstance(value, Mapping) else {}
    for name, inner in patch.items():
        if inner is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), inner, depth=depth + 1)
    return merged
