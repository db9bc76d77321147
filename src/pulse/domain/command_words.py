"""What a message of COMMANDS says of a command: read, or a dead letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import UNSET

from pulse.domain.command import DEVICE, PULSE, Event, State, Word, read_answer, read_sent, storable_json
from pulse.domain.command_rejections import rejected, unknown_command
from pulse.domain.downward import Downward
from pulse.domain.envelope import Envelope, unwrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.ledger import PositionSet
from pulse.domain.settlement import DeadLetter, Message, dead_letter
from pulse.domain.subjects import MessageType


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """The `message` at `position`, and its `word` on a command of its device."""

    position: int
    message: Message
    tenant_id: str
    device_id: str
    command_id: str
    word: Word

    @property
    def is_answer(self) -> bool:
        """Whether the device said it, and not we."""
        return self.word.who == DEVICE

    def unknown(self) -> DeadLetter:
        """This as a dead letter: there is no such command, or not of this device."""
        refusal = unknown_command(self.device_id, self.command_id)
        return DeadLetter(
            self.position,
            self.message,
            refusal.reason,
            refusal.message,
            tenant_id=self.tenant_id,
            device_id=self.device_id,
        )

    def rejected(self, refusal: Refusal | None = None) -> Downward:
        """What its device hears of it: that it has no such command, or `refusal`."""
        why = refusal or unknown_command(self.device_id, self.command_id)
        return rejected(self.tenant_id, self.device_id, self.command_id, why, at_ms=self.word.at_ms)


def read_said(position: int, message: Message) -> Said | DeadLetter:
    """What `message` says; a dead letter where that cannot be read."""
    envelope: Envelope | None = None
    try:
        envelope = unwrap(message.subject, message.body)
        command_id, word = _read(envelope)
    except Refusal as refusal:
        return dead_letter(position, message, refusal, envelope)
    return Said(
        position=position,
        message=message,
        tenant_id=envelope.tenant_id,
        device_id=envelope.device_id,
        command_id=command_id,
        word=word,
    )


def condemn(position: int, message: Message, refusal: Refusal) -> DeadLetter:
    """`message` as a dead letter, for a reason found only after it was read."""
    said = read_said(position, message)
    if isinstance(said, DeadLetter):
        return said
    return DeadLetter(
        position, message, refusal.reason, refusal.message, tenant_id=said.tenant_id, device_id=said.device_id
    )


def _read(envelope: Envelope) -> tuple[str, Word]:
    if envelope.msg_type is MessageType.COMMANDS_SENT:
        return read_sent(envelope.payload), Word(Event.SEND, envelope.ts, PULSE)
    if envelope.msg_type is not MessageType.COMMANDS_ACK:
        raise Refusal(Reason.INVALID_ENVELOPE, f"{envelope.msg_type} says nothing of a command", field="msg_type")
    answer = read_answer(envelope.payload)
    result = None if answer.result is UNSET else storable_json(answer.result, field="result")
    error = None if answer.error is UNSET else answer.error
    return answer.command_id, Word(answer.event, envelope.ts, DEVICE, result, error)


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What one transaction did: how often a command came into each state, how many words came `late` and moved none.

    `released` commands have their turn now; what was `already` settled by others was left out. So many answers were
    `rejected` to their devices, and so many to unknown commands were `not_kept` as dead letters as well.
    """

    moved: Mapping[State, int]
    late: int
    released: int
    dead: Sequence[DeadLetter]
    already: PositionSet
    rejected: int = 0
    not_kept: int = 0
