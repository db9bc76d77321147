"""argon2id for the console's accounts; satisfies `services.sign_in.Passwords`. Source: RFC 9106."""

from __future__ import annotations

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError


class Argon2Passwords:
    """Each call takes some 50 ms and 64 MiB: call it in a thread."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher()
        self._nobodys: str | None = None

    def hash(self, password: str) -> str:
        """With parameters and salt, in the PHC string format."""
        return self._hasher.hash(password)

    def verify(self, password_hash: str | None, password: str) -> bool:
        """Whether it is the password of that hash; the work is the same where there is none."""
        if password_hash is None and self._nobodys is None:
            self._nobodys = self._hasher.hash("nobody's")
        try:
            same = self._hasher.verify(password_hash or self._nobodys or "", password)
        except (VerificationError, InvalidHashError):
            return False
        return same and password_hash is not None

    def renewed(self, password_hash: str, password: str) -> str | None:
        """A new hash where that one was made with older parameters."""
        return self._hasher.hash(password) if self._hasher.check_needs_rehash(password_hash) else None
