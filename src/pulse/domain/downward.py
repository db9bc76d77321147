"""What Pulse says to a device, whichever way it gets there.

On its way it is a message on `down.{tenant_id}.{device_id}.{topic}`, where the slashes of the topic are dots, as
nats-server's own MQTT listener has them; none of the topics has a dot.
"""

from __future__ import annotations

import msgspec

from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import is_id

PREFIX = "down"
COMMANDS = "commands"
"""The topic of commands."""
ACK_REJECTED = "commands/ack/rejected"
"""The topic of answers to commands that cannot be taken."""


class Downward(msgspec.Struct, frozen=True, gc=False):
    """One message to a device: `topic` is below `tenant/{tenant_id}/device/{device_id}/`, `body` is JSON."""

    tenant_id: str
    device_id: str
    topic: str
    body: bytes

    @property
    def full_topic(self) -> str:
        """The MQTT topic."""
        return f"tenant/{self.tenant_id}/device/{self.device_id}/{self.topic}"

    @property
    def kind(self) -> str:
        """`shadow` or `commands`: what it is about, and which role's postman takes it."""
        return self.topic.partition("/")[0]


def downward_subject(message: Downward) -> str:
    """The subject that carries `message`."""
    return f"{PREFIX}.{message.tenant_id}.{message.device_id}.{message.topic.replace('/', '.')}"


def read_downward(subject: str, body: bytes) -> Downward:
    """The message that `subject` carries; Refusal INVALID_SUBJECT where it is none of ours."""
    prefix, *rest = subject.split(".")
    if prefix != PREFIX or len(rest) < 3 or not all(map(is_id, rest)):
        raise Refusal(Reason.INVALID_SUBJECT, f"{subject!r} is not down.{{tenant_id}}.{{device_id}}.…")
    return Downward(rest[0], rest[1], "/".join(rest[2:]), body)


class _Command(msgspec.Struct, frozen=True, rename="camel"):
    command_id: str


_decode_command = msgspec.json.Decoder(_Command).decode


def sent_report(message: Downward) -> bytes:
    """What is said to COMMANDS once this command has left for its device: the payload of a `commands-sent`.

    Raises Refusal INVALID_PAYLOAD where the body names no command.
    """
    try:
        return report_of(_decode_command(message.body).command_id)
    except msgspec.DecodeError as error:
        raise Refusal(Reason.INVALID_PAYLOAD, "names no command", field="commandId") from error


def report_of(command_id: str) -> bytes:
    """The payload of a `commands-sent`."""
    return msgspec.json.encode({"commandId": command_id})
