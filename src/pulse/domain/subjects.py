"""Subjects of the four streams: `telemetry.{tenant_id}`, `shadow.…`, `commands.…`, `routes.…`."""

from __future__ import annotations

from enum import StrEnum


class MessageType(StrEnum):
    """What an envelope holds."""

    TELEMETRY = "telemetry"
    HEARTBEAT = "heartbeat"
    SHADOW = "shadow"
    """An update of a shadow."""
    SHADOW_GET = "shadow-get"
    COMMANDS_ACK = "commands-ack"
    """A device's answer to a command."""
    COMMANDS_SENT = "commands-sent"
    """Our own word, never a device's: a command has left for its device."""


SUBJECT_PREFIX = {
    MessageType.TELEMETRY: "telemetry",
    MessageType.HEARTBEAT: "telemetry",
    MessageType.SHADOW: "shadow",
    MessageType.SHADOW_GET: "shadow",
    MessageType.COMMANDS_ACK: "commands",
    MessageType.COMMANDS_SENT: "commands",
}


def subject_for(message_type: MessageType, tenant_id: str) -> str:
    """The subject that carries `message_type` of one tenant; heartbeats travel with telemetry."""
    return f"{SUBJECT_PREFIX[message_type]}.{tenant_id}"


def tenant_of(subject: str) -> str:
    """The tenant that a subject names: all behind its first dot, which need not be a valid id."""
    return subject.partition(".")[2]
