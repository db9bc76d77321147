"""Rows of `telemetry` in COPY's binary format, put together by hand: nothing in it is escaped, parsed or rounded.

    row         number of fields (int16), then each field
    field       length in bytes (int32; -1 is NULL), then the value
    timestamptz µs since 2000-01-01 (int64)      bigint  int64      text  UTF-8      jsonb  version 1 (int8), then text

Source: PostgreSQL manual, COPY, "Binary Format"; `timestamptz_recv` and `jsonb_recv` of its source. The numbers' order
is the network's.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from pulse.domain.settlement import Row

TELEMETRY_COLUMNS = ("ts", "tenant_id", "device_id", "seq", "site_id", "metrics", "position")
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
EPOCH_2000_US = 946_684_800_000_000

_start_and_ts = Struct("!hiq").pack
_length = Struct("!i").pack
_bigint = Struct("!iq").pack
_seq_null_and_jsonb = Struct("!iqiib").pack
_jsonb = Struct("!ib").pack


def telemetry_rows(rows: Iterable[Row]) -> bytes:
    """The bytes of `rows`, which stand between HEADER and TRAILER; quicker where those of a device are side by side."""
    parts: list[bytes] = []
    tenant_id = device_id = device = None
    for row in rows:
        metrics = row.metrics
        if device is None or row.device_id != device_id or row.tenant_id != tenant_id:
            tenant_id, device_id = row.tenant_id, row.device_id
            device = _text(tenant_id) + _text(device_id)
        if row.seq is not None and row.site_id is None:
            between = _seq_null_and_jsonb(8, row.seq, -1, len(metrics) + 1, 1)
        else:
            seq = _length(-1) if row.seq is None else _bigint(8, row.seq)
            between = seq + _text(row.site_id) + _jsonb(len(metrics) + 1, 1)
        start = _start_and_ts(7, 8, row.ts_us - EPOCH_2000_US)
        parts += (start, device, between, metrics, _bigint(8, row.position))
    return b"".join(parts)


def _text(value: str | None) -> bytes:
    if value is None:
        return _length(-1)
    encoded = value.encode()
    return _length(len(encoded)) + encoded
