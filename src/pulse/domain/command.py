"""The life of a command: a table of who may move it where.

                  SEND      ACKNOWLEDGE   SUCCEED    FAIL    REJECT    EXPIRE    TIME_OUT   CANCEL
    queued        sent      acknowledged  succeeded  failed  rejected  expired   –          cancelled
    sent          sent      acknowledged  succeeded  failed  rejected  expired   –          cancelled
    acknowledged  –         acknowledged  succeeded  failed  rejected  –         timed_out  cancelled
    the others are final: nothing moves them

SEND is ours, when the command has left for its device, and again each time a device comes back that has not answered.
A device may answer a command that was never noted as sent: it got it just before we died. EXPIRE is the end of the time
to live, which is for being heard of; TIME_OUT is the end of the time that a device has from there to its result.
Source: the states of AWS IoT commands, and of ThingsBoard's persistent RPC, under the names of DESIGN's contract.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pulse.domain.errors import Reason, Refusal
from pulse.domain.json_text import read_json


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

ID_LENGTH_MAX = 64


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A device's word on one command: `{"commandId","state","result"?,"error"?}`."""

    command_id: Annotated[str, Meta(min_length=1, max_length=ID_LENGTH_MAX)]
    state: str
    result: msgspec.Raw | UnsetType = UNSET
    error: Annotated[str, Meta(max_length=1024)] | UnsetType = UNSET

    @property
    def event(self) -> Event:
        """What this word is in the table."""
        return ANSWERS[self.state]


_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Answer)


def read_answer(payload: bytes | msgspec.Raw) -> Answer:
    """An answer from its JSON; Refusal with the path or position of what is at fault."""
    answer: Answer = read_json(_decoder, payload)
    if answer.state not in ANSWERS:
        raise Refusal(Reason.INVALID_PAYLOAD, f"is none of {', '.join(ANSWERS)}", field="state")
    return answer
