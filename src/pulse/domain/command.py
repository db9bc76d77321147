"""The life of a command: a table of who may move it where.

                  SEND      ACKNOWLEDGE   SUCCEED    FAIL    REJECT    EXPIRE    TIME_OUT   CANCEL
    queued        sent      acknowledged  succeeded  failed  rejected  expired   –          cancelled
    sent          sent      acknowledged  succeeded  failed  rejected  expired   –          cancelled
    acknowledged  –         acknowledged  succeeded  failed  rejected  –         timed_out  cancelled
    the others are final: nothing moves them

SEND is ours, when the command has left for its device, and again each time a device comes back that has not answered.
A device may answer a command that was never noted as sent: it got it just before we died. EXPIRE is the end of the time
to live, which is for being heard of; TIME_OUT is the end of the time that a device has from there to its result.
Source: the states of AWS IoT commands, and of ThingsBoard's persistent RPC, under names of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pulse.domain.downward import COMMANDS, Downward
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.identity import ID_PATTERN
from pulse.domain.json_text import check_storable, read_json


class State(StrEnum):
    """Where a command stands; the value is the contract."""

    QUEUED = "queued"
    SENT = "sent"
    ACKNOWLEDGED = "acknowledged"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REJECTED = "rejected"
    EXPIRED = "expired"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing can move it any more."""
        return self in FINAL


class Event(StrEnum):
    """What can happen to a command."""

    SEND = "send"
    ACKNOWLEDGE = "acknowledge"
    SUCCEED = "succeed"
    FAIL = "fail"
    REJECT = "reject"
    EXPIRE = "expire"
    TIME_OUT = "time_out"
    CANCEL = "cancel"


_UNHEARD = {
    Event.SEND: State.SENT,
    Event.ACKNOWLEDGE: State.ACKNOWLEDGED,
    Event.SUCCEED: State.SUCCEEDED,
    Event.FAIL: State.FAILED,
    Event.REJECT: State.REJECTED,
    Event.EXPIRE: State.EXPIRED,
    Event.CANCEL: State.CANCELLED,
}
_HEARD = {
    Event.ACKNOWLEDGE: State.ACKNOWLEDGED,
    Event.SUCCEED: State.SUCCEEDED,
    Event.FAIL: State.FAILED,
    Event.REJECT: State.REJECTED,
    Event.TIME_OUT: State.TIMED_OUT,
    Event.CANCEL: State.CANCELLED,
}
TABLE = {State.QUEUED: _UNHEARD, State.SENT: _UNHEARD, State.ACKNOWLEDGED: _HEARD}
FINAL = frozenset(State) - TABLE.keys()
OPEN = tuple(TABLE)
"""The states that something can still come after."""


def after(state: State, event: Event) -> State | None:
    """The state that `event` moves a command in `state` to; None where it moves nothing."""
    return TABLE.get(state, {}).get(event)


ANSWERS = {
    "acknowledged": Event.ACKNOWLEDGE,
    "succeeded": Event.SUCCEED,
    "failed": Event.FAIL,
    "rejected": Event.REJECT,
}
"""What a device can say of a command, and the event that it is."""

DEVICE = "device"
PULSE = "pulse"
"""Who moves a command, beside those who have an API key, and go by its name."""
COMMAND_DEPTH_MAX = 32
"""Objects and arrays within one another, of a payload and of a result."""

CommandId = Annotated[str, Meta(pattern=rf"^{ID_PATTERN}\Z")]


class NewCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command as it is asked for; `payload` is JSON, checked by `storable_json`.

    It is sent for `ttl_ms`, and once acknowledged its device has `timeout_ms` for its result. Of the `ordered` ones of
    a device and name only the oldest that is open is sent. A repetition under the same `idempotency_key` makes none.
    """

    tenant_id: str
    device_id: str
    name: str
    payload: bytes
    ttl_ms: int
    timeout_ms: int
    ordered: bool = False
    idempotency_key: str | None = None


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A command as it is stored; times in ms since the epoch, `payload` and `result` are JSON.

    `due_ms` is when time moves it (None: never, it is final), `sent_ms` when it last left for its device, which it has
    done `sends` times; one that is `held` waits for an older ordered one.
    """

    tenant_id: str
    command_id: str
    device_id: str
    name: str
    payload: bytes
    state: State
    ordered: bool
    held: bool
    created_ms: int
    expires_ms: int
    timeout_ms: int
    due_ms: int | None
    sent_ms: int | None
    sends: int
    result: bytes | None
    error: str | None
    created_by: str
    fleet_id: str | None


class Move(msgspec.Struct, frozen=True):
    """A command came into `state`; `who` is DEVICE, PULSE, or the name of an API key."""

    state: State
    at_ms: int
    who: str


class Word(msgspec.Struct, frozen=True):
    """That `event` has happened at `at_ms`, by `who`; a device may add a `result`, which is JSON, and an `error`."""

    event: Event
    at_ms: int
    who: str
    result: bytes | None = None
    error: str | None = None


def made_id(at_ms: int, rest: bytes) -> str:
    """The id of what is made at `at_ms`, of 10 bytes that tell it from others: ids sort by time, for the index."""
    return f"{at_ms:012x}{rest.hex()}"


def moved(command: Command, word: Word) -> Command | None:
    """What `word` makes of `command`; None where it moves nothing, as what comes late or once more does."""
    state = after(command.state, word.event)
    if word.event is Event.SEND and state:
        sent_ms = max(word.at_ms, command.sent_ms or 0)
        return msgspec.structs.replace(command, state=state, sent_ms=sent_ms, sends=command.sends + 1)
    if state is None or state is command.state:
        return None
    due_ms = None if state.final else word.at_ms + command.timeout_ms
    result, error = word.result or command.result, word.error or command.error
    return msgspec.structs.replace(command, state=state, due_ms=due_ms, result=result, error=error)


def ended_by_time(command: Command) -> Event:
    """What happens to an open command when its time is over."""
    return Event.TIME_OUT if after(command.state, Event.TIME_OUT) else Event.EXPIRE


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A device's word on one command: `{"commandId","state","result"?,"error"?}`."""

    command_id: CommandId
    state: str
    result: msgspec.Raw | UnsetType = UNSET
    error: Annotated[str, Meta(max_length=1024, pattern=r"^[^\x00]*\Z")] | UnsetType = UNSET

    @property
    def event(self) -> Event:
        """What this word is in the table."""
        return ANSWERS[self.state]


class Sent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Our own word that a command has left for its device: `{"commandId"}`."""

    command_id: CommandId


class Told(msgspec.Struct, frozen=True, rename="camel"):
    """A command as its device hears it; times in ms since the epoch."""

    command_id: str
    name: str
    payload: msgspec.Raw
    issued_at: int
    expires_at: int


_answers: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Answer)
_sents: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Sent)
_anything: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


def read_answer(payload: bytes | msgspec.Raw) -> Answer:
    """An answer from its JSON; Refusal with the path or position of what is at fault."""
    answer: Answer = read_json(_answers, payload)
    if answer.state not in ANSWERS:
        raise Refusal(Reason.INVALID_PAYLOAD, f"is none of {', '.join(ANSWERS)}", field="state")
    if answer.result is not UNSET:
        storable_json(answer.result, field="result")
    return answer


def read_sent(payload: bytes | msgspec.Raw) -> str:
    """The id of the command that has left; Refusal with the path or position of what is at fault."""
    sent: Sent = read_json(_sents, payload)
    return sent.command_id


def storable_json(text: bytes | msgspec.Raw, *, field: str, bytes_max: int | None = None) -> bytes:
    """`text` as it is stored and sent: without spaces, and with nothing in it that a database or device cannot hold.

    Raises Refusal that names `field`, LimitExceeded where it is longer than `bytes_max` (`command_payload_bytes_max`).
    """
    try:
        value = read_json(_anything, text)
    except Refusal as refusal:
        raise Refusal(refusal.reason, refusal.message, field=field, position=refusal.position) from refusal
    check_storable(value, field, depth_max=COMMAND_DEPTH_MAX, limit="COMMAND_DEPTH_MAX")
    stored = msgspec.json.encode(value)
    if bytes_max is not None and len(stored) > bytes_max:
        raise LimitExceeded(
            Reason.TOO_LARGE,
            f"is {len(stored)} bytes long, {bytes_max} are allowed",
            limit="command_payload_bytes_max",
            value=bytes_max,
            field=field,
        )
    return stored


def told(command: Command) -> bytes:
    """What the device hears of `command`: `{"commandId","name","payload","issuedAt","expiresAt"}`."""
    return msgspec.json.encode(
        Told(command.command_id, command.name, msgspec.Raw(command.payload), command.created_ms, command.expires_ms)
    )


def told_all(commands: Sequence[Command], *, bytes_max: int) -> bytes:
    """What a device hears that asks: `{"commands":[…]}`, as many of them as `bytes_max` allow, one at least."""
    pieces: list[bytes] = []
    length = 0
    for piece in map(told, commands):
        length += len(piece) + 1
        if pieces and length > bytes_max:
            break
        pieces.append(piece)
    return b'{"commands":[%b]}' % b",".join(pieces)


def downward(command: Command) -> Downward:
    """`command` on its way to its device."""
    return Downward(command.tenant_id, command.device_id, COMMANDS, told(command))
