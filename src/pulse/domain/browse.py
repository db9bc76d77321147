"""Messages of a stream as they are read for people: where reading begins, and what is found."""

from __future__ import annotations

from datetime import datetime

import msgspec

from pulse.domain.envelope import Envelope, unwrap
from pulse.domain.errors import Refusal

TEXT_BYTES_MAX = 64 * 1024


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Begin at `sequence`, or at the first message that was stored at `since` or later; on `subject` alone."""

    sequence: int = 1
    since: datetime | None = None
    subject: str | None = None


class StreamMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message as its stream has it; `pending` is how many of those asked for come after it."""

    sequence: int
    subject: str
    stored_at: datetime
    body: bytes
    pending: int


class ReadMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message with its envelope, None where it has none of ours; `text` is the payload, or the body, as JSON."""

    message: StreamMessage
    envelope: Envelope | None
    text: str


def read_message(message: StreamMessage) -> ReadMessage:
    """As far as it can be read; whatever it holds, nothing is raised."""
    try:
        envelope = unwrap(message.subject, message.body)
    except Refusal:
        return ReadMessage(message=message, envelope=None, text=readable(message.body, pretty=False))
    return ReadMessage(message=message, envelope=envelope, text=readable(bytes(envelope.payload), pretty=False))


def editable(body: bytes) -> str | None:
    """`body` whole, as text that can be edited and sent again, JSON in lines; None where it is no text."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    try:
        return msgspec.json.format(text, indent=2)
    except (msgspec.DecodeError, RecursionError):
        return text


def readable(body: bytes, *, pretty: bool) -> str:
    """`body` as text, JSON in lines where it is that and `pretty`; at most TEXT_BYTES_MAX of it."""
    if len(body) <= TEXT_BYTES_MAX:
        try:
            formatted = msgspec.json.format(body, indent=2 if pretty else -1)
            return formatted.decode("utf-8", "backslashreplace")
        except (msgspec.DecodeError, RecursionError):
            pass
    text = body[:TEXT_BYTES_MAX].decode("utf-8", "backslashreplace")
    return text if len(body) <= TEXT_BYTES_MAX else f"{text} … ({len(body) - TEXT_BYTES_MAX} bytes more)"
