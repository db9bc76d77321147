"""What a request may take to arrive: time and bytes. uvicorn bounds neither.

httptools takes headers without end, and a connection that never sends a byte is never closed. How large a body may be
is the application's to say, since it alone reads it.
"""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from pulse.runtime.http_direct import Application, DirectProtocol

HEADER_BYTES_MAX = 32 * 1024
REQUEST_BYTES_MAX = 8 * 1024 * 1024
"""Of one request, framing and trailers included; both are counted from its second read on."""

_HEADERS_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_REQUEST_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedProtocol(DirectProtocol):
    """uvicorn's protocol, with an end to what a request may take to arrive, and to how many connections are served.

    A timer runs while the client owes us something: from the connection's first moment, and from the first part of
    each request that did not come whole in one read. One that did, as nearly all do, costs no timer.
    """

    request_s: float
    connections_max: int
    overloaded: Application
    """Answers for the application while there are more connections than `connections_max`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._deadline: TimerHandle | None = None
        self._began = self._in_headers = self._in_request = False
        self._more_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection has to begin to say something."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.request_s, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more to wait for."""
        self._owes_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, then see whether the request has arrived whole."""
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if not self._in_request and (self._began or answering):
            self._began = False
            if self._deadline is not None:
                self._owes_nothing()
            return
        if self.transport.is_closing():
            return
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.request_s, self._too_late)
        if self._began:
            self._began = False
            self._more_bytes = 0
            return
        self._more_bytes += len(data)
        if self._more_bytes > (HEADER_BYTES_MAX if self._in_headers else REQUEST_BYTES_MAX):
            self._refuse(_HEADERS_TOO_LARGE if self._in_headers else _TOO_LARGE)

    def on_message_begin(self) -> None:
        """The first bytes of a request."""
        self._began = self._in_request = self._in_headers = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; a trailer, which may not be merged into the headers (RFC 9110, 6.5.1), is dropped."""
        if self._in_headers:
            name = name.lower()
            if name == b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """All headers are here."""
        self._in_headers = False
        fits = len(self.connections) <= self.connections_max
        self.app = self.config.loaded_app if fits else self.overloaded
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The whole request is here."""
        self._in_request = False
        super().on_message_complete()

    def _owes_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        self._refuse(_REQUEST_TIMEOUT)

    def _refuse(self, answer: bytes) -> None:
        """Close, with `answer` where a request has begun that nothing of an answer was sent to."""
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        unanswered = not answering if self._in_headers else answering and not self.cycle.response_started
        if self._in_request and unanswered and not self.pipeline:
            self.transport.write(answer)
        self.transport.close()
