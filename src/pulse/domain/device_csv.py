"""Devices as a table: a header with `device_id`, maybe `name`; each other column is an attribute, unless it is empty.

device_id,name,site
boiler-1,Boiler,north
boiler-2,,south
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

import msgspec

from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.identity import NewDevice, check_device_id
from pulse.domain.labels import check_attributes, check_name

DEVICE_ID, NAME = "device_id", "name"
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


class Row(msgspec.Struct, frozen=True):
    """One line of the table, numbered from 1 behind the header: a device, or why it is none."""

    number: int
    device_id: str
    outcome: NewDevice | Refusal


def parse_devices(body: bytes, *, rows_max: int) -> list[Row]:
    """All rows of a CSV table in UTF-8. Source: RFC 4180; empty lines count for nothing.

    Raises Refusal where the table as a whole cannot be read: not UTF-8, no such header, a quote that is never closed,
    more than `rows_max` rows.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(Reason.INVALID_REQUEST, "the table must be UTF-8", position=error.start) from error
    reader = csv.reader((line[0] for line in _LINE.finditer(text)), strict=True)
    header: list[str] | None = None
    rows: list[Row] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = _header(cells)
                continue
            if len(rows) >= rows_max:
                message = f"a table may have {rows_max} rows"
                raise LimitExceeded(Reason.TOO_LARGE, message, limit="import_rows_max", value=rows_max)
            rows.append(_row(len(rows) + 1, header, cells))
    except csv.Error as error:
        raise Refusal(Reason.INVALID_REQUEST, f"line {reader.line_num} is no CSV: {error}") from error
    if header is None:
        raise Refusal(Reason.INVALID_REQUEST, f"the table needs a header with {DEVICE_ID}", field=DEVICE_ID)
    return list(_without_repeated(rows))


def _header(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if DEVICE_ID not in names:
        raise Refusal(Reason.INVALID_REQUEST, f"the header must name {DEVICE_ID}", field=DEVICE_ID)
    if len(set(names)) != len(names):
        raise Refusal(Reason.INVALID_REQUEST, "the header names a column twice")
    return names


def _row(number: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        message = f"has {len(cells)} cells, and the header {len(header)}"
        return Row(number, "", Refusal(Reason.INVALID_REQUEST, message))
    given = dict(zip(header, cells, strict=True))
    device_id, name = given.pop(DEVICE_ID).strip(), given.pop(NAME, "")
    try:
        return Row(
            number,
            device_id,
            NewDevice(
                device_id=check_device_id(device_id),
                name=check_name(name),
                attributes=check_attributes({column: cell for column, cell in given.items() if cell}),
            ),
        )
    except Refusal as refusal:
        return Row(number, device_id, refusal)


def _without_repeated(rows: list[Row]) -> Iterator[Row]:
    """The first row that is a device; one that comes again is refused."""
    seen: set[str] = set()
    for row in rows:
        if not isinstance(row.outcome, NewDevice):
            yield row
        elif row.device_id in seen:
            yield Row(row.number, row.device_id, Refusal(Reason.CONFLICT, "is in the table twice", field=DEVICE_ID))
        else:
            seen.add(row.device_id)
            yield row
