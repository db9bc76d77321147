"""Request bodies: read within a bound, and inflated within the same bound. Source: RFC 9110 (8.4), RFC 1952, RFC 8878.

What arrives is collected first, which its bound limits; inflating it stops one byte above the bound, so that a bomb
costs its compressed bytes and no more.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
import zstandard

from pulse.api.problem import CONTENT_ENCODING
from pulse.domain.errors import LimitExceeded, Overloaded, Reason, Refusal

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

GZIP_WINDOW_BITS = 31
"""zlib's number for a window of 32 KiB and gzip's header and trailer."""
ZSTD_WINDOW_BYTES_MAX = 8 * 1024 * 1024
"""What RFC 9659 lets a `Content-Encoding: zstd` ask for."""
MEMBERS_MAX = 100
"""gzip members or zstd frames of one body: each costs a decoder of its own, however empty it is."""


class BodyBounds(msgspec.Struct, frozen=True, kw_only=True):
    """How large a request may be, with its content coding and without."""

    body_bytes_max: int
    batch_body_bytes_max: int
    batch_rows_max: int
    gateway_bodies_bytes_max: int
    """Of all bodies together that have arrived in part."""


class ClientGone(Exception):
    """The client closed the connection before its request was whole."""


class BodyReader:
    """Reads bodies; those that come in parts may together hold `pending_bytes_max` until they are whole."""

    def __init__(self, *, pending_bytes_max: int, received: Callable[[int], None]) -> None:
        self._pending_bytes_max = pending_bytes_max
        self._pending_bytes = 0
        self._received = received

    async def read(
        self, receive: Receive, *, bytes_max: int, limit: str, length: bytes | None, encoding: bytes | None
    ) -> bytes:
        """The body without its content coding, of at most `bytes_max` before and after; `limit` is that bound's name.

        `length` and `encoding` are the headers Content-Length and Content-Encoding. Raises LimitExceeded, Refusal for
        a coding that is unknown or broken, Overloaded, ClientGone.
        """
        inflate = _inflate_for(encoding, length, bytes_max, limit)
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = event.get("body", b"")
        if event.get("more_body", False):
            body = await self._rest(receive, body, bytes_max, limit)
        return self._content(body, inflate, bytes_max, limit)

    def whole(self, body: bytes, *, bytes_max: int, limit: str, length: bytes | None, encoding: bytes | None) -> bytes:
        """What `read` returns or raises where `body` has arrived whole."""
        return self._content(body, _inflate_for(encoding, length, bytes_max, limit), bytes_max, limit)

    def _content(self, body: bytes, inflate: Inflate | None, bytes_max: int, limit: str) -> bytes:
        if len(body) > bytes_max:
            raise _too_large(bytes_max, limit)
        self._received(len(body))
        return body if inflate is None else inflate(body, bytes_max, limit)

    async def _rest(self, receive: Receive, first: bytes, bytes_max: int, limit: str) -> bytes:
        body = bytearray()
        part, more = first, True
        try:
            while True:
                body += part
                self._pending_bytes += len(part)
                if len(body) > bytes_max:
                    raise _too_large(bytes_max, limit)
                if not more:
                    return bytes(body)
                if self._pending_bytes > self._pending_bytes_max:
                    raise Overloaded("gateway", "too many bodies are on their way")
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise ClientGone
                part, more = event.get("body", b""), event.get("more_body", False)
        finally:
            self._pending_bytes -= len(body)


Inflate = Callable[[bytes, int, str], bytes]


def _inflate_for(encoding: bytes | None, length: bytes | None, bytes_max: int, limit: str) -> Inflate | None:
    """How to undo the content coding of a body whose headers may be refused already."""
    inflate = None if encoding is None else _coding(encoding)
    if length is not None and int(length) > bytes_max:
        raise _too_large(bytes_max, limit)
    return inflate


def _coding(encoding: bytes) -> Inflate | None:
    """How to undo a Content-Encoding; None where there is nothing to undo."""
    name = encoding.strip().lower()
    if name in {b"", b"identity"}:
        return None
    inflate = _INFLATE.get(name)
    if inflate is None:
        raise Refusal(Reason.UNSUPPORTED_TYPE, "a body may be encoded as gzip or zstd, once", field=CONTENT_ENCODING)
    return inflate


def gunzip(data: bytes, bytes_max: int, limit: str) -> bytes:
    """The content of all gzip members of `data`."""
    inflated = b""
    for _ in range(MEMBERS_MAX):
        member = zlib.decompressobj(GZIP_WINDOW_BITS)
        try:
            inflated += member.decompress(data, bytes_max + 1 - len(inflated))
        except zlib.error as error:
            raise _broken("gzip") from error
        if len(inflated) > bytes_max:
            raise _too_large(bytes_max, limit)
        if not member.eof:
            raise _broken("gzip")
        data = member.unused_data
        if not data:
            return inflated
    raise _too_many_members()


def unzstd(data: bytes, bytes_max: int, limit: str) -> bytes:
    """The content of all zstd frames of `data`.

    python-zstandard has a reader that can be stopped but takes a frame that was cut off for a whole one, and a decoder
    that can tell but not be stopped. So the reader measures first, and the decoder inflates what is known to fit.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
    try:
        if len(decompressor.stream_reader(data, read_across_frames=True).read(bytes_max + 1)) > bytes_max:
            raise _too_large(bytes_max, limit)
        inflated = b""
        for _ in range(MEMBERS_MAX):
            frame = decompressor.decompressobj()
            inflated += frame.decompress(data)
            if not frame.eof:
                raise _broken("zstd")
            data = frame.unused_data
            if not data:
                return inflated
    except zstandard.ZstdError as error:
        raise _broken("zstd") from error
    raise _too_many_members()


_INFLATE: dict[bytes, Inflate] = {b"gzip": gunzip, b"x-gzip": gunzip, b"zstd": unzstd}


def _too_large(bytes_max: int, limit: str) -> LimitExceeded:
    return LimitExceeded(
        Reason.TOO_LARGE,
        f"a body may have {bytes_max} bytes, with its content coding and without",
        limit=limit,
        value=bytes_max,
    )


def _broken(coding: str) -> Refusal:
    return Refusal(Reason.INVALID_ENCODING, f"the body is no {coding}, or it is cut off", field=CONTENT_ENCODING)


def _too_many_members() -> Refusal:
    return Refusal(Reason.INVALID_ENCODING, f"a body may have {MEMBERS_MAX} members or frames", field=CONTENT_ENCODING)
