"""API keys: their secrets, when they open, and what they reach; names and attributes; tables of devices."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.access import (
    ApiKey,
    StoredKey,
    check_changes,
    check_reads,
    is_secret,
    make_secret,
    opens,
)
from pulse.domain.device_csv import parse_devices
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.identity import NewDevice, digest
from pulse.domain.labels import ATTRIBUTES_MAX, check_attributes, check_name, merged_attributes

NOW = datetime(2026, 3, 1, tzinfo=UTC)
SECRET = make_secret(bytes(range(32)))


def key(**changes: object) -> ApiKey:
    fields: dict[str, object] = {
        "key_id": 1, "name": "k", "tenant_id": None, "read_only": False, "created_at": NOW,
        "expires_at": None, "revoked_at": None, "last_used_at": None,
    }  # fmt: skip
    return ApiKey(**(fields | changes))  # type: ignore[arg-type]


def test_a_secret_is_its_prefix_and_256_random_bits() -> None:
    assert SECRET.startswith("pulsekey_")
    assert len(SECRET) == 52
    assert is_secret(SECRET)
    for other in ("", "pulsekey_", SECRET[:-1], SECRET + "x", SECRET + "\n", "pulse_" + SECRET[9:], SECRET[:-1] + "+"):
        assert not is_secret(other)
    with pytest.raises(ValueError, match="32 random bytes"):
        make_secret(bytes(31))


def test_a_key_opens_with_its_secret_until_it_expires_or_is_revoked() -> None:
    known = digest(SECRET)
    second = timedelta(seconds=1)
    assert opens(StoredKey(key(), known), SECRET, NOW)
    assert not opens(StoredKey(key(), known), SECRET[:-1] + "A", NOW)
    assert not opens(None, SECRET, NOW)
    assert opens(StoredKey(key(expires_at=NOW + second), known), SECRET, NOW)
    assert not opens(StoredKey(key(expires_at=NOW), known), SECRET, NOW)
    assert not opens(StoredKey(key(revoked_at=NOW - second), known), SECRET, NOW)


@pytest.mark.parametrize(
    ("tenant_id", "read_only", "reads", "changes"),
    [
        (None, False, {"acme", "other", None}, {"acme", "other", None}),
        (None, True, {"acme", "other", None}, set()),
        ("acme", False, {"acme"}, {"acme"}),
        ("acme", True, {"acme"}, set()),
    ],
)
def test_what_a_key_reaches(
    tenant_id: str | None, read_only: bool, reads: set[str | None], changes: set[str | None]
) -> None:
    mine = key(tenant_id=tenant_id, read_only=read_only)
    for check, allowed in ((check_reads, reads), (check_changes, changes)):
        for tenant in ("acme", "other", None):
            if tenant in allowed:
                check(mine, tenant)
            else:
                with pytest.raises(Refusal) as raised:
                    check(mine, tenant)
                assert raised.value.reason is Reason.FORBIDDEN


@given(st.text(max_size=250))
def test_a_name_that_is_taken_can_be_stored_and_shown(name: str) -> None:
    try:
        check_name(name)
    except Refusal:
        return
    assert name.encode().decode() == name
    assert not {"\x00", "\n", "\x1b", "\x9b"} & set(name)


def test_a_name_may_be_in_any_script() -> None:
    for name in ("", "Kessel – Süd", "ボイラー", "\U0001f525", "a\u00a0b"):
        assert check_name(name) == name


def test_attributes_are_scalars_that_json_and_int64_can_hold() -> None:
    good = {"text": "x", "yes": True, "n": -(2**63), "m": 2**63 - 1, "f": 1.5}
    assert check_attributes(good) == good
    wrong: tuple[object, ...] = (None, [], {}, 2**63, float("nan"), float("inf"), "x" * 1025, "\0")
    for bad in wrong:
        with pytest.raises(Refusal) as raised:
            check_attributes({"fine": 1, "a": bad})
        assert raised.value.field == "attributes.a"
    for attributes in ({"": 1}, {"x" * 129: 1}, {str(number): 1 for number in range(ATTRIBUTES_MAX + 1)}):
        with pytest.raises(Refusal):
            check_attributes(attributes)


def test_a_patch_merges_and_null_removes() -> None:
    assert merged_attributes({"a": 1, "b": 2}, {"b": None, "c": "x"}) == {"a": 1, "c": "x"}
    full: dict[str, object] = {str(number): 1 for number in range(ATTRIBUTES_MAX)}
    assert len(merged_attributes(full, {"0": None, "new": 1})) == ATTRIBUTES_MAX
    with pytest.raises(Refusal):
        merged_attributes(full, {"new": 1})
    over = {**full, "over": 1}
    assert len(merged_attributes(over, {"0": 2})) == ATTRIBUTES_MAX + 1, "what is too much already may shrink, and stay"


def test_a_table_is_read_row_by_row() -> None:
    rows = parse_devices(b'device_id,site,name\na,"north, east",A\nb,,\n\nc\n', rows_max=10)
    assert rows[0].outcome == NewDevice(device_id="a", name="A", attributes={"site": "north, east"})
    assert rows[1].outcome == NewDevice(device_id="b")
    assert [row.number for row in rows] == [1, 2, 3]
    assert isinstance(rows[2].outcome, Refusal)


def test_a_device_that_comes_twice_is_refused_the_second_time_but_not_for_a_row_that_was_refused() -> None:
    rows = parse_devices(b"device_id,name\na,x\na,y\nb,\0\nb,z\n", rows_max=10)
    assert [isinstance(row.outcome, NewDevice) for row in rows] == [True, False, False, True]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_refusal(body: bytes) -> None:
    for text in (body, b"device_id,name\n" + body):
        try:
            rows = parse_devices(text, rows_max=5)
        except Refusal:
            continue
        assert len(rows) <= 5
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))


def test_a_table_of_too_many_rows_names_the_limit() -> None:
    with pytest.raises(LimitExceeded) as raised:
        parse_devices(b"device_id\na\nb\n", rows_max=1)
    assert raised.value.limit == "import_rows_max"
