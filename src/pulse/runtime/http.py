"""uvicorn as one of our services: our signals, our socket, our bounds.

uvicorn bounds neither the time nor the size of a request that is still on its way: httptools takes headers without end,
and a connection that never sends a byte is never closed. `BoundedProtocol` adds both; how large a body may be is the
application's to say, since it alone reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from asyncio.events import TimerHandle
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, TypeAlias

import structlog
import uvicorn
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from pulse.domain.errors import ConfigurationError

log = structlog.get_logger()

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADER_BYTES_MAX = 32 * 1024
REQUEST_BYTES_MAX = 8 * 1024 * 1024
"""Of one request, framing and trailers included; both are counted from its second read on."""
CANCEL_S_MAX = 0.5
BACKLOG = 2048
"""Connections that the kernel holds until they are accepted; Linux caps it at net.core.somaxconn."""

_HEADERS_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_REQUEST_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_WHY_NOT_BOUND = {
    errno.EADDRINUSE: "is taken by another process",
    errno.EADDRNOTAVAIL: "is no address of this machine",
    errno.EACCES: "may not be opened by this user",
}


class UvicornService:
    """Serves one ASGI application (`http` scopes only) on one address until it is told to stop.

    `port` 0 lets the system choose; `port` tells which once bound. `setting` is the prefix of the two settings that
    name the address (`gateway` for `gateway_host` and `gateway_port`). Told to stop, it accepts no more, lets the
    answers under way finish for `shutdown_s_max`, then cancels them. A request that has not arrived whole within
    `request_s_max` is answered 408; beyond `connections_max` connections every request is answered 503.
    """

    def __init__(
        self,
        *,
        name: str,
        app: Application,
        host: str,
        port: int,
        setting: str,
        connections_max: int = 10_000,
        keep_alive_s: int = 75,
        request_s_max: float = 30.0,
        shutdown_s_max: float = 3.0,
    ) -> None:
        self.name = name
        self.host = host
        self.port = port
        self._setting = setting
        self._shutdown_s_max = shutdown_s_max
        self._listening: socket.socket | None = None

        class Protocol(BoundedProtocol):
            request_s = request_s_max

        self._config = Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            workers=1,
            backlog=BACKLOG,
            limit_concurrency=connections_max,
            timeout_keep_alive=keep_alive_s,
        )

    def bind(self) -> None:
        """Take the address now, so that a taken one is known before anything starts; `run` does it where nobody did.

        Raises ConfigurationError that names the address and its settings.
        """
        if self._listening is not None:
            return
        where = f"{self.name}: {self.host}:{self.port}"
        hint = f"change {self._setting}_host or {self._setting}_port"
        try:
            family, _, _, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
            # Inherited by each connection. asyncio does not see that this is TCP, and an answer is two writes, of which
            # the second would wait 40 ms for the client's delayed acknowledgement of the first.
            self._listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except socket.gaierror as error:
            raise ConfigurationError(f"{where}: no such host", hint=hint) from error
        except OSError as error:
            why = _WHY_NOT_BOUND.get(error.errno or 0, f"cannot be opened: {error.strerror}")
            raise ConfigurationError(f"{where} {why}", hint=hint) from error
        self.port = int(self._listening.getsockname()[1])

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then let the answers under way finish."""
        self.bind()
        assert self._listening is not None
        server = _Server(self._config, stop, self._shutdown_s_max)
        log.info("listening", service=self.name, url=f"http://{_bracketed(self.host)}:{self.port}")
        try:
            await server.serve(sockets=[self._listening])
        finally:
            server.close()
            self._listening.close()
            self._listening = None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, its exits of the process and its ten wake-ups a second."""

    def __init__(self, config: Config, stop: asyncio.Event, shutdown_s_max: float) -> None:
        super().__init__(config)
        self._stop = stop
        self._shutdown_s_max = shutdown_s_max
        self.servers: list[asyncio.base_events.Server] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the lifecycle's."""
        yield

    async def main_loop(self) -> None:
        """Until told to stop, renew the `Date` header every second."""
        while not self._stop.is_set():
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 1.0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and give what is under way its time."""
        self.close()
        for listening in sockets or []:
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if not await self._answered(self._shutdown_s_max):
            log.warning("answers cut off at shutdown", requests=len(self.server_state.tasks))
            for task in self.server_state.tasks:
                task.cancel()
            await self._answered(CANCEL_S_MAX)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.close()

    async def _answered(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.server_state.tasks and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(self.server_state.tasks, timeout=left)
        return not self.server_state.tasks

    def close(self) -> None:
        """Stop listening."""
        for server in self.servers:
            server.close()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with an end to what a request may take to arrive.

    A timer runs while the client owes us something: from the connection's first moment, and from the first part of
    each request that did not come whole in one read. One that did, as nearly all do, costs no timer.
    """

    request_s: float = 30.0

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
        if not self._in_request and self.cycle is not None and not self.cycle.response_complete:
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
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers are here."""
        self._in_headers = False
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
