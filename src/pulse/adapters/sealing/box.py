"""Secrets at rest: sealed so that who reads the table, or a backup of it, learns nothing, and can swap nothing.

    sealed = version (1 byte) | key id (4) | nonce (24) | XChaCha20-Poly1305 of the secret, bound to its context

The context says whose secret it is (`route/acme/r-1`): sealed text that is put into another row does not open there.
Several keys can be known at once: the first seals, all of them open, so that a key is replaced while everything runs.
Source: libsodium's `crypto_aead_xchacha20poly1305_ietf`, draft-irtf-cfrg-xchacha; ADR 17.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from nacl.exceptions import CryptoError
from nacl.secret import Aead

from pulse.domain.errors import ConfigurationError

VERSION = b"\x01"
KEY_ID_BYTES = 4
KEY_TEXT_LENGTH_MIN = 32
_PURPOSE = b"pulse sealing"
_HEAD_BYTES = len(VERSION) + KEY_ID_BYTES
_HINT = "set the setting `secret_keys` to the keys that these secrets were sealed with, the newest first"


class Sealer:
    """Seals and opens with keys made of random texts, the newest first; each has 32 characters or more."""

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys or any(len(key) < KEY_TEXT_LENGTH_MIN for key in keys):
            raise ConfigurationError(
                f"secrets are sealed with a key of {KEY_TEXT_LENGTH_MIN} characters or more", hint=_HINT
            )
        self._boxes: dict[bytes, Aead] = {}
        for text in keys:
            key = hashlib.blake2b(text.encode(), digest_size=Aead.KEY_SIZE, person=_PURPOSE).digest()
            self._boxes.setdefault(_key_id(key), Aead(key))
        self._current = next(iter(self._boxes))

    def __repr__(self) -> str:
        return f"Sealer(keys={[key_id.hex() for key_id in self._boxes]})"

    def seal(self, secret: bytes, *, context: str) -> bytes:
        """`secret` sealed with the newest key, for `context`; twice the same secret is two different texts."""
        head = VERSION + self._current
        return head + bytes(self._boxes[self._current].encrypt(secret, head + context.encode()))

    def open(self, sealed: bytes, *, context: str) -> bytes:
        """The secret; ConfigurationError where none of the keys is its own, or it was sealed for another context."""
        head = sealed[:_HEAD_BYTES]
        box = self._boxes.get(head[1:])
        if box is None or head[:1] != VERSION:
            raise ConfigurationError(f"a secret of {context} was sealed with a key that is not known", hint=_HINT)
        try:
            return bytes(box.decrypt(sealed[_HEAD_BYTES:], head + context.encode()))
        except (CryptoError, ValueError) as error:
            raise ConfigurationError(f"a secret of {context} does not open: it was changed, or moved") from error

    def is_current(self, sealed: bytes) -> bool:
        """Whether it was sealed with the newest key; what was not should be sealed again before the old key goes."""
        return sealed[:_HEAD_BYTES] == VERSION + self._current


def _key_id(key: bytes) -> bytes:
    """Names a key without telling anything of it."""
    return hashlib.blake2b(key, digest_size=KEY_ID_BYTES, person=b"pulse key id").digest()
