"""The MQTT topics of devices: `tenant/{tenant_id}/device/{device_id}/` and what a device has to say.

telemetry   heartbeat
shadow/update  shadow/reported  shadow/get             `reported` is an update that names nothing else
shadow/name/{name}/update|reported|get                 the same, of a named shadow
commands/ack
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import check_device_id, check_tenant_id, is_id
from pulse.domain.subjects import MessageType

NAME = "{name}"
"""Stands in a kind for the level that names a shadow; its grammar is that of ids."""


class Upward(NamedTuple):
    """What becomes of one kind: its message type, and the stream that it, or its dead letter, goes to.

    An update that is `reported_only` may say what is reported, and nothing else.
    """

    message_type: MessageType
    stream: str
    subject_prefix: str
    reported_only: bool = False


_UPDATE, _GET = Upward(MessageType.SHADOW, "SHADOW", "shadow"), Upward(MessageType.SHADOW_GET, "SHADOW", "shadow")
_REPORTED = _UPDATE._replace(reported_only=True)
UPWARD = {
    "telemetry": Upward(MessageType.TELEMETRY, "TELEMETRY", "telemetry"),
    "heartbeat": Upward(MessageType.HEARTBEAT, "TELEMETRY", "telemetry"),
    "shadow/update": _UPDATE,
    "shadow/reported": _REPORTED,
    "shadow/get": _GET,
    f"shadow/name/{NAME}/update": _UPDATE,
    f"shadow/name/{NAME}/reported": _REPORTED,
    f"shadow/name/{NAME}/get": _GET,
    "commands/ack": Upward(MessageType.COMMANDS_ACK, "COMMANDS", "commands"),
}
FILTERS = tuple(f"tenant/+/device/+/{kind.replace(NAME, '+')}" for kind in UPWARD)
"""What to subscribe to for all that devices say, and for nothing that is said to them."""


class Topic(msgspec.Struct, frozen=True, gc=False):
    """A device's topic: `kind` is a key of UPWARD, `shadow_name` empty where it names no shadow."""

    tenant_id: str
    device_id: str
    kind: str
    shadow_name: str = ""


def parse_topic(topic: str) -> Topic:
    """Take apart a topic name that a device published to.

    Raises Refusal: INVALID_IDENTITY that names the level at fault where an id or name is none, INVALID_TOPIC where it
    is no topic of ours.
    """
    levels = topic.split("/")
    if len(levels) < 5 or levels[0] != "tenant" or levels[2] != "device":
        raise _no_topic("tenant/{tenant_id}/device/{device_id}/… is expected")
    tenant_id, device_id, said = levels[1], levels[3], levels[4:]
    shadow_name = ""
    is_named = len(said) == 4 and said[1] == "name"
    if is_named:
        shadow_name, said[2] = said[2], NAME
    kind = "/".join(said)
    if kind not in UPWARD:
        raise _no_topic("a device publishes to " + ", ".join(UPWARD))
    check_tenant_id(tenant_id)
    check_device_id(device_id)
    if is_named and not is_id(shadow_name):
        raise Refusal(Reason.INVALID_IDENTITY, "a shadow's name must be 1 to 64 of A-Z a-z 0-9 _ -", field="name")
    return Topic(tenant_id, device_id, kind, shadow_name)


def identity_in(topic: str) -> tuple[str | None, str | None]:
    """The ids that stand in `topic`, each None where there is none: for what is not a topic of ours otherwise."""
    levels = [*topic.split("/"), "", "", "", ""]
    if levels[0] != "tenant":
        return None, None
    device_id = levels[3] if levels[2] == "device" and is_id(levels[3]) else None
    return (levels[1] if is_id(levels[1]) else None), device_id


def _no_topic(message: str) -> Refusal:
    return Refusal(Reason.INVALID_TOPIC, message, field="topic")
