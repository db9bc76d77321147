"""uvicorn as one of our services: our signals, our socket, our bounds.

What a request may take to arrive is bounded in `http_bounds`; the way past ASGI is in `http_direct`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Iterator

import structlog
import uvicorn
from uvicorn.config import Config

from pulse.domain.errors import ConfigurationError
from pulse.runtime.http_bounds import BoundedProtocol
from pulse.runtime.http_direct import Application, Direct, Receive, Scope, Send

__all__ = ["Application", "Direct", "Receive", "Scope", "Send", "UvicornService"]

log = structlog.get_logger()

CANCEL_S_MAX = 0.5
BACKLOG = 2048
"""Connections that the kernel holds until they are accepted; Linux caps it at net.core.somaxconn."""

_WHY_NOT_BOUND = {
    errno.EADDRINUSE: "is taken by another process",
    errno.EADDRNOTAVAIL: "is no address of this machine",
    errno.EACCES: "may not be opened by this user",
}


async def too_many_connections(_scope: Scope, _receive: Receive, send: Send) -> None:
    """A 503 for whoever connects beyond what may; in RFC 9457's form, like all our errors."""
    body = b'{"status":503,"title":"Service Unavailable","detail":"too many connections","reason":"overloaded"}'
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class UvicornService:
    """Serves one ASGI application (`http` scopes only) on one address until it is told to stop.

    `port` 0 lets the system choose; `port` tells which once bound. `setting` is the prefix of the two settings that
    name the address (`gateway` for `gateway_host` and `gateway_port`). Told to stop, it accepts no more, lets the
    answers under way finish for `shutdown_s_max`, then cancels them. A request that has not arrived whole within
    `request_s_max` is answered 408; beyond `connections_max` connections every request is answered by `overloaded`,
    which is to be a 503. What `direct` matches need not come to `app`; it has to answer the same.
    """

    def __init__(
        self,
        *,
        name: str,
        app: Application,
        direct: Direct | None = None,
        overloaded: Application = too_many_connections,
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

        Protocol.connections_max = connections_max
        Protocol.overloaded = staticmethod(overloaded)
        Protocol.direct = direct

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
        """Until told to stop, renew the `Date` header every second and close what has been idle for too long."""
        while not self._stop.is_set():
            await self.on_tick(0)
            idle_since = asyncio.get_running_loop().time() - self.config.timeout_keep_alive
            for connection in list(self.server_state.connections):
                if isinstance(connection, BoundedProtocol) and connection.idle_since < idle_since:
                    connection.transport.close()
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
