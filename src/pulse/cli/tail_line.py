"""One message as one line: for people, and as JSON.

Whatever a device sends is shown, nothing of it is obeyed: characters that a terminal would act on, or that only
change how the line looks (control characters, bidirectional overrides), are written as escapes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime

import click
import msgspec

from pulse.adapters.nats.follow import Message
from pulse.domain.envelope import Envelope, unwrap
from pulse.domain.errors import Refusal
from pulse.domain.subjects import MessageType

LINE_LENGTH_MAX = 2000
"""Of what a message says; the rest is cut off, and how much it was is told."""
SAME_TIME_MS = 10_000
COLOUR_OF = {MessageType.TELEMETRY: "green", MessageType.HEARTBEAT: "blue"}
OTHER_COLOUR = "yellow"
RAW_COLOUR = "red"


class Shown(msgspec.Struct, frozen=True):
    """A message, read as far as it can be: `envelope` and `payload` are None where it is none of ours."""

    message: Message
    envelope: Envelope | None
    payload: object


def read(message: Message) -> Shown:
    """Read a message; what is no envelope is kept raw."""
    try:
        envelope = unwrap(message.subject, message.data)
        return Shown(message, envelope, msgspec.json.decode(envelope.payload))
    except (Refusal, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Shown(message, None, None)


def line_of(shown: Shown, *, colour: bool) -> str:
    """`15:47:11.123  acme/t-1  telemetry  temperature=21.5 door="half open"  seq=17`, in local time."""
    envelope = shown.envelope
    if envelope is None:
        time = _time(shown.message.stored_ns // 1_000_000)
        said, kind, who, kind_colour = _raw_text(shown.message.data), "raw", shown.message.subject, RAW_COLOUR
    else:
        time = _time(envelope.ts)
        said, kind, who = (
            "  ".join(_said(shown.payload, received_ms=envelope.ts)),
            envelope.msg_type,
            f"{envelope.tenant_id}/{envelope.device_id}",
        )
        kind_colour = COLOUR_OF.get(envelope.msg_type, OTHER_COLOUR)
    said = _cut(escaped(said))
    who = escaped(who)
    if not colour:
        return f"{time}  {who}  {kind}  {said}".rstrip()
    return f"{click.style(time, dim=True)}  {click.style(who, bold=True)}  {click.style(kind, fg=kind_colour)}  {said}"


def json_of(shown: Shown, *, stream: str) -> str:
    """The message as a JSON object on one line, in ASCII.

    Always `time` (when the stream took it, UTC), `stream`, `sequence`, `subject`. An envelope adds its own fields; any
    other body is `raw`, or `raw_base64` where it is not UTF-8.
    """
    message, envelope = shown.message, shown.envelope
    at = datetime.fromtimestamp(message.stored_ns // 1000 / 1e6, UTC)
    record: dict[str, object] = {
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "stream": stream,
        "sequence": message.sequence or None,
        "subject": message.subject,
    }
    if envelope is not None:
        record |= {
            "tenant_id": envelope.tenant_id,
            "device_id": envelope.device_id,
            "msg_type": envelope.msg_type,
            "ts": envelope.ts,
            "source": envelope.source,
            "payload": shown.payload,
        }
    else:
        try:
            record["raw"] = message.data.decode("utf-8")
        except UnicodeDecodeError:
            record["raw_base64"] = base64.b64encode(message.data).decode("ascii")
    return json.dumps(record, separators=(",", ":"))


def escaped(text: str) -> str:
    """`text` with every character that is not to be seen as an escape like `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def _said(payload: object, *, received_ms: int) -> Iterator[str]:
    """The metrics together, then each other field; the device's time only where it is another than ours."""
    if not isinstance(payload, dict):
        yield _value(payload)
        return
    metrics = payload.get("metrics")
    if isinstance(metrics, dict):
        yield " ".join(f"{name}={_value(value)}" for name, value in metrics.items())
    for name, value in payload.items():
        if name == "ts" and isinstance(value, int) and abs(value - received_ms) <= SAME_TIME_MS:
            continue
        if name != "metrics" or not isinstance(value, dict):
            yield f"{name}={_value(value)}"


def _value(value: object) -> str:
    """As it would be in JSON; a plain word without its quotes."""
    if isinstance(value, str) and value and not set(value) & set(" =\"'") and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _raw_text(body: bytes) -> str:
    return body[: 4 * LINE_LENGTH_MAX].decode("utf-8", "backslashreplace") or "(empty)"


def _cut(text: str) -> str:
    if len(text) <= LINE_LENGTH_MAX:
        return text
    return f"{text[:LINE_LENGTH_MAX]} … ({len(text) - LINE_LENGTH_MAX} more)"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
