"""What is put together for COPY reads back field by field."""

from __future__ import annotations

from struct import unpack_from

from hypothesis import given
from hypothesis import strategies as st

from pulse.adapters.postgres.binary_copy import EPOCH_2000_US, TELEMETRY_COLUMNS, telemetry_rows
from pulse.domain.settlement import Row

bigints = st.integers(-(2**63), 2**63 - 1)
texts = st.text(max_size=70)
rows = st.builds(
    Row,
    position=bigints,
    ts_us=st.integers(0, 253_402_300_799_999_999),
    tenant_id=texts,
    device_id=texts,
    seq=st.none() | bigints,
    site_id=st.none() | texts,
    metrics=st.binary(max_size=300),
)


def fields(data: bytes) -> list[list[bytes | None]]:
    """COPY's binary format without its header and trailer, by the PostgreSQL manual."""
    at, read = 0, []
    while at < len(data):
        (count,) = unpack_from("!h", data, at)
        at += 2
        row: list[bytes | None] = []
        for _ in range(count):
            (length,) = unpack_from("!i", data, at)
            at += 4
            row.append(None if length < 0 else data[at : at + length])
            at += max(0, length)
        read.append(row)
    return read


def expected(row: Row) -> list[bytes | None]:
    return [
        (row.ts_us - EPOCH_2000_US).to_bytes(8, "big", signed=True),
        row.tenant_id.encode(),
        row.device_id.encode(),
        None if row.seq is None else row.seq.to_bytes(8, "big", signed=True),
        None if row.site_id is None else row.site_id.encode(),
        b"\1" + row.metrics,
        row.position.to_bytes(8, "big", signed=True),
    ]


@given(st.lists(rows, max_size=5))
def test_every_field_reads_back(given_rows: list[Row]) -> None:
    assert fields(telemetry_rows(given_rows)) == [expected(row) for row in given_rows]


def test_a_row_has_a_field_for_each_column() -> None:
    row = Row(position=1, ts_us=0, tenant_id="t", device_id="d", seq=None, site_id=None, metrics=b"{}")
    assert len(fields(telemetry_rows([row]))[0]) == len(TELEMETRY_COLUMNS)
