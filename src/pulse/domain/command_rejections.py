"""What a device hears of an answer to a command that cannot be taken: `commands/ack/rejected`.

    {"code", "message", "commandId" where the answer names one, "timestamp"}

    it cannot be read                              400, 413, 422   over MQTT, from the edge; by HTTP it is the status
    the device has no such command                 404             never tells whether another device has it
    the command has ended, and not as it says      409             expired, timed out, cancelled; or its other last word

An answer that comes again, or after one that is further on, moves nothing and is not rejected: at least once, and in
any order, is how answers come. `timestamp` is in ms since the epoch.
"""

from __future__ import annotations

import msgspec

from pulse.domain.command import ANSWERS, CommandId, Event, State, after
from pulse.domain.downward import ACK_REJECTED, Downward
from pulse.domain.errors import Reason, Refusal
from pulse.domain.shadow_documents import CODES

_ENDED_BY_DEVICE = frozenset({State.SUCCEEDED, State.FAILED, State.REJECTED})


class _Named(msgspec.Struct, rename="camel"):
    command_id: CommandId


_decode_named = msgspec.json.Decoder(_Named).decode


def named_command(payload: bytes) -> str | None:
    """The command that an answer names, if `payload` can be read so far."""
    try:
        return _decode_named(payload).command_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def unknown_command(device_id: str, command_id: str) -> Refusal:
    """The same for a command of nobody and for one of another device."""
    return Refusal(Reason.UNKNOWN_COMMAND, f"device {device_id!r} has no command {command_id!r}")


def contradiction(state: State, event: Event) -> Refusal | None:
    """Why an answer to a command in `state` is rejected, though it is of its device; None where it is not."""
    if event not in ANSWERS.values() or not state.final:
        return None
    is_repeated = after(State.SENT, event) is state
    is_overtaken = event is Event.ACKNOWLEDGE and state in _ENDED_BY_DEVICE
    if is_repeated or is_overtaken:
        return None
    return Refusal(Reason.CONFLICT, f"the command has ended: {state}")


def rejected(tenant_id: str, device_id: str, command_id: str | None, refusal: Refusal, *, at_ms: int) -> Downward:
    """What the device hears of its answer to `command_id`."""
    code = 404 if refusal.reason is Reason.UNKNOWN_COMMAND else CODES.get(refusal.reason, 400)
    where = f"{refusal.field}: " if refusal.field else ""
    named = {} if command_id is None else {"commandId": command_id}
    document = {"code": code, "message": where + refusal.message, **named, "timestamp": at_ms}
    return Downward(tenant_id, device_id, ACK_REJECTED, msgspec.json.encode(document))
