"""Payload templates: JSON with places for what a message says.

    {"text": "${device.id} is at ${metrics.temp}", "value": "${metrics.temp}", "at": "${ts}", "all": "${payload}"}

A string that is one place becomes the value itself, whatever its type, and null where there is none. In a longer string
a place becomes text: a string as it is, anything else as JSON, nothing where there is none. `$${` stands for `${`.
Names of members have no places. A template has no loop, no condition and no function, so a rendered one is JSON always,
and at most as long as its text and so many values: rendering is one pass over parts that were cut once (ADR 16).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.json_text import count_keys
from pulse.domain.routed import MISSING, Json, Path, RoutedMessage, read_path

TEMPLATE_BYTES_MAX = 16 * 1024
PLACES_MAX = 64
DEPTH_MAX = 32

_PLACE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
_encoder = msgspec.json.Encoder()


class Whole(msgspec.Struct, frozen=True):
    """A place that becomes a value."""

    path: Path


class Within(msgspec.Struct, frozen=True):
    """A place that becomes text in a string."""

    path: Path


Part = bytes | Whole | Within


class Template:
    """A template that was read; `parts` in order make up what is rendered."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts = parts

    def render(self, message: RoutedMessage, *, bytes_max: int) -> bytes:
        """The JSON for `message`; LimitExceeded where it would be longer than `bytes_max`."""
        pieces: list[bytes] = []
        size = 0
        for part in self.parts:
            piece = part if isinstance(part, bytes) else _render(part, message)
            size += len(piece)
            if size > bytes_max:
                raise LimitExceeded(
                    Reason.TOO_LARGE,
                    f"the rendered body has more than {bytes_max} bytes",
                    limit="route_body_bytes_max",
                    value=bytes_max,
                    field="template",
                )
            pieces.append(piece)
        return b"".join(pieces)


def read_template(text: str, *, field: str = "template") -> Template:
    """The template that `text` is; Refusal INVALID_REQUEST with the path of what is at fault.

    LimitExceeded where it is longer than TEMPLATE_BYTES_MAX or has more than PLACES_MAX places.
    """
    encoded = text.encode("utf-8", "surrogatepass")
    if len(encoded) > TEMPLATE_BYTES_MAX:
        raise _limit("template_bytes_max", TEMPLATE_BYTES_MAX, field)
    try:
        document: Json = msgspec.json.decode(encoded)
        exact = _encoder.encode(document)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Refusal(Reason.INVALID_REQUEST, f"a template is JSON: {error}", field=field) from error
    if count_keys(encoded) != count_keys(exact):
        raise Refusal(Reason.INVALID_REQUEST, "an object names the same key twice", field=field)
    parts: list[Part] = []
    _cut(document, parts, field=field, depth=0)
    if sum(not isinstance(part, bytes) for part in parts) > PLACES_MAX:
        raise _limit("template_places_max", PLACES_MAX, field)
    return Template(tuple(_joined(parts)))


def cut_text(text: str, *, field: str) -> list[str | Path]:
    """Literal text and paths in turn, as they stand in `text`; Refusal INVALID_REQUEST where a place is none."""
    cut: list[str | Path] = []
    at = 0
    for place in _PLACE.finditer(text):
        cut += _literal(text[at : place.start()], field)
        cut.append("${" if place[1] is None else read_path(place[1].strip(), field=field))
        at = place.end()
    return cut + _literal(text[at:], field)


def _literal(text: str, field: str) -> list[str | Path]:
    if "${" in text:
        raise Refusal(Reason.INVALID_REQUEST, "a place that is not closed: ${path} is expected", field=field)
    return [text] if text else []


def text_of(value: Json | Mapping[str, Json] | msgspec.UnsetType) -> str:
    """A value as it stands in a longer text."""
    if value is MISSING:
        return ""
    return value if isinstance(value, str) else _encoder.encode(value).decode()


def _cut(value: Json, parts: list[Part], *, field: str, depth: int) -> None:
    if depth > DEPTH_MAX:
        raise _limit("template_depth_max", DEPTH_MAX, field)
    if isinstance(value, dict):
        for number, (name, member) in enumerate(value.items()):
            if _PLACE.search(name):
                raise Refusal(Reason.INVALID_REQUEST, "names of members have no places", field=f"{field}.{name}")
            parts.append(b"%b%b:" % (b"," if number else b"{", _encoder.encode(name)))
            _cut(member, parts, field=f"{field}.{name}", depth=depth + 1)
        parts.append(b"}" if value else b"{}")
    elif isinstance(value, list):
        for number, member in enumerate(value):
            parts.append(b"," if number else b"[")
            _cut(member, parts, field=f"{field}[{number}]", depth=depth + 1)
        parts.append(b"]" if value else b"[]")
    elif isinstance(value, str):
        _cut_string(value, parts, field=field)
    else:
        parts.append(_encoder.encode(value))


def _cut_string(text: str, parts: list[Part], *, field: str) -> None:
    cut = cut_text(text, field=field)
    if len(cut) == 1 and not isinstance(cut[0], str):
        parts.append(Whole(cut[0]))
        return
    parts.append(b'"')
    parts.extend(_encoder.encode(each)[1:-1] if isinstance(each, str) else Within(each) for each in cut)
    parts.append(b'"')


def _joined(parts: list[Part]) -> list[Part]:
    """The same with literal parts that are neighbours made one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, bytes) and joined and isinstance(before := joined[-1], bytes):
            joined[-1] = before + part
        else:
            joined.append(part)
    return joined


def _render(place: Whole | Within, message: RoutedMessage) -> bytes:
    value = message.find(place.path)
    if isinstance(place, Whole):
        return b"null" if value is MISSING else _encoder.encode(value)
    return _encoder.encode(text_of(value))[1:-1]


def _limit(name: str, value: int, field: str) -> LimitExceeded:
    return LimitExceeded(Reason.TOO_LARGE, f"{name} is {value}", limit=name, value=value, field=field)
