"""A way past ASGI for the one request that nearly all requests are; docs/adr/0010 has the reasons and the figures.

    socket ─► httptools ─┬─ a POST to a path that `Direct` names, whole in one read ─► Direct.answer ─► one write
                         └─ anything else ─► uvicorn: scope, cycle, task, ASGI application

What httptools refuses is refused before either way. A request may go the direct way only if no other is being
answered on its connection and it is the first that its read brought, so that answers keep their order and a client
that does not read them fills one buffer at most; what is pipelined behind it waits in uvicorn's own queue, which is
bounded: uvicorn pauses reading only behind a read, and a read holds thousands of requests.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

log = structlog.get_logger()

PIPELINED_MAX = 64
"""Requests of one connection that may wait for an earlier one's answer; one more closes it (RFC 9112, 9.3.2)."""

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

Header: TypeAlias = tuple[bytes, bytes]
Respond: TypeAlias = Callable[[int, Sequence[Header], bytes], None]
"""Status, headers but for Date, Content-Length and Connection, body; to be called once, now or later."""
HEADS_KEPT = 64
_FAILED: tuple[int, Sequence[Header], bytes] = (500, [(b"content-type", b"text/plain")], b"Internal Server Error")


@dataclass(frozen=True, slots=True)
class Direct:
    """What answers a POST without ASGI, where `pattern` matches its whole target.

    `answer` gets the match, the headers with names in lower case, the body, and how to answer.
    """

    pattern: re.Pattern[bytes]
    answer: Callable[[re.Match[bytes], list[Header], bytes, Respond], None]


class TooManyPipelinedError(Exception):
    """Ends the parsing of a read; httptools turns it into an error of its own."""


class DirectProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the direct way, and with a bound on what is pipelined."""

    direct: Direct | None = None

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._exchange = Exchange(self)
        self._first_in_read = False
        self._match: re.Match[bytes] | None = None
        """Of a request that may go the direct way if the rest of it comes with the same read."""
        self._parts: list[bytes] = []
        self._broken = False
        """What came behind the request under way is no HTTP: its answer is the last."""
        self.idle_since = math.inf
        """When the last answer was complete, in the loop's seconds; infinity while anything is under way."""

    def data_received(self, data: bytes) -> None:
        """Parse; a request whose end this read has not brought goes to ASGI."""
        if self._broken:
            return
        self._first_in_read = True
        self.idle_since = math.inf
        super().data_received(data)
        if self._match is not None:
            self._match = None
            if not self.transport.is_closing():
                self._begin_cycle()
                for part in self._parts:
                    super().on_body(part)

    def on_message_begin(self) -> None:
        """The first bytes of a request; its scope is made where it turns out to need one.

        One too many closes the connection, and what else the read holds is not looked at.
        """
        if len(self.pipeline) >= PIPELINED_MAX:
            self.pipeline.clear()
            self.transport.close()
            raise TooManyPipelinedError
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Hold the request back if it may go the direct way."""
        if (
            self.direct is not None
            and self._first_in_read
            and (self.cycle is None or self.cycle.response_complete)
            and self.parser.get_method() == b"POST"
            and not self.parser.should_upgrade()
            and not self.flow.write_paused
            and self.app is self.config.loaded_app
        ):
            self._match = self.direct.pattern.fullmatch(self.url)
        self._first_in_read = False
        if self._match is None:
            self._begin_cycle()
        else:
            self._parts = []

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._match is None:
            super().on_body(body)
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        """The whole request is here: if it was held back, it goes the direct way."""
        match, self._match = self._match, None
        if match is None:
            super().on_message_complete()
            return
        exchange, parser = self._exchange, self.parser
        exchange.keep_alive = parser.get_http_version() != "1.0" and parser.should_keep_alive()
        exchange.response_complete = False
        self.cycle = exchange  # type: ignore[assignment]
        assert self.direct is not None
        try:
            self.direct.answer(match, self.headers, b"".join(self._parts), exchange.respond)
        except Exception:
            log.exception("a request on the direct way failed")
            exchange.respond(*_FAILED)

    def on_response_complete(self) -> None:
        """Begin the next request, if one waits. uvicorn's own would make a timer for each answer, at 1.5 µs."""
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        else:
            self.idle_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, and close; never in the place of an earlier request's answer."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            super().send_400_response(msg)
        elif not cycle.more_body:
            cycle.keep_alive = False
            self._broken = True
        elif self.pipeline or cycle.response_started:
            self.transport.close()
        else:
            super().send_400_response(msg)

    def shutdown(self) -> None:
        """Close as soon as what is under way is answered; the direct way's becomes a task that is waited for."""
        super().shutdown()
        if not self._exchange.response_complete:
            task = self.loop.create_task(self._exchange.answered().wait(), name="direct answer under way")
            self.tasks.add(task)  # type: ignore[arg-type]
            task.add_done_callback(self.tasks.discard)

    def _begin_cycle(self) -> None:
        """What uvicorn does at the beginning of a request and at the end of its headers."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()


class Exchange:
    """The request that its connection answers on the direct way, one after the other.

    The protocol knows it as `cycle`, for which it has what uvicorn's own asks of one.
    """

    __slots__ = ("_answered", "_protocol", "disconnected", "keep_alive", "response_complete")

    message_event = asyncio.Event()
    """Nobody waits for it."""
    more_body = False
    response_started = False
    """It starts and ends at once."""

    def __init__(self, protocol: DirectProtocol) -> None:
        self._protocol = protocol
        self._answered: asyncio.Event | None = None
        self.disconnected = False
        self.keep_alive = True
        self.response_complete = True

    def respond(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        """Write the answer, unless the client has gone."""
        assert not self.response_complete
        self.response_complete = True
        protocol = self._protocol
        transport = protocol.transport
        if not transport.is_closing():
            head = _head(status, tuple(headers), tuple(protocol.server_state.default_headers), self.keep_alive)
            transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
            if not self.keep_alive:
                transport.close()
        protocol.on_response_complete()
        if self._answered is not None:
            self._answered.set()

    def answered(self) -> asyncio.Event:
        """What is set once the request under way is answered."""
        self._answered = asyncio.Event()
        return self._answered


@lru_cache(HEADS_KEPT)
def _head(status: int, headers: tuple[Header, ...], date: tuple[Header, ...], keep_alive: bool) -> bytes:
    """The beginning of an answer, of which nearly all within a second have the same."""
    lines = [b"%b: %b\r\n" % header for header in (*date, *headers)]
    close = b"" if keep_alive else b"connection: close\r\n"
    return b"%b%b%b" % (STATUS_LINE[status], b"".join(lines), close)
