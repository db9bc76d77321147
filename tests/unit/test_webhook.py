"""Standard Webhooks: the reference verifier accepts what we sign, during a rotation too."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from pulse.domain.errors import Refusal
from pulse.domain.webhook import SigningSecrets, make_secret, read_secret, signature, signed_headers

OLD, NEW, OTHER = (make_secret(bytes([number]) * 32) for number in (1, 2, 3))
NOW_S = int(datetime.now(UTC).timestamp())
"""The reference verifier has a clock of its own, and takes five minutes either way."""


def verifies(secret: str, headers: dict[str, str], body: str) -> bool:
    try:
        Webhook(secret).verify(body, headers)
    except WebhookVerificationError:
        return False
    return True


@given(st.dictionaries(st.text(max_size=10), st.text(max_size=20)), st.binary(min_size=24, max_size=64))
def test_the_reference_verifier_accepts_what_is_signed(payload: dict[str, str], randomness: bytes) -> None:
    body = str(payload).replace("'", '"')
    try:
        body.encode()
    except UnicodeEncodeError:
        return
    secret = make_secret(randomness)
    headers = signed_headers([secret], message_id="17592186044423:r-1", timestamp_s=NOW_S, body=body.encode())
    timestamp = datetime.fromtimestamp(NOW_S, UTC)
    assert headers["webhook-signature"] == Webhook(secret).sign("17592186044423:r-1", timestamp, body)


def test_during_a_rotation_the_old_and_the_new_secret_verify_and_afterwards_only_the_new() -> None:
    secrets = SigningSecrets(OLD).rotated(NEW, now_s=NOW_S, overlap_s=3600)
    body = '{"temp":21.5}'
    during = signed_headers(secrets.valid(NOW_S), message_id="1:r", timestamp_s=NOW_S, body=body.encode())
    later = signed_headers(secrets.valid(NOW_S + 3600), message_id="1:r", timestamp_s=NOW_S, body=body.encode())
    assert [verifies(each, during, body) for each in (OLD, NEW, OTHER)] == [True, True, False]
    assert [verifies(each, later, body) for each in (OLD, NEW, OTHER)] == [False, True, False]


@pytest.mark.parametrize("part", ["webhook-id", "webhook-timestamp", "webhook-signature", "body"])
def test_a_change_of_any_part_is_noticed(part: str) -> None:
    headers = signed_headers([NEW], message_id="1:r", timestamp_s=NOW_S, body=b'{"a":1}')
    body = '{"a":1}'
    assert verifies(NEW, headers, body)
    if part == "body":
        body = '{"a":2}'
    elif part == "webhook-timestamp":
        headers[part] = str(NOW_S - 1)
    else:
        headers[part] = headers[part][:-2] + "xx"
    assert not verifies(NEW, headers, body)


def test_without_an_overlap_the_old_secret_ends_at_once() -> None:
    assert SigningSecrets(OLD).rotated(NEW, now_s=NOW_S, overlap_s=0).valid(NOW_S) == (NEW,)


def test_a_second_rotation_ends_the_oldest_secret() -> None:
    twice = SigningSecrets(OLD).rotated(NEW, now_s=NOW_S, overlap_s=60).rotated(OTHER, now_s=NOW_S, overlap_s=60)
    assert twice.valid(NOW_S) == (OTHER, NEW)


@pytest.mark.parametrize("overlap_s", [-1, 31 * 86_400])
def test_an_overlap_has_bounds(overlap_s: int) -> None:
    with pytest.raises(Refusal, match="two secrets"):
        SigningSecrets(OLD).rotated(NEW, now_s=NOW_S, overlap_s=overlap_s)


def test_rotating_to_the_same_secret_is_refused() -> None:
    with pytest.raises(Refusal, match="already"):
        SigningSecrets(OLD).rotated(OLD, now_s=NOW_S, overlap_s=60)


SHORT = "whsec_" + base64.b64encode(bytes(23)).decode()
LONG = "whsec_" + base64.b64encode(bytes(65)).decode()


@pytest.mark.parametrize("text", ["", "whsec_", OLD[6:], SHORT, LONG, OLD[:-1], OLD + "!", "whsec_ü" + OLD[7:]])
def test_what_is_no_secret_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_secret(text)
    assert caught.value.field == "secret"
    assert len(text) < 8 or text not in str(caught.value)


def test_secrets_are_not_shown_by_accident() -> None:
    shown = repr(SigningSecrets(OLD, NEW, 7)) + str(SigningSecrets(OLD, NEW, 7))
    assert OLD not in shown
    assert NEW not in shown


@pytest.mark.parametrize("message_id", ["1.2:r", "é"])
def test_an_id_that_would_make_the_signature_ambiguous_is_a_bug(message_id: str) -> None:
    with pytest.raises(ValueError, match="cannot be the id"):
        signature(OLD, message_id=message_id, timestamp_s=NOW_S, body=b"")
