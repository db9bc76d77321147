"""What becomes of a message of TELEMETRY: a row, a sign of life, or a dead letter. Exactly one of them, always."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from pulse.domain.envelope import Envelope, unwrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.ledger import PositionSet
from pulse.domain.subjects import MessageType
from pulse.domain.telemetry import PayloadDecoder


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message as a consumer hands it over.

    `headers` are the raw NATS header block (ADR-4), empty where there is none; `published_ns` is when the stream
    stored it, `attempts` how often it was delivered, this time included; `reply` is where its ack goes.
    """

    subject: str
    body: bytes
    headers: bytes
    reply: str
    sequence: int
    published_ns: int
    attempts: int


class Row(msgspec.Struct, frozen=True, gc=False):
    """One row of `telemetry`; `metrics` is JSON."""

    position: int
    ts_us: int
    tenant_id: str
    device_id: str
    seq: int | None
    site_id: str | None
    metrics: bytes


class SignOfLife(msgspec.Struct, frozen=True, gc=False):
    """A heartbeat: it moves `device_state.last_seen` and leaves no row of its own."""

    position: int
    tenant_id: str
    device_id: str


class DeadLetter(msgspec.Struct, frozen=True, gc=False):
    """A message that cannot be processed, whole, with the reason."""

    position: int
    message: Message
    reason: Reason
    error: str
    tenant_id: str | None = None
    device_id: str | None = None


Fate = Row | SignOfLife | DeadLetter


class Settlement(msgspec.Struct, frozen=True):
    """What one transaction writes: every position of a batch, each with its fate.

    `last_seen_us` is, per (tenant, device), when the edge last received something, in µs since the epoch.
    """

    rows: Sequence[Row]
    signs_of_life: Sequence[SignOfLife]
    dead_letters: Sequence[DeadLetter]
    last_seen_us: dict[tuple[str, str], int]

    @property
    def positions(self) -> PositionSet:
        """All positions that this settles."""
        return PositionSet.of(fate.position for part in self.parts for fate in part)

    @property
    def dead_positions(self) -> PositionSet:
        """Those of them that it settles as dead letters."""
        return PositionSet.of(letter.position for letter in self.dead_letters)

    @property
    def parts(self) -> tuple[Sequence[Fate], ...]:
        """The three kinds of fate."""
        return self.rows, self.signs_of_life, self.dead_letters

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def without(self, settled: PositionSet) -> Settlement:
        """What is left of this once others have settled `settled`."""
        return Settlement(
            rows=[row for row in self.rows if row.position not in settled],
            signs_of_life=[sign for sign in self.signs_of_life if sign.position not in settled],
            dead_letters=[letter for letter in self.dead_letters if letter.position not in settled],
            last_seen_us=self.last_seen_us,
        )


def settle(messages: Iterable[tuple[int, Message]], decoder: PayloadDecoder) -> Settlement:
    """Decide the fate of each (position, message); a message that cannot be read never touches its neighbours."""
    rows: list[Row] = []
    signs: list[SignOfLife] = []
    dead: list[DeadLetter] = []
    last_seen_us: dict[tuple[str, str], int] = {}
    for position, message in messages:
        envelope: Envelope | None = None
        try:
            envelope = unwrap(message.subject, message.body)
            if envelope.msg_type is MessageType.HEARTBEAT:
                decoder.heartbeat(envelope.payload, received_ms=envelope.ts)
                signs.append(SignOfLife(position, envelope.tenant_id, envelope.device_id))
            else:
                rows.append(_row(position, envelope, decoder))
        except Refusal as refusal:
            dead.append(_dead_letter(position, message, refusal, envelope))
            continue
        device = (envelope.tenant_id, envelope.device_id)
        received_us = envelope.ts * 1000
        if received_us > last_seen_us.get(device, 0):
            last_seen_us[device] = received_us
    return Settlement(rows=rows, signs_of_life=signs, dead_letters=dead, last_seen_us=last_seen_us)


def condemn(position: int, message: Message, refusal: Refusal) -> Settlement:
    """Settle one message as a dead letter, for a reason found only after it was read."""
    try:
        envelope = unwrap(message.subject, message.body)
    except Refusal:
        envelope = None
    letter = _dead_letter(position, message, refusal, envelope)
    return Settlement(rows=[], signs_of_life=[], dead_letters=[letter], last_seen_us={})


def _row(position: int, envelope: Envelope, decoder: PayloadDecoder) -> Row:
    reading = decoder.telemetry(envelope.payload, received_ms=envelope.ts)
    return Row(
        position=position,
        ts_us=reading.ts_us,
        tenant_id=envelope.tenant_id,
        device_id=envelope.device_id,
        seq=reading.seq,
        site_id=reading.site_id,
        metrics=msgspec.json.encode(reading.metrics),
    )


def _dead_letter(position: int, message: Message, refusal: Refusal, envelope: Envelope | None) -> DeadLetter:
    error = f"{refusal.field}: {refusal.message}" if refusal.field else refusal.message
    return DeadLetter(
        position=position,
        message=message,
        reason=refusal.reason,
        error=error,
        tenant_id=envelope.tenant_id if envelope else None,
        device_id=envelope.device_id if envelope else None,
    )
