"""Ids, tokens and who is admitted."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import (
    Device,
    Tenant,
    TokenDigest,
    admits,
    check_device_id,
    check_tenant_id,
    digest,
    make_token,
)
from pulse.domain.limits import Rate, TenantLimits
from pulse.domain.registry import (
    Record,
    decode_record,
    device_key,
    encode_record,
    record_key,
    same_admission,
    split_key,
    tenant_key,
)

NOW_MS = 1_700_000_000_000
TOKEN = make_token(bytes(range(32)))
OTHER = make_token(bytes(32))

ids = st.text("abcXYZ019_-", min_size=1, max_size=64)
tokens = st.builds(TokenDigest, st.binary(min_size=32, max_size=32), st.none() | st.integers(0, 2**62))
rates = st.builds(Rate, st.floats(0, 1_000_000), st.integers(1, 1_000_000_000))
limits = st.builds(TenantLimits, st.none() | rates, st.none() | rates)
devices = st.builds(Device, ids, ids, st.booleans(), st.lists(tokens, max_size=4).map(tuple))


def device(*known: TokenDigest, enabled: bool = True) -> Device:
    return Device("acme", "boiler-1", enabled, known)


@pytest.mark.parametrize("value", ["a", "A-z_09", "x" * 64])
def test_an_id_is_one_to_64_letters_digits_underscores_and_dashes(value: str) -> None:
    assert check_tenant_id(value) == value
    assert check_device_id(value) == value


@pytest.mark.parametrize("value", ["", "x" * 65, "a.b", "a b", "a/b", "*", ">", "a\n", "ä", "a\0", "\ud800"])
def test_anything_else_is_refused_and_the_field_is_named(value: str) -> None:
    with pytest.raises(Refusal) as tenant:
        check_tenant_id(value)
    assert (tenant.value.reason, tenant.value.field) == (Reason.INVALID_IDENTITY, "tenant_id")
    with pytest.raises(Refusal) as other:
        check_device_id(value, field="rows[3].device_id")
    assert other.value.field == "rows[3].device_id"


def test_a_token_is_the_prefix_and_base64url_of_32_bytes() -> None:
    assert make_token(b"\xfb\xff" * 16) == "pulse_" + "-__7__v_" * 5 + "-_8"
    assert len(TOKEN) == 49
    with pytest.raises(ValueError, match="32 random bytes"):
        make_token(b"short")


def test_the_digest_is_sha256_and_every_string_has_one() -> None:
    assert digest(TOKEN) == hashlib.sha256(TOKEN.encode()).digest()
    assert len(digest("\ud800 no text that UTF-8 knows")) == 32


def test_the_token_of_an_enabled_device_is_admitted_and_no_other() -> None:
    known = device(TokenDigest(digest(OTHER)), TokenDigest(digest(TOKEN)))
    assert admits(known, TOKEN, NOW_MS)
    assert admits(known, OTHER, NOW_MS)
    assert not admits(known, make_token(b"x" * 32), NOW_MS)
    assert not admits(known, "", NOW_MS)
    assert not admits(device(), TOKEN, NOW_MS)


def test_a_disabled_device_is_not_admitted_with_its_token() -> None:
    assert not admits(device(TokenDigest(digest(TOKEN)), enabled=False), TOKEN, NOW_MS)


def test_a_token_is_admitted_until_the_millisecond_at_which_it_expires() -> None:
    rotating = device(TokenDigest(digest(TOKEN), NOW_MS))
    assert admits(rotating, TOKEN, NOW_MS - 1)
    assert not admits(rotating, TOKEN, NOW_MS)


def test_the_wire_form_of_a_device_is_pinned() -> None:
    known = device(TokenDigest(b"\1" * 32), TokenDigest(b"\2" * 32, NOW_MS))
    assert encode_record(known) == (
        b'{"v":1,"enabled":true,"tokens":[{"digest":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="},'
        b'{"digest":"AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=","expires_at_ms":1700000000000}]}'
    )
    assert encode_record(Tenant("acme", enabled=False)) == b'{"v":1,"enabled":false}'
    own = TenantLimits(messages=Rate(50.0, 100), device_messages=Rate(0.5, 1))
    assert encode_record(Tenant("acme", enabled=True, limits=own)) == (
        b'{"v":1,"enabled":true,"limits":{"messages":{"per_s":50.0,"burst":100},'
        b'"device_messages":{"per_s":0.5,"burst":1}}}'
    )
    assert (tenant_key("acme"), device_key("acme", "b-1")) == ("tenant.acme", "device.acme.b-1")


@given(st.builds(Tenant, ids, st.booleans(), limits) | devices)
def test_a_record_comes_back_from_its_key_and_value(record: Record) -> None:
    assert decode_record(record_key(record), encode_record(record)) == record


def test_fields_that_a_later_version_adds_are_no_obstacle() -> None:
    assert decode_record("tenant.acme", b'{"v":1,"enabled":true,"plan":"gold"}') == Tenant("acme", enabled=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device.acme.b", b""),
        ("device.acme.b", b"{"),
        ("device.acme.b", b'{"v":1,"enabled":true}'),
        ("device.acme.b", b'{"v":1,"enabled":true,"tokens":[{"digest":"AQEB"}]}'),
        ("device.acme.b", b"\xff\xfe"),
        ("tenant.acme", b'{"v":1,"enabled":true,"limits":{"messages":{"per_s":-1,"burst":1}}}'),
        ("device.acme", b'{"v":1,"enabled":true,"tokens":[]}'),
        ("device.acme.b.c", b'{"v":1,"enabled":true,"tokens":[]}'),
        ("session.acme", b'{"v":1,"enabled":true}'),
    ],
)
def test_what_is_not_an_entry_is_none(key: str, value: bytes) -> None:
    assert decode_record(key, value) is None


def test_a_key_is_split_into_its_ids() -> None:
    assert split_key("device.acme.b-1") == ("acme", "b-1")
    assert split_key("tenant.acme") == ("acme", None)
    assert split_key("tenant.ac me") is None
    assert split_key("") is None


def test_expired_tokens_and_the_order_of_tokens_do_not_make_two_records_differ() -> None:
    a, b = TokenDigest(b"a" * 32), TokenDigest(b"b" * 32, NOW_MS + 1)
    expired = TokenDigest(b"c" * 32, NOW_MS)
    assert same_admission(device(a, b, expired), device(b, a), NOW_MS)
    assert not same_admission(device(a, b), device(a), NOW_MS)
    assert not same_admission(device(a), device(a, enabled=False), NOW_MS)
    assert not same_admission(device(a), None, NOW_MS)
    assert same_admission(None, None, NOW_MS)
