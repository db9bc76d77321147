"""UvicornService over real connections: its stop, its address, and the bounds on what a client may do.

Run on uvloop, as the commands are; what concerns a request, on both ways: through ASGI, and past it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Sequence

import pytest
from prometheus_client import CollectorRegistry

from pulse.cli.context import as_async
from pulse.domain.errors import ConfigurationError
from pulse.runtime import http_bounds
from pulse.runtime.health import Dependency, HealthServer
from pulse.runtime.http import Application, Direct, Receive, Scope, Send, UvicornService
from pulse.runtime.http_direct import PIPELINED_MAX, Header, Respond

LIMIT_S = 60.0
REQUEST_S_MAX = 0.5
"""Longer than a busy machine may pause between a connection and what is said on it."""
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


@pytest.fixture(params=["asgi", "direct"])
def way(request: pytest.FixtureRequest) -> str:
    """How a POST to `/` that comes whole is answered."""
    return str(request.param)


class Answering:
    """An application that reads the body, waits for `answer_now`, and answers with the number of bytes."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.answer_now = asyncio.Event()
        self.answer_now.set()
        self.outcomes: list[str] = []
        self.ways: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def direct(self, _match: re.Match[bytes], _headers: Sequence[Header], body: bytes, respond: Respond) -> None:
        """The same without ASGI, by a task of its own: what JetStream's answer is in the gateway."""
        task = asyncio.ensure_future(self._respond(body, respond))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _respond(self, body: bytes, respond: Respond) -> None:
        self.ways.add("direct")
        self.arrived.set()
        await self.answer_now.wait()
        respond(200, [], str(len(body)).encode())
        self.outcomes.append("answered")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.ways.add("asgi")
        self.arrived.set()
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.outcomes.append("disconnected")
                return
            body, more = body + message["body"], message["more_body"]
        try:
            await self.answer_now.wait()
        except asyncio.CancelledError:
            self.outcomes.append("cancelled")
            raise
        answer = str(len(body)).encode()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})
        self.outcomes.append("answered")


def service(app: Application, way: str = "asgi", **bounds: float) -> UvicornService:
    direct = Direct(re.compile(rb"/"), app.direct) if way == "direct" and isinstance(app, Answering) else None
    made = UvicornService(
        name="gateway",
        app=app,
        direct=direct,
        host="127.0.0.1",
        port=0,
        setting="gateway",
        **bounds,  # type: ignore[arg-type]
    )
    made.bind()
    return made


@contextlib.asynccontextmanager
async def serving(server: UvicornService) -> AsyncIterator[asyncio.Event]:
    stop = asyncio.Event()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        group.create_task(server.run(stop))
        yield stop
        stop.set()


@contextlib.asynccontextmanager
async def connected(server: UvicornService) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


@as_async
async def test_a_request_is_answered_and_the_connection_kept(way: str) -> None:
    app = Answering()
    server = service(app, way)
    async with serving(server), connected(server) as (reader, writer):
        for size in (0, 5):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
            head = await reader.readuntil(b"\r\n\r\n")
            assert app.ways == {way}
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\ndate: " in head
            assert b"\r\nserver:" not in head
            assert await reader.readexactly(1) == str(size).encode()


@as_async
async def test_told_to_stop_it_finishes_the_answer_under_way_and_accepts_no_more(way: str) -> None:
    app = Answering()
    app.answer_now.clear()
    server = service(app, way)
    async with serving(server) as stop, connected(server) as (reader, writer), connected(server) as (idle, _):
        writer.write(POST)
        await app.arrived.wait()
        stop.set()
        assert await until_closed(idle) == b""
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", server.port)
        app.answer_now.set()
        answer = await until_closed(reader)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" in answer
    assert app.outcomes == ["answered"]


@as_async
async def test_an_answer_that_does_not_come_in_time_is_cut_off_at_the_stop(way: str) -> None:
    app = Answering()
    app.answer_now.clear()
    server = service(app, way, shutdown_s_max=0.05)
    async with serving(server) as stop, connected(server) as (reader, writer):
        writer.write(POST)
        await app.arrived.wait()
        stop.set()
        answer = await until_closed(reader)
    assert b"200 OK" not in answer
    assert app.outcomes == (["cancelled"] if way == "asgi" else [])


@as_async
async def test_a_stop_before_it_serves_is_not_lost() -> None:
    stop = asyncio.Event()
    stop.set()
    async with asyncio.timeout(LIMIT_S):
        await service(Answering()).run(stop)


@as_async
async def test_cancelled_it_leaves_the_port_free() -> None:
    server = service(Answering())
    with pytest.raises(asyncio.CancelledError):
        async with serving(server), connected(server):
            raise asyncio.CancelledError
    again = UvicornService(name="again", app=Answering(), host="127.0.0.1", port=server.port, setting="gateway")
    again.bind()
    async with serving(again), connected(again) as (reader, writer):
        writer.write(POST)
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"


def test_a_taken_port_is_told_with_the_setting_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = UvicornService(name="gateway", app=Answering(), host="127.0.0.1", port=port, setting="gateway")
        with pytest.raises(ConfigurationError) as raised:
            server.bind()
    assert str(raised.value) == (
        f"gateway: 127.0.0.1:{port} is taken by another process (change gateway_host or gateway_port)"
    )


@pytest.mark.parametrize(
    ("host", "why"), [("192.0.2.1", "is no address of this machine"), ("no such host", "no such host")]
)
def test_an_address_that_is_not_ours_is_told(host: str, why: str) -> None:
    server = UvicornService(name="gateway", app=Answering(), host=host, port=0, setting="gateway")
    with pytest.raises(ConfigurationError, match=why):
        server.bind()


SLOW: dict[str, tuple[bytes, bytes]] = {
    "says nothing": (b"", b""),
    "stops amid the headers": (b"GET / HTTP/1.1\r\nhost:", b"HTTP/1.1 408 "),
    "stops amid the body": (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n123", b"HTTP/1.1 408 "),
}


@pytest.mark.parametrize("case", SLOW)
@as_async
async def test_a_client_that_stops_sending_is_let_go(case: str, way: str) -> None:
    said, answer = SLOW[case]
    app = Answering()
    server = service(app, way, request_s_max=REQUEST_S_MAX)
    async with serving(server), connected(server) as (reader, writer):
        writer.write(said)
        assert (await until_closed(reader)).startswith(answer)
    assert app.outcomes in ([], ["answered"], ["disconnected"])


@as_async
async def test_an_empty_line_after_an_answer_does_not_keep_the_connection_for_ever(way: str) -> None:
    server = service(Answering(), way, request_s_max=REQUEST_S_MAX)
    async with serving(server), connected(server) as (reader, writer):
        writer.write(POST)
        await reader.readuntil(b"\r\n\r\n0")
        writer.write(b"\r\n")
        assert await until_closed(reader) == b""


@as_async
async def test_a_refusal_never_takes_the_place_of_an_earlier_answer(way: str) -> None:
    app = Answering()
    app.answer_now.clear()
    server = service(app, way, request_s_max=REQUEST_S_MAX)
    async with serving(server), connected(server) as (reader, writer):
        writer.write(POST + b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n123")
        assert await until_closed(reader) == b""
        app.answer_now.set()


@as_async
async def test_a_client_that_drips_is_let_go_all_the_same(way: str) -> None:
    """Each byte that comes must not grant the request more time."""
    server = service(Answering(), way, request_s_max=REQUEST_S_MAX)
    async with serving(server), connected(server) as (reader, writer):

        async def drip() -> None:
            writer.write(b"GET / HTTP/1.1\r\nx: ")
            while True:
                writer.write(b"y")
                await asyncio.sleep(0.02)

        dripping = asyncio.ensure_future(drip())
        answer = await until_closed(reader)
        dripping.cancel()
    # What still drips in when the server closes makes TCP reset the connection, and a reset may overtake the answer.
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


@as_async
async def test_an_idle_connection_outlives_the_time_for_a_request(way: str) -> None:
    server = service(Answering(), way, request_s_max=REQUEST_S_MAX)
    async with serving(server), connected(server) as (reader, writer):
        for _ in range(2):
            writer.write(POST)
            await reader.readuntil(b"\r\n\r\n0")
            await asyncio.sleep(2 * REQUEST_S_MAX)
        assert not reader.at_eof()


@as_async
async def test_headers_without_end_are_refused(way: str) -> None:
    server = service(Answering(), way)
    async with serving(server), connected(server) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(10_000):
                writer.write(b"x-%d: " % number + b"y" * 1000 + b"\r\n")
                await writer.drain()
        answer = await until_closed(reader)
    assert answer.startswith(b"HTTP/1.1 431 ") or answer == b""


@as_async
async def test_trailers_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bounds, "REQUEST_BYTES_MAX", 100_000)
    app = Answering()
    server = service(app)
    async with serving(server), connected(server) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        await app.arrived.wait()
        with contextlib.suppress(ConnectionError):
            for number in range(10_000):
                writer.write(b"x-%d: " % number + b"y" * 1000 + b"\r\n")
                await writer.drain()
        await until_closed(reader)
    assert app.outcomes == ["disconnected"]


@as_async
async def test_pipelined_requests_are_all_answered(way: str) -> None:
    server = service(Answering(), way)
    async with serving(server), connected(server) as (reader, writer):
        for _ in range(50):
            writer.write(POST * PIPELINED_MAX + POST[:20])
            for _ in range(PIPELINED_MAX):
                await reader.readuntil(b"\r\n\r\n0")
            writer.write(POST[20:])
            await reader.readuntil(b"\r\n\r\n0")


@as_async
async def test_who_pipelines_without_reading_is_closed_and_nobody_else_waits(way: str) -> None:
    app = Answering()
    server = service(app, way)
    async with serving(server), contextlib.AsyncExitStack() as stack:
        for _ in range(10):
            _, flooding = await stack.enter_async_context(connected(server))
            flooding.write(POST * 10_000)
        async with connected(server) as (reader, writer):
            writer.write(POST)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            await reader.readuntil(b"\r\n\r\n0")
    assert len(app.outcomes) <= 10 * 2 + 1


@as_async
async def test_what_is_pipelined_is_answered_in_its_order(way: str) -> None:
    """Also where only the first of a read goes past ASGI, and the others wait for it."""
    app = Answering()
    server = service(app, way)
    request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    async with serving(server), connected(server) as (reader, writer):
        for _ in range(20):
            writer.write(b"".join(request % size + bytes(size) for size in range(7)))
            for size in range(7):
                await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(1) == str(size).encode()
    assert app.ways == {way, "asgi"}


@as_async
async def test_told_to_stop_it_finishes_what_is_pipelined_too(way: str) -> None:
    app = Answering()
    app.answer_now.clear()
    server = service(app, way)
    async with serving(server) as stop, connected(server) as (reader, writer):
        writer.write(POST * 3)
        await app.arrived.wait()
        stop.set()
        await asyncio.sleep(0)
        app.answer_now.set()
        answers = await until_closed(reader)
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert answers.count(b"connection: close") == 1


@as_async
async def test_a_client_that_is_gone_before_its_answer_harms_nobody(way: str) -> None:
    app = Answering()
    app.answer_now.clear()
    server = service(app, way)
    async with serving(server):
        async with connected(server) as (_, writer):
            writer.write(POST)
            await app.arrived.wait()
        async with connected(server) as (reader, writer):
            app.answer_now.set()
            writer.write(POST)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            await reader.readuntil(b"\r\n\r\n0")
    assert app.outcomes == ["answered", "answered"]


@as_async
async def test_a_client_that_closes_its_half_is_taken_for_gone(way: str) -> None:
    """As uvicorn does; what it sent before is worked on all the same."""
    app = Answering()
    app.answer_now.clear()
    server = service(app, way)
    async with serving(server), connected(server) as (reader, writer):
        writer.write(POST)
        await app.arrived.wait()
        writer.write_eof()
        assert await until_closed(reader) == b""
        app.answer_now.set()
    assert app.outcomes == ["answered"]


@as_async
async def test_what_is_idle_for_too_long_is_closed(way: str) -> None:
    server = service(Answering(), way, keep_alive_s=0)
    async with serving(server), connected(server) as (reader, writer):
        writer.write(POST)
        answer = await until_closed(reader)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" not in answer


@as_async
async def test_beyond_its_connections_it_says_503(way: str) -> None:
    server = service(Answering(), way, connections_max=1)
    async with serving(server), connected(server), connected(server) as (reader, writer):
        writer.write(POST)
        head, _, body = (await until_closed(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"\r\ncontent-type: application/problem+json\r\n" in head
    assert b"\r\nretry-after: 1\r\n" in head
    assert json.loads(body)["status"] == 503


@as_async
async def test_the_health_server_answers_on_its_own_port() -> None:
    nats = Dependency("nats")
    nats.up()
    server = HealthServer(host="127.0.0.1", port=0, checks=[nats], registry=CollectorRegistry())
    server.bind()
    async with serving(server), connected(server) as (reader, writer):
        for path in (b"/livez", b"/readyz", b"/metrics"):
            writer.write(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % path)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.partition(b":")[2]))


@as_async
async def test_a_trailer_is_no_header_and_is_not_kept() -> None:
    """RFC 9110, 6.5.1: what a proxy in front has refused as a header may not come in behind the body."""
    seen: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        seen.append(list(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    server = service(app)
    async with serving(server), connected(server) as (reader, writer):
        head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head + b"1\r\n{\r\n0\r\nauthorization: y\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    assert [name for name, _ in seen[0]] == [b"host", b"transfer-encoding"]
