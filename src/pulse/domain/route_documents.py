"""What is said of routes to people and programs: by the control API, and by the command line with `--json`."""

from __future__ import annotations

from typing import Any

import msgspec

from pulse.domain.route import Route, Webhook
from pulse.domain.stored_route import RouteAttempt, RouteHealth, StoredRoute


def document(stored: StoredRoute) -> dict[str, Any]:
    """The route: all but its secrets and the values of its headers, of which it names the names."""
    route = stored.route
    signed = stored.signed_since is not None
    return {
        "route_id": route.route_id,
        **settable(route),
        "revision": route.revision,
        "disabled_reason": stored.disabled_reason,
        "signing": {"since": stored.signed_since, "previous_until": stored.previous_secret_until} if signed else None,
        "created_at": stored.created_at,
        "updated_at": stored.updated_at,
    }


def settable(route: Route) -> dict[str, Any]:
    """What can be set, with defaults spelled out; of headers only `header_names`."""
    match, devices = route.match, route.match.devices
    return {
        "name": route.name,
        "enabled": route.enabled,
        "match": {
            "message_types": [str(each) for each in match.message_types],
            "devices": {"ids": list(devices.ids), "prefix": devices.prefix, "attributes": dict(devices.attributes)},
            "expression": match.expression,
        },
        "destination": _destination(route),
        "template": route.template,
        "rate": None if route.rate is None else msgspec.structs.asdict(route.rate),
        "ordered": route.ordered,
    }


def _destination(route: Route) -> dict[str, Any]:
    to = route.destination
    if isinstance(to, Webhook):
        return {"kind": "webhook", "url": to.url, "header_names": sorted(to.headers), "timeout_s": to.timeout_s}
    return {"kind": "mqtt", "topic": to.topic}


def attempt_document(attempt: RouteAttempt) -> dict[str, Any]:
    """One attempt."""
    return msgspec.structs.asdict(attempt)


def health_document(health: RouteHealth | None) -> dict[str, Any] | None:
    """How a destination is."""
    return None if health is None else msgspec.structs.asdict(health)
