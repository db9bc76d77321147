"""NATS's own kind of key, and tokens signed with it.

An nkey is base32 of a prefix byte, 32 bytes and their CRC-16 (XMODEM, low byte first). A JWT of NATS is one of RFC 7519
with the algorithm `ed25519-nkey`. Source: ADR-14 of NATS, and its package jwt/v2.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import time
from collections.abc import Mapping

import msgspec
from nacl.signing import SigningKey

ACCOUNT_PREFIX = b"\0"
"""Makes the text of an account's public key begin with `A`."""
_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}


class AccountKey:
    """The key of an account: signs who may come in, and what he may do.

    It is the Ed25519 key whose seed is the SHA-256 of `secret`, so that `secret` can be any random text.
    """

    def __init__(self, secret: str) -> None:
        self._key = SigningKey(hashlib.sha256(secret.encode()).digest())
        body = ACCOUNT_PREFIX + bytes(self._key.verify_key)
        checksum = binascii.crc_hqx(body, 0).to_bytes(2, "little")
        self.public = base64.b32encode(body + checksum).rstrip(b"=").decode()
        """What nats-server knows the key by."""

    def __repr__(self) -> str:
        return f"AccountKey({self.public})"

    def sign(self, *, subject: str, nats: Mapping[str, object], **claims: object) -> str:
        """A JWT of ours about `subject`; `nats` are the claims of NATS, `claims` those of RFC 7519."""
        body: dict[str, object] = {"iat": int(time.time()), "iss": self.public, "sub": subject, "nats": nats, **claims}
        digest = hashlib.sha256(msgspec.json.encode(body)).digest()
        body["jti"] = base64.b32encode(digest).rstrip(b"=").decode()
        text = f"{_base64url(msgspec.json.encode(_HEADER))}.{_base64url(msgspec.json.encode(body))}"
        return f"{text}.{_base64url(self._key.sign(text.encode()).signature)}"


def claims_of(token: bytes) -> bytes:
    """The claims of a JWT as JSON, unverified: for one that came by a connection on which the server alone speaks.

    Raises ValueError for what is no JWT.
    """
    try:
        _, body, _ = token.split(b".")
    except ValueError as error:
        raise ValueError("a JWT has three parts") from error
    return base64.urlsafe_b64decode(body + b"=" * (-len(body) % 4))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
