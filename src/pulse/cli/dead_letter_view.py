"""Dead letters on a terminal and as JSON. What they say is shown and never obeyed: see `tail_line.escaped`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec
from rich.table import Table
from rich.text import Text

from pulse.cli.tail_line import escaped
from pulse.domain.dead_letter import Letter, Summary, parse_headers

ERROR_LENGTH_MAX = 60
"""In a table; `show` has all of it."""
SHOWN_BYTES_MAX = 4096
"""Of a body, unless all of it is asked for."""
HEX_BYTES = 16


def table_of(page: Sequence[Summary]) -> Table:
    """One line each."""
    table = Table(box=None, pad_edge=False)
    for name in ("id", "died", "from", "reason", "error", "bytes", "state"):
        table.add_column(name, justify="right" if name in ("id", "bytes") else "left", no_wrap=name != "error")
    for one in page:
        error = one.error if len(one.error) <= ERROR_LENGTH_MAX else f"{one.error[: ERROR_LENGTH_MAX - 1]}…"
        table.add_row(
            str(one.id),
            f"{one.died_at:%Y-%m-%d %H:%M:%S}",
            _safe(_whose(one)),
            _safe(one.reason),
            _safe(error),
            f"{one.body_bytes:,}",
            Text("replayed", style="green") if one.replays else Text("waiting", style="yellow"),
        )
    return table


def fields_of(letter: Letter) -> Table:
    """All that is known of a letter but its body."""
    one = letter.summary
    table = Table.grid(padding=(0, 2))
    table.add_row("dead letter", str(one.id))
    table.add_row("from", _safe(_whose(one)))
    where = f"message {one.sequence}" if one.sequence is not None else "which it never came into"
    table.add_row("stream", _safe(f"{one.stream}, {where}"))
    table.add_row("subject", _safe(one.subject))
    if one.route_id is not None:
        table.add_row("route", _safe(one.route_id))
    table.add_row("reason", _safe(one.reason))
    table.add_row("error", _safe(one.error))
    table.add_row("attempts", str(one.attempts))
    table.add_row("published", _time(one.published_at))
    table.add_row("died", _time(one.died_at))
    if one.replay_of is not None:
        table.add_row("replay of", f"dead letter {one.replay_of}")
    if one.replayed_at is not None:
        again = f"{one.replays} times, last" if one.replays > 1 else "once,"
        message = f"as message {one.replayed_sequence} of {one.stream}"
        table.add_row("replayed", _safe(f"{again} {_time(one.replayed_at)} {message}"))
    if letter.died_again_as:
        table.add_row("died again as", ", ".join(f"dead letter {each}" for each in letter.died_again_as))
    for name, value in parse_headers(letter.headers).items():
        table.add_row("header", _safe(f"{name}: {value}"))
    return table


def body_lines(body: bytes, *, whole: bool) -> Iterator[str]:
    """A body for people: JSON indented, text as it is, all else as a hexdump; cut off unless `whole`."""
    try:
        text = msgspec.json.format(body, indent=2).decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = _as_text(body)
    left = len(text) if whole else SHOWN_BYTES_MAX
    if text:
        yield from (escaped(line) for line in text[:left].split("\n"))
        cut = len(text) - left
    else:
        left = len(body) if whole else SHOWN_BYTES_MAX
        yield from _hexdump(body[:left])
        cut = len(body) - left
    if cut > 0:
        yield f"… and {cut:,} more; --full shows all of it"


def _as_text(body: bytes) -> str:
    """`body` as text, where it is some; else empty. A NUL, or much that cannot be seen, is not text."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return ""
    unseen = sum(1 for one in text if not one.isprintable() and one not in "\r\n\t")
    return "" if "\x00" in text or unseen * 10 > len(text) else text


def _hexdump(body: bytes) -> Iterator[str]:
    """`00000010  7b 22 74 65 73 74 22 3a  31 7d                     |{"test":1}|`"""
    if not body:
        yield "(empty)"
    for start in range(0, len(body), HEX_BYTES):
        row = body[start : start + HEX_BYTES]
        digits = [f"{byte:02x}" for byte in row] + ["  "] * (HEX_BYTES - len(row))
        half = HEX_BYTES // 2
        shown = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        yield f"{start:08x}  {' '.join(digits[:half])}  {' '.join(digits[half:])}  |{shown}|"


def _whose(one: Summary) -> str:
    return f"{one.tenant_id or '?'}/{one.device_id or '?'}"


def _safe(text: str) -> Text:
    """Without markup of rich's, and without anything that a terminal would act on."""
    return Text(escaped(text))


def _time(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d %H:%M:%S %Z}"
