"""A webhook's other side, real and badly behaved: raw TCP servers on loopback, one per kind of trouble."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

HOST = "127.0.0.1"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Behaviour = Callable[["Sink", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Sink:
    """What has come in: connections, and requests whole with their heads."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.requests: list[bytes] = []
        self.asked = asyncio.Event()
        self.bytes_taken = 0

    def url(self, path: str = "/", *, host: str = HOST, scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


@asynccontextmanager
async def sink(behaviour: Behaviour, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Sink]:
    """A server on a free port that does `behaviour` on each connection until it is closed."""
    self = Sink()
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writers.add(writer)
        try:
            await behaviour(self, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            writers.discard(writer)

    server = await asyncio.start_server(serve, HOST, 0, ssl=tls)
    self.port = server.sockets[0].getsockname()[1]
    try:
        yield self
    finally:
        server.close()
        for writer in list(writers):
            writer.transport.abort()
        await server.wait_closed()


async def read_request(self: Sink, reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    [length] = [line.partition(b":")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    request = head + await reader.readexactly(int(length))
    self.requests.append(request)
    self.asked.set()
    return request


def answering(response: bytes = OK, *, times: int = 1_000_000) -> Behaviour:
    """Answers each request with `response`; closes the connection when it has done so `times`."""

    async def behave(self: Sink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(times):
            await read_request(self, reader)
            writer.write(response)
            await writer.drain()

    return behave


async def hanging(self: Sink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the request and says nothing."""
    await read_request(self, reader)
    await reader.read()


async def dripping(self: Sink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A header that never ends, a byte at a time."""
    await read_request(self, reader)
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"a")
        await writer.drain()
        await asyncio.sleep(0.02)


async def endless(self: Sink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A body without an end, as fast as it is taken."""
    await read_request(self, reader)
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x" * 65_536)
        await writer.drain()
        self.bytes_taken += 65_536


async def stalling_body(self: Sink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A status, and a body of which only a part comes."""
    await read_request(self, reader)
    writer.write(b"HTTP/1.1 503 No\r\nRetry-After: 7\r\nContent-Length: 100\r\n\r\npart")
    await reader.read()


async def hanging_up(self: Sink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the request and closes."""
    await read_request(self, reader)


async def garbage(self: Sink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Speaks neither HTTP nor TLS."""
    await reader.read(10)
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n" * 20)
    await writer.drain()
    await reader.read()
