"""NATS's keys and tokens, as nats-server reads them: each part by its specification."""

from __future__ import annotations

import base64
import binascii
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import VerifyKey

from pulse.adapters.nats.auth_callout import subjects_of
from pulse.adapters.nats.nkeys import AccountKey, claims_of

SECRET = "a secret of a data folder, in 32"
texts = st.text(max_size=20)


def unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def raw_key(public: str) -> bytes:
    """The 32 bytes of a public key, by ADR-14: base32 of prefix, key and CRC-16."""
    whole = base64.b32decode(public)
    assert binascii.crc_hqx(whole[:-2], 0) == int.from_bytes(whole[-2:], "little")
    assert whole[0] == 0
    return whole[1:-2]


def test_a_public_key_is_an_account_s_and_the_same_at_every_start() -> None:
    key = AccountKey(SECRET)
    assert key.public.startswith("A")
    assert len(key.public) == 56
    assert len(raw_key(key.public)) == 32
    assert AccountKey(SECRET).public == key.public
    assert AccountKey(SECRET + "x").public != key.public


def test_a_key_never_shows_what_it_is_made_of() -> None:
    assert SECRET not in repr(AccountKey(SECRET))
    assert AccountKey(SECRET).public in repr(AccountKey(SECRET))


@given(subject=texts, user=texts, subjects=st.lists(texts, max_size=3))
def test_what_is_signed_can_be_verified_and_says_what_was_said(subject: str, user: str, subjects: list[str]) -> None:
    key = AccountKey(SECRET)
    token = key.sign(subject=subject, nats={"pub": {"allow": subjects}}, name=user, exp=5)
    text, _, signature = token.rpartition(".")
    VerifyKey(raw_key(key.public)).verify(text.encode(), unpadded(signature))
    head, _, body = text.partition(".")
    assert json.loads(unpadded(head)) == {"typ": "JWT", "alg": "ed25519-nkey"}
    claims = json.loads(unpadded(body))
    assert (claims["iss"], claims["sub"], claims["name"], claims["exp"]) == (key.public, subject, user, 5)
    assert claims["nats"] == {"pub": {"allow": subjects}}
    assert json.loads(claims_of(token.encode())) == claims


@pytest.mark.parametrize("token", [b"", b"a", b"a.b", b"a.b.c.d", b"a.x.c"])
def test_what_is_no_token_is_told(token: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        claims_of(token)


@pytest.mark.parametrize(
    ("topic", "subject"),
    [
        ("tenant/acme/device/t-1/telemetry", "tenant.acme.device.t-1.telemetry"),
        ("tenant/acme/device/t-1/shadow/name/+/get", "tenant.acme.device.t-1.shadow.name.*.get"),
        ("tenant/acme/route/#", "tenant.acme.route.> tenant.acme.route"),
    ],
)
def test_a_topic_is_known_to_nats_server_by_a_subject(topic: str, subject: str) -> None:
    assert subjects_of(topic) == subject.split()
