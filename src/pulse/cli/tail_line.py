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
from pulse.domain.downward import PREFIX as DOWN
from pulse.domain.downward import Downward, read_downward
from pulse.domain.envelope import Envelope, unwrap
from pulse.domain.errors import Refusal
from pulse.domain.subjects import MessageType

LINE_LENGTH_MAX = 2000
"""Of what a message says; the rest is cut off, and how much it was is told."""
SAME_TIME_MS = 10_000
COLOUR_OF = {
    MessageType.TELEMETRY: "green",
    MessageType.HEARTBEAT: "blue",
    MessageType.SHADOW: "magenta",
    MessageType.COMMANDS_ACK: "cyan",
}
OTHER_COLOUR = "yellow"
RAW_COLOUR = "red"


class Shown(msgspec.Struct, frozen=True):
    """A message, read as far as it can be: `envelope` is what a device said, `said` what is said to one, or neither."""

    message: Message
    envelope: Envelope | None
    payload: object
    said: Downward | None = None

    @property
    def device_id(self) -> str | None:
        """Of the device that it comes from or goes to."""
        known = self.envelope or self.said
        return None if known is None else known.device_id


def read(message: Message) -> Shown:
    """Read a message; what is no envelope is kept raw."""
    try:
        if message.subject.startswith(f"{DOWN}."):
            said = read_downward(message.subject, message.data)
            return Shown(message, None, msgspec.json.decode(said.body), said)
        envelope = unwrap(message.subject, message.data)
        return Shown(message, envelope, msgspec.json.decode(envelope.payload))
    except (Refusal, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Shown(message, None, None)


def line_of(shown: Shown, *, colour: bool) -> str:
    """`15:47:11.123  acme/t-1  telemetry  temperature=21.5 door="half open"  seq=17`, in local time."""
    envelope, down = shown.envelope, shown.said
    if down is not None:
        at_ms = shown.message.stored_ns // 1_000_000
        time, kind_colour = _time(at_ms), OTHER_COLOUR
        said, kind, who = "  ".join(_said(shown.payload, received_ms=at_ms)), f"← {down.topic}", _who(down)
    elif envelope is None:
        time = _time(shown.message.stored_ns // 1_000_000)
        said, kind, who, kind_colour = _raw_text(shown.message.data), "raw", shown.message.subject, RAW_COLOUR
    else:
        time = _time(envelope.ts)
        said, kind, who = (
            "  ".join(_said(shown.payload, received_ms=envelope.ts)),
            envelope.msg_type if envelope.name is msgspec.UNSET else f"{envelope.msg_type}:{envelope.name}",
            _who(envelope),
        )
        kind_colour = COLOUR_OF.get(envelope.msg_type, OTHER_COLOUR)
    said = _cut(escaped(said))
    who = escaped(who)
    if not colour:
        return f"{time}  {who}  {kind}  {said}".rstrip()
    return f"{click.style(time, dim=True)}  {click.style(who, bold=True)}  {click.style(kind, fg=kind_colour)}  {said}"


def json_of(shown: Shown, *, stream: str) -> str:
    """The message as a JSON object on one line, in ASCII.

    Always `time` (when the stream took it, UTC), `stream`, `sequence`, `subject`. An envelope adds its own fields, what
    is said to a device its `topic`; any other body is `raw`, or `raw_base64` where it is not UTF-8.
    """
    message, envelope, said = shown.message, shown.envelope, shown.said
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
        if envelope.name is not msgspec.UNSET:
            record["name"] = envelope.name
    elif said is not None:
        record |= {
            "tenant_id": said.tenant_id,
            "device_id": said.device_id,
            "topic": said.topic,
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


def _who(whose: Envelope | Downward) -> str:
    return f"{whose.tenant_id}/{whose.device_id}"


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
