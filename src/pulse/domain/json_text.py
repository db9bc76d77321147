"""JSON as strangers send it: read into a type, or refused with the path or the position of what is at fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import msgspec

from pulse.domain.errors import LimitExceeded, Reason, Refusal

T = TypeVar("T")

INTEGER_MAX = 2**63 - 1
"""What devices, browsers and PostgreSQL's bigint can hold; a larger one is refused, not rounded."""

_STRING_THEN_COLON = re.compile(rb'"(?:[^"\\]|\\.)*"[ \t\r\n]*(:)?', re.DOTALL)
_NAMED_FIELD = re.compile(r"^Object (?:contains unknown|missing required) field `(.+)`$", re.DOTALL)
_POSITION = re.compile(r" \(byte ([0-9]+)\)$")
_HIGH_SURROGATE_ALONE = re.compile(rb"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2})(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})")


def read_json(
    decoder: msgspec.json.Decoder[T],
    text: bytes | msgspec.Raw,
    *,
    culprit: Callable[[bytes | msgspec.Raw, str], str] = lambda _, path: path,
) -> T:
    """What `decoder` makes of `text`.

    Raises Refusal: INVALID_JSON with the position in bytes, where it is no JSON that can be stored; INVALID_PAYLOAD
    with the path, where it is not what the decoder's type says. `culprit` may name the path better than msgspec does,
    which writes `metrics[...]` for any value of an object.
    """
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at ")
        path = where.rpartition("`$")[2].strip("`.")
        if named := _NAMED_FIELD.match(message):
            path = f"{path}.{named[1]}" if path else named[1]
        raise Refusal(Reason.INVALID_PAYLOAD, message, field=culprit(text, path)) from error
    except RecursionError as error:
        raise Refusal(Reason.INVALID_JSON, "JSON is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        why, position = _what_and_where(error, bytes(text))
        raise Refusal(Reason.INVALID_JSON, f"{why} (byte {position})", position=position) from error


def _what_and_where(error: msgspec.DecodeError | UnicodeDecodeError, text: bytes) -> tuple[str, int]:
    """What is wrong, and the offset at which reading stopped; the text's length where it only ends too soon.

    msgspec tells the position in its message and nowhere else. It does not for UTF-8, of which it decodes one string
    at a time, and takes half of a surrogate pair before the text's end for a text that was cut off.
    """
    if isinstance(error, UnicodeDecodeError):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as whole:
            return "JSON is malformed: not UTF-8", whole.start
    message = str(error)
    if found := _POSITION.search(message):
        return message[: found.start()], int(found[1])
    if lone := _HIGH_SURROGATE_ALONE.search(text):
        return "JSON is malformed: half of a surrogate pair", lone.start(1)
    return "JSON is cut off", len(text)


def count_keys(text: bytes) -> int:
    """How many keys all objects of `text`, which must be valid JSON, name: a string followed by a colon is a key."""
    return sum(1 for colon in _STRING_THEN_COLON.findall(text) if colon)


def refuse_repeated_keys(text: bytes, named: int, *, beside: bytes = b"") -> None:
    """Raise Refusal where `text` names more keys than the `named` that a decoder, which keeps the last, has found.

    The keys within `beside`, a value that is somewhere in `text`, do not count. There are at least as many colons as
    keys, so that few texts have to be looked at closely.
    """
    colons = text.count(b":") - beside.count(b":") if beside else text.count(b":")
    if colons > named and count_keys(text.replace(beside, b"0", bool(beside))) > named:
        raise Refusal(Reason.INVALID_PAYLOAD, "an object names the same key twice")


def check_storable(value: object, path: str, *, depth_max: int, limit: str) -> int:
    """How many keys all objects of `value`, which was read from JSON, name.

    Raises Refusal with the path of what PostgreSQL's jsonb, or a device's JSON, cannot hold, and LimitExceeded, with
    `limit` as the name of the bound, where more than `depth_max` objects and arrays are within one another. It is not
    recursive: `value` may be deeper than a stack.
    """
    named = 0
    todo: list[tuple[object, _Where, int]] = [(value, (None, path), 1)]
    while todo:
        one, where, level = todo.pop()
        if isinstance(one, str):
            _refuse_nul(one, where)
        elif isinstance(one, int) and not -INTEGER_MAX - 1 <= one <= INTEGER_MAX:
            raise Refusal(Reason.INVALID_PAYLOAD, "the integer is beyond 64 bits", field=_spelt(where))
        elif isinstance(one, dict | list):
            if level > depth_max:
                message = f"would have more than {depth_max} levels"
                raise LimitExceeded(Reason.TOO_LARGE, message, limit=limit, value=depth_max, field=path)
            if isinstance(one, list):
                todo.extend((inner, (where, index), level + 1) for index, inner in enumerate(one))
                continue
            named += len(one)
            for name, inner in one.items():
                _refuse_nul(name, where)
                todo.append((inner, (where, name), level + 1))
    return named


_Where: TypeAlias = "tuple[_Where | None, str | int]"
"""What it is in, and its name or index there: spelt out only for what is at fault, a text may name 30,000 places."""


def _spelt(where: _Where) -> str:
    steps: list[str] = []
    inside, step = where
    while inside is not None:
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step}")
        inside, step = inside
    return "".join([str(step), *reversed(steps)])


def _refuse_nul(text: str, where: _Where) -> None:
    if "\x00" in text:
        raise Refusal(Reason.INVALID_PAYLOAD, "U+0000 cannot be stored", field=_spelt(where))
