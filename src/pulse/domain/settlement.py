"""What becomes of a message of TELEMETRY: a row, a sign of life, or a dead letter. Exactly one of them, always."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec
from msgspec import UNSET

from pulse.domain.device_state import Words
from pulse.domain.envelope import IDENTITY, Envelope, unwrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import ID_PATTERN
from pulse.domain.ledger import PositionSet
from pulse.domain.subjects import MessageType, tenant_of
from pulse.domain.telemetry import PayloadDecoder

IDENTITIES_REMEMBERED_MAX = 16_384
"""Ids of which it is remembered that they are well formed; some 3 MB."""

REPLAY_FOR = "Pulse-Replay-For"
"""The header of a replay that says whose it was: `tenant/device`."""
_REPLAY_FOR = re.compile(rb"\nPulse-Replay-For: (%b)/(%b)\r" % ((ID_PATTERN.encode(),) * 2))

NUL_ESCAPED = rb"\u0000"
"""As no JSON can have it otherwise; where it stands, it may also be an escaped backslash and four digits."""

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
    """One row of `telemetry`, and a Word; `metrics` is JSON, `names` its keys, `seen_us` when the edge received it."""

    position: int
    ts_us: int
    tenant_id: str
    device_id: str
    seq: int | None
    site_id: str | None
    metrics: bytes
    seen_us: int = 0
    names: tuple[str, ...] = ()


class SignOfLife(msgspec.Struct, frozen=True, gc=False):
    """A heartbeat: it moves `device_state.last_seen` and leaves no row of its own; a Word."""

    position: int
    tenant_id: str
    device_id: str
    seen_us: int = 0
    ts_us: int = 0
    names: tuple[str, ...] = ()
    metrics: bytes = b"{}"


class DeadLetter(msgspec.Struct, frozen=True, gc=False):
    """A message that cannot be processed, whole, with the reason."""

    position: int
    message: Message
    reason: Reason
    error: str
    tenant_id: str | None = None
    device_id: str | None = None


Fate = Row | SignOfLife | DeadLetter
NO_WORDS = Words({}, [])


class Settlement(msgspec.Struct, frozen=True):
    """What one transaction writes: every position of a batch, each with its fate.

    `words` are those rows and signs of life that make the state of their devices.
    """

    rows: Sequence[Row]
    signs_of_life: Sequence[SignOfLife]
    dead_letters: Sequence[DeadLetter]
    words: Words = NO_WORDS

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
            words=self.words,
        )


def settle(messages: Iterable[tuple[int, Message]], decoder: PayloadDecoder) -> Settlement:
    """Decide the fate of each (position, message); a message that cannot be read never touches its neighbours.

    Nearly all of them are as they should be, and read in one pass each. One that is not, in whatever way, is read
    again step by step, and only that decides what becomes of it.
    """
    rows: list[Row] = []
    signs: list[SignOfLife] = []
    words = Words({}, [])
    dead: list[DeadLetter] = []
    for position, message in _read_usual(messages, decoder, rows, signs, words):
        envelope: Envelope | None = None
        try:
            envelope = unwrap(message.subject, message.body)
            if envelope.msg_type is MessageType.HEARTBEAT:
                decoder.heartbeat(envelope.payload, received_ms=envelope.ts)
                sign = SignOfLife(position, envelope.tenant_id, envelope.device_id, envelope.ts * 1000)
                signs.append(sign)
                _heard(words, sign)
            else:
                row = _row(position, envelope, decoder)
                rows.append(row)
                _heard(words, row)
        except Refusal as refusal:
            dead.append(dead_letter(position, message, refusal, envelope))
    return Settlement(rows=rows, signs_of_life=signs, dead_letters=dead, words=words)


def _heard(words: Words, word: Row | SignOfLife) -> None:
    device = (word.tenant_id, word.device_id)
    if words.last.setdefault(device, word) is not word:
        words.others.append((device, word))


def _read_usual(
    messages: Iterable[tuple[int, Message]],
    decoder: PayloadDecoder,
    rows: list[Row],
    signs: list[SignOfLife],
    words: Words,
) -> list[tuple[int, Message]]:
    """Add the fates of all that nothing is the matter with; returns what is left. Half the time of step by step.

    What it takes, it takes as `unwrap` and the payload's own decoder do; what it leaves may still turn out to be good.
    """
    left: list[tuple[int, Message]] = []
    tenants: dict[str, str] = {}
    kinds: dict[tuple[str, ...], tuple[str, ...]] = {}
    last, others = words
    read, encode, telemetry = decoder.whole.decode, _encoder.encode, decoder.telemetry_shape
    for position, message in messages:
        body = message.body
        try:
            whole = read(body)
            device = tenant_id, device_id = whole.tenant_id, whole.device_id
            payload, seen_us = whole.payload, whole.ts * 1000
            if tenants.get(message.subject) != tenant_id:
                tenants[message.subject] = _check_tenant(tenant_id, message.subject)
            before = last.get(device)
            if before is None:
                _check_identity(device_id)
            ts_us = seen_us if payload.ts is UNSET else decoder.timestamp_us(payload.ts, whole.ts)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, Refusal):
            left.append((position, message))
            continue
        word: Row | SignOfLife
        if type(payload) is telemetry:
            metrics, seq, site_id = payload.metrics, payload.seq, payload.site_id
            said = tuple(metrics)
            names = kinds.get(said)
            if names is None and decoder.fits(said):
                names = kinds[said] = said
            if names is None or NUL_ESCAPED in body:
                left.append((position, message))
                continue
            seq, site_id = None if seq is UNSET else seq, None if site_id is UNSET else site_id
            word = Row(position, ts_us, tenant_id, device_id, seq, site_id, encode(metrics), seen_us, names)
            rows.append(word)
        else:
            names = ()
            word = SignOfLife(position, tenant_id, device_id, seen_us)
            signs.append(word)
        last[device] = word
        # As `outdates` has it: the next message of a device mostly leaves the one before nothing to say.
        if before is not None and not (
            before.names is names and before.seen_us <= seen_us and before.ts_us <= ts_us and before.position < position
        ):
            others.append((device, before))
    return left


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
    letter = dead_letter(position, message, refusal, envelope)
    return Settlement(rows=[], signs_of_life=[], dead_letters=[letter])


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
        seen_us=envelope.ts * 1000,
        names=tuple(reading.metrics),
    )


def dead_letter(position: int, message: Message, refusal: Refusal, envelope: Envelope | None = None) -> DeadLetter:
    """A message that was refused; its `envelope` tells of which device, where it could be read.

    Of a replay that could not be read, the letter that was replayed tells it.
    """
    error = f"{refusal.field}: {refusal.message}" if refusal.field else refusal.message
    tenant_id, device_id = (envelope.tenant_id, envelope.device_id) if envelope else _replayed_for(message)
    return DeadLetter(position, message, refusal.reason, error, tenant_id=tenant_id, device_id=device_id)


def _replayed_for(message: Message) -> tuple[str | None, str | None]:
    found = _REPLAY_FOR.search(message.headers)
    if found is None or found[1].decode() != tenant_of(message.subject):
        return None, None
    return found[1].decode(), found[2].decode()
