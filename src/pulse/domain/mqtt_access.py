"""What a device may do at an MQTT broker: one decision for every broker that asks.

    user name   {tenant_id}/{device_id}              password   the device's token
    client id   the user name
    publishes   tenant/{tenant_id}/device/{device_id}/ and what `domain.topics` lists: telemetry, shadow/update, …
    subscribes  tenant/{tenant_id}/device/{device_id}/ and what DOWN lists: commands, shadow/update/delta, …
                tenant/{tenant_id}/route/# or any part of it: what routes of its tenant republish

A broker knows sessions by their client id alone: who comes with another one's ends his session and has his queue
thrown away. That is why a client id has to be the device's own. And it is one, and the topics are a few and named one
by one, because a broker keeps something for each session, each filter and each retained topic: without that, one
device could fill a store that is everybody's. So named shadows, whose names are the device's to choose, are only where
a broker bounds that by itself (EMQX: nothing is retained, a session has so many filters); elsewhere they go by HTTP.
"""

from __future__ import annotations

import re
from enum import StrEnum

from pulse.domain.errors import Refusal
from pulse.domain.identity import ID_PATTERN, Device, digest
from pulse.domain.registry import Record
from pulse.domain.topics import NAME, UPWARD, parse_topic

UP = tuple(kind for kind in UPWARD if NAME not in kind)
"""What a device publishes to, below its own prefix."""
UP_NAMED = tuple(kind.replace(NAME, "+") for kind in UPWARD if NAME in kind)
"""The same of named shadows."""
DOWN = (
    "commands",
    "commands/ack/rejected",
    "shadow/update/accepted",
    "shadow/update/rejected",
    "shadow/update/delta",
    "shadow/get/accepted",
    "shadow/get/rejected",
)
"""What a device subscribes to, below its own prefix."""
DOWN_NAMED = tuple(topic.replace("shadow/", "shadow/name/+/", 1) for topic in DOWN if topic.startswith("shadow/"))
"""The same of named shadows."""

_USER_NAME = re.compile(rf"({ID_PATTERN})/({ID_PATTERN})")
_SHARED = re.compile(r"\A\$share/[^/+#]+/")
_ROUTE_TOPIC = re.compile(rf"tenant/{ID_PATTERN}/route(/[A-Za-z0-9_-]{{1,64}}){{1,8}}")
_DEVICE_TOPIC = re.compile(rf"tenant/({ID_PATTERN})/device/({ID_PATTERN})/.+")


BRIDGE_DOWN = ("tenant/#",)
"""Filters that contain all that our own user may subscribe to."""


class Action(StrEnum):
    """What a client asks to do with a topic; the words of EMQX."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"


class Denial(StrEnum):
    """Why a connection was refused; for us to count, never for the client to read."""

    NOT_READY = "not_ready"
    CREDENTIALS = "credentials"
    CLIENT_ID = "client_id"
    CERTIFICATE = "certificate"
    PROTOCOL = "protocol"


def device_of(user_name: str) -> tuple[str, str] | None:
    """(tenant_id, device_id) of a device's user name; None of any other."""
    found = _USER_NAME.fullmatch(user_name)
    return (found[1], found[2]) if found else None


def user_name(tenant_id: str, device_id: str) -> str:
    """What the device calls itself at a broker."""
    return f"{tenant_id}/{device_id}"


def prefix(tenant_id: str, device_id: str) -> str:
    """What every topic of the device begins with; ends in a slash."""
    return f"tenant/{tenant_id}/device/{device_id}/"


def up_filters(tenant_id: str, device_id: str, *, named: bool) -> list[str]:
    """Topic filters that contain all that the device may publish to; of `named` shadows too, under any name."""
    return [prefix(tenant_id, device_id) + kind for kind in (UP + UP_NAMED if named else UP)]


def down_filters(tenant_id: str, device_id: str, *, named: bool) -> list[str]:
    """Topic filters that contain all that the device may subscribe to; of `named` shadows too, under any name."""
    own = [prefix(tenant_id, device_id) + topic for topic in (DOWN + DOWN_NAMED if named else DOWN)]
    return [*own, route_filter(tenant_id)]


def route_filter(tenant_id: str) -> str:
    """All that the routes of a tenant republish. Whoever makes a route to a topic says it to all of these devices."""
    return f"tenant/{tenant_id}/route/#"


def bridge_up_filters() -> list[str]:
    """Topic filters that contain all that our own user at a broker may publish to: for devices, and of routes."""
    return [*(prefix("+", "+") + topic for topic in DOWN + DOWN_NAMED), "tenant/+/route/#"]


def is_own_client_id(tenant_id: str, device_id: str, client_id: str) -> bool:
    """Whether it is the one session that the device has."""
    return client_id == user_name(tenant_id, device_id)


def may(tenant_id: str, device_id: str, action: Action, topic: str) -> bool:
    """Whether the device may do that, where named shadows are; `topic` is a topic filter where it subscribes."""
    if action is Action.PUBLISH:
        try:
            found = parse_topic(topic)
        except Refusal:
            return False
        return (found.tenant_id, found.device_id) == (tenant_id, device_id)
    return any(contains(allowed, topic) for allowed in down_filters(tenant_id, device_id, named=True))


def contains(outer: str, inner: str) -> bool:
    """Whether every topic that the filter `inner` matches is matched by the filter `outer`."""
    outer_levels, inner_levels = outer.split("/"), inner.split("/")
    if outer_levels[-1] == "#":
        outer_levels.pop()
        inner_levels = inner_levels[: len(outer_levels)]  # what is below is all the same
    return len(outer_levels) == len(inner_levels) and all(
        theirs == ours or (ours == "+" and theirs != "#")
        for ours, theirs in zip(outer_levels, inner_levels, strict=True)
    )


def bridge_may(action: Action, topic: str) -> bool:
    """Whether our own user at a broker may do that: hear all that devices say, and say what they listen to, or what
    routes republish.

    `topic` of a subscription may be a shared one, `$share/{group}/{filter}`.
    """
    if action is Action.SUBSCRIBE:
        return _SHARED.sub("", topic, count=1).startswith("tenant/")
    if _ROUTE_TOPIC.fullmatch(topic):
        return True
    found = _DEVICE_TOPIC.fullmatch(topic)
    is_name = found is not None and not any(wildcard in topic for wildcard in "+#")
    return found is not None and is_name and may(found[1], found[2], Action.SUBSCRIBE, topic)


def session_end_ms(device: Device, token: str, *, now_ms: int, longest_ms: int) -> int:
    """When a session that begins now has to prove itself anew: after `longest_ms`, or when its token ends."""
    presented = digest(token)
    ends = [each.expires_at_ms for each in device.tokens if each.digest == presented and each.expires_at_ms is not None]
    return min([now_ms + longest_ms, *ends])


def takes_away(before: Record | None, after: Record | None, now_ms: int) -> bool:
    """Whether somebody who was let in as `before` may have to go, now that it is `after`.

    A token that is gone or ends earlier counts, one that has expired or is new does not. Who is sent away and may come
    back, comes back.
    """
    if before is None:
        return False
    if after is None or (before.enabled and not after.enabled):
        return before.enabled
    if not isinstance(before, Device) or not isinstance(after, Device):
        return False
    ends = {token.digest: token.expires_at_ms for token in after.tokens}
    alive = [token for token in before.tokens if token.expires_at_ms is None or now_ms < token.expires_at_ms]
    return any(token.digest not in ends or _earlier(ends[token.digest], token.expires_at_ms) for token in alive)


def _earlier(end_ms: int | None, than_ms: int | None) -> bool:
    return end_ms is not None and (than_ms is None or end_ms < than_ms)
