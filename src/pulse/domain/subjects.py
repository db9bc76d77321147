"""Subjects of the four streams: `telemetry.{tenant_id}`, `shadow.…`, `commands.…`, `routes.…`."""

from __future__ import annotations

from enum import StrEnum


class MessageType(StrEnum):
    """What a device can send; the last part of its HTTP path and of its MQTT topic."""

    TELEMETRY = "telemetry"
    HEARTBEAT = "heartbeat"


SUBJECT_PREFIX = {MessageType.TELEMETRY: "telemetry", MessageType.HEARTBEAT: "telemetry"}


def subject_for(message_type: MessageType, tenant_id: str) -> str:
    """The subject that carries `message_type` of one tenant; heartbeats travel with telemetry."""
    return f"{SUBJECT_PREFIX[message_type]}.{tenant_id}"


def tenant_of(subject: str) -> str:
    """The tenant that a subject names: all behind its first dot, which need not be a valid id."""
    return subject.partition(".")[2]
