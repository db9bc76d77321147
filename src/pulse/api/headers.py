"""The headers of a device's request that mean something to us."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pulse.domain.errors import Reason, Refusal

IDEMPOTENCY_KEY = "Idempotency-Key"


class Headers(msgspec.Struct, gc=False):
    """As they came, None where they did not; `token` is that of `Authorization: Bearer` or `X-Provision-Token`."""

    token: str | None = None
    content_type: bytes | None = None
    content_length: bytes | None = None
    content_encoding: bytes | None = None
    idempotency_key: str | None = None

    def check_media_type(self, *accepted: bytes) -> bytes:
        """The one of `accepted` that the body is, the first where nothing is said; Refusal UNSUPPORTED_TYPE."""
        if self.content_type is None or self.content_type == accepted[0]:
            return accepted[0]
        media_type = self.content_type.partition(b";")[0].strip().lower()
        if media_type not in accepted:
            wanted = b" or ".join(accepted).decode()
            raise Refusal(Reason.UNSUPPORTED_TYPE, f"the body must be {wanted}", field="Content-Type")
        return media_type


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Read the headers of an ASGI scope, whose names come in lower case.

    Raises Refusal for a repeated Idempotency-Key: which of them would a retry repeat?
    """
    found = Headers()
    for name, value in headers:
        if name == b"authorization":
            scheme, _, credentials = value.partition(b" ")
            if scheme.lower() == b"bearer":
                found.token = credentials.strip().decode("latin-1")
        elif name == b"content-type":
            found.content_type = value
        elif name == b"content-length":
            found.content_length = value
        elif name == b"idempotency-key":
            if found.idempotency_key is not None:
                raise Refusal(Reason.INVALID_PAYLOAD, "Idempotency-Key came twice", field=IDEMPOTENCY_KEY)
            found.idempotency_key = value.decode("latin-1")
        elif name == b"content-encoding":
            more = found.content_encoding
            found.content_encoding = value if more is None else more + b", " + value
        elif name == b"x-provision-token":
            found.token = found.token or value.decode("latin-1")
    return found
