"""JSON on the command line: as it stands there, from a file, or from stdin; and refusals that say which part of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.json_text import check_storable, read_json, refuse_repeated_keys

BYTES_MAX = 1024 * 1024
"""Of a file, or of stdin: far above what any shadow or command may have."""
DEPTH_MAX = 1000
STDIN, FILE = "-", "@"

_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


class Json(msgspec.Struct, frozen=True):
    """What was read; a struct, so that click does not take a value for one that it has yet to convert."""

    value: Any


class JsonArgument(click.ParamType[Json]):
    """A JSON text, @FILE, or - for stdin; `path` is what the parts of it are named by."""

    name = "json"

    def __init__(self, path: str, *, of_object: bool = False) -> None:
        self._path = path
        self._of_object = of_object

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Json:
        """Read it."""
        if isinstance(value, Json):
            return value
        text = self._text(value, param, ctx)
        try:
            read = read_json(_decoder, text)
            refuse_repeated_keys(text, check_storable(read, self._path, depth_max=DEPTH_MAX, limit=""))
        except Refusal as refusal:
            self.fail(said(refusal), param, ctx)
        if self._of_object and not isinstance(read, dict | None):
            self.fail("it must be a JSON object, or null", param, ctx)
        return Json(read)

    def _text(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if value == STDIN:
            text = sys.stdin.buffer.read(BYTES_MAX + 1)
        elif value.startswith(FILE):
            try:
                with Path(value[len(FILE) :]).open("rb") as file:
                    text = file.read(BYTES_MAX + 1)
            except OSError as error:
                self.fail(f"{value[len(FILE) :]}: {error.strerror}", param, ctx)
        else:
            text = value.encode("utf-8", "surrogateescape")
        if len(text) > BYTES_MAX:
            self.fail(f"it is longer than {BYTES_MAX} bytes", param, ctx)
        return text


def said(refusal: Refusal) -> str:
    """The refusal in words, with the path of what is at fault, and the setting that bounds it."""
    where = f"{refusal.field}: " if refusal.field else ""
    bound = f"; {refusal.limit} is {refusal.value:.10g}" if isinstance(refusal, LimitExceeded) and refusal.limit else ""
    return f"{where}{refusal.message}{bound}"


@contextmanager
def explained(hints: Mapping[Reason, str]) -> Iterator[None]:
    """What is refused within says which part is at fault, and by its reason what to do."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(refusal.reason, _with_hint(said(refusal), hints.get(refusal.reason)), field=refusal.field) from (
            refusal
        )


def _with_hint(message: str, hint: str | None) -> str:
    return f"{message} ({hint})" if hint else message
