"""Standard Webhooks: the headers of a request, its signature, and secrets that can be rotated.

    webhook-id: 17592186044423:r-alarm          the same in every attempt at one message
    webhook-timestamp: 1790000000               of this attempt, in seconds since the epoch
    webhook-signature: v1,K5oZ… v1,9tQx…        HMAC-SHA256 of `id.timestamp.body`, with each secret that is valid now

Source: the Standard Webhooks specification 1.0.0 (symmetric signatures).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

import msgspec

from pulse.domain.errors import Reason, Refusal

SECRET_PREFIX = "whsec_"  # noqa: S105 (the prefix is public: it lets secret scanners find a leaked secret)
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64
SECRET_RANDOM_BYTES = 32
OVERLAP_S_MAX = 30 * 86_400
VERSION = "v1"


class SigningSecrets(msgspec.Struct, frozen=True):
    """The secrets of one webhook: `current`, and until `previous_until_s` (since the epoch) the one before it."""

    current: str
    previous: str = ""
    previous_until_s: int = 0

    def __repr__(self) -> str:
        """Nothing of what may not be in a log."""
        return f"SigningSecrets(previous_until_s={self.previous_until_s})"

    def valid(self, now_s: int) -> tuple[str, ...]:
        """Those that a request is signed with now, the newest first."""
        return (self.current, self.previous) if self.previous and now_s < self.previous_until_s else (self.current,)

    def rotated(self, secret: str, *, now_s: int, overlap_s: int) -> SigningSecrets:
        """After `secret` has taken over; the one before is valid for `overlap_s` more, older ones end at once."""
        read_secret(secret)
        if not 0 <= overlap_s <= OVERLAP_S_MAX:
            message = f"two secrets are valid for 0 to {OVERLAP_S_MAX} s"
            raise Refusal(Reason.INVALID_REQUEST, message, field="overlap_s")
        if hmac.compare_digest(secret, self.current):
            raise Refusal(Reason.CONFLICT, "this is the secret already", field="secret")
        return SigningSecrets(secret, self.current if overlap_s else "", now_s + overlap_s if overlap_s else 0)


def make_secret(randomness: bytes) -> str:
    """The secret of 24 to 64 random bytes: `whsec_` and their base64."""
    if not SECRET_BYTES_MIN <= len(randomness) <= SECRET_BYTES_MAX:
        raise ValueError(f"a secret is made of {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} random bytes")
    return SECRET_PREFIX + base64.b64encode(randomness).decode()


def read_secret(secret: str, *, field: str = "secret") -> bytes:
    """The bytes of a secret; Refusal INVALID_REQUEST, which does not repeat it, where it is none."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or not SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX:
        message = f"a secret is {SECRET_PREFIX} and the base64 of {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes"
        raise Refusal(Reason.INVALID_REQUEST, message, field=field) from None
    return key


def signature(secret: str, *, message_id: str, timestamp_s: int, body: bytes) -> str:
    """`v1,` and the base64 of the HMAC; `message_id` must be ASCII without a full stop."""
    if not message_id.isascii() or "." in message_id:
        raise ValueError(f"{message_id!r} cannot be the id of a webhook")
    signed = b"%b.%d.%b" % (message_id.encode("ascii"), timestamp_s, body)
    return f"{VERSION},{base64.b64encode(hmac.digest(read_secret(secret), signed, hashlib.sha256)).decode()}"


def signed_headers(secrets: Sequence[str], *, message_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The three headers of one attempt, signed with each of `secrets`."""
    if not secrets:
        raise ValueError("a webhook is signed with at least one secret")
    signatures = [signature(each, message_id=message_id, timestamp_s=timestamp_s, body=body) for each in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": " ".join(signatures),
    }
