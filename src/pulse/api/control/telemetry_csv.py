"""Telemetry as CSV. Source: RFC 4180.

    rows, metrics named      ts, seq, site_id, position, then a column for each metric
    rows, all metrics        ts, seq, site_id, position, metrics: JSON in one cell, as names are not known yet
    buckets                  ts, then a column for each metric

A text stands in its cell as it is, anything else in JSON; a metric that a row lacks is an empty cell.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

import msgspec

from pulse.domain.query import Bucket, StoredReading

ROW_COLUMNS = ("ts", "seq", "site_id", "position")

_metrics = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text = msgspec.json.Decoder(str)


def rows_header(metrics: Sequence[str] | None) -> bytes:
    """The first line of `rows_csv`."""
    return _lines([[*ROW_COLUMNS, *(["metrics"] if metrics is None else metrics)]])


def rows_csv(rows: Iterable[StoredReading], metrics: Sequence[str] | None) -> bytes:
    """A line for each row."""
    return _lines(
        [
            msgspec.to_builtins(row.ts),
            "" if row.seq is None else row.seq,
            row.site_id or "",
            row.position,
            *_row_cells(row, metrics),
        ]
        for row in rows
    )


def buckets_csv(buckets: Sequence[Bucket], metrics: Sequence[str] | None) -> bytes:
    """A header, and a line for each bucket."""
    names = metrics or sorted({name for bucket in buckets for name in bucket.metrics})
    lines = ([msgspec.to_builtins(each.ts), *(_cell(each.metrics.get(name)) for name in names)] for each in buckets)
    return _lines([["ts", *names]]) + _lines(lines)


def _row_cells(row: StoredReading, metrics: Sequence[str] | None) -> list[str]:
    if metrics is None:
        return [bytes(row.metrics).decode()]
    values = _metrics.decode(row.metrics)
    return [_cell(values.get(name)) for name in metrics]


def _cell(value: msgspec.Raw | None) -> str:
    if value is None:
        return ""
    raw = bytes(value)
    return _text.decode(raw) if raw.startswith(b'"') else raw.decode()


def _lines(lines: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(lines)
    return buffer.getvalue().encode()
