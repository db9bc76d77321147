"""What becomes of a message of TELEMETRY: a row, a sign of life, or a dead letter. Exactly one of them, always."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec
from msgspec import UNSET

from pulse.domain.envelope import IDENTITY, Envelope, unwrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.ledger import PositionSet
from pulse.domain.subjects import MessageType, tenant_of
from pulse.domain.telemetry import PayloadDecoder

IDENTITIES_REMEMBERED_MAX = 16_384
"""Ids of which it is remembered that they are well formed; some 3 MB."""

_encoder = msgspec.json.Encoder()


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
    """Decide the fate of each (position, message); a message that cannot be read never touches its neighbours.

    Nearly all of them are as they should be, and read in one pass each. One that is not, in whatever way, is read
    again step by step, and only that decides what becomes of it.
    """
    usual, unusual = _read_usual(messages, decoder)
    rows, signs, last_seen_us = [*usual.rows], [*usual.signs_of_life], usual.last_seen_us
    dead: list[DeadLetter] = []
    for position, message in unusual:
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
        if envelope.ts * 1000 > last_seen_us.get(device, 0):
            last_seen_us[device] = envelope.ts * 1000
    return Settlement(rows=rows, signs_of_life=signs, dead_letters=dead, last_seen_us=last_seen_us)


def _read_usual(
    messages: Iterable[tuple[int, Message]], decoder: PayloadDecoder
) -> tuple[Settlement, list[tuple[int, Message]]]:
    """The fates of all that nothing is the matter with, and the messages that are left; half the time of step by step.

    What it takes, it takes as `unwrap` and the payload's own decoder do; what it leaves may still turn out to be good.
    """
    rows: list[Row] = []
    signs: list[SignOfLife] = []
    left: list[tuple[int, Message]] = []
    last_seen_us: dict[tuple[str, str], int] = {}
    tenants: dict[str, str] = {}
    read, encode, telemetry = decoder.whole.decode, _encoder.encode, decoder.telemetry_shape
    for position, message in messages:
        try:
            whole = read(message.body)
            tenant_id, device_id = device = (whole.tenant_id, whole.device_id)
            payload, received_us = whole.payload, whole.ts * 1000
            if tenants.get(message.subject) != tenant_id:
                tenants[message.subject] = _check_tenant(tenant_id, message.subject)
            seen_us = last_seen_us.get(device, 0)
            if not seen_us:
                _check_identity(device_id)
            ts_us = received_us if payload.ts is UNSET else decoder.timestamp_us(payload.ts, whole.ts)
            if type(payload) is telemetry:
                metrics, seq, site_id = encode(payload.metrics), payload.seq, payload.site_id
                if b"\\u0000" in metrics or (site_id is not UNSET and "\x00" in site_id):
                    left.append((position, message))
                    continue
                seq, site_id = None if seq is UNSET else seq, None if site_id is UNSET else site_id
                rows.append(Row(position, ts_us, tenant_id, device_id, seq, site_id, metrics))
            else:
                signs.append(SignOfLife(position, tenant_id, device_id))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, Refusal):
            left.append((position, message))
            continue
        if received_us > seen_us:
            last_seen_us[device] = received_us
    return Settlement(rows=rows, signs_of_life=signs, dead_letters=[], last_seen_us=last_seen_us), left


def _check_tenant(tenant_id: str, subject: str) -> str:
    if tenant_id != tenant_of(subject):
        raise Refusal(Reason.INVALID_ENVELOPE, "speaks for another tenant")
    _check_identity(tenant_id)
    return tenant_id


@lru_cache(maxsize=IDENTITIES_REMEMBERED_MAX)
def _check_identity(text: str) -> None:
    if not IDENTITY.fullmatch(text):
        raise Refusal(Reason.INVALID_ENVELOPE, "not an id")


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
