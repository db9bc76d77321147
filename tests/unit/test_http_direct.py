"""The way past ASGI, on a transport that is made up: who takes it, in which order answers leave, and what ends it.

What the whole server makes of real connections is in tests/integration/test_http_server.py, for both ways.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from pulse.runtime.http import too_many_connections
from pulse.runtime.http_bounds import BoundedProtocol
from pulse.runtime.http_direct import PIPELINED_MAX, Direct, Header, Receive, Respond, Scope, Send


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Server:
    """Answers each request with its body; `/held` on the direct way only when `release` is called.

    `/broken` has a bug on the direct way. `ways` is how each request came.
    """

    def __init__(self) -> None:
        self.ways: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.held: list[tuple[Respond, bytes]] = []
        config = Config(self.app, http="none", ws="none", lifespan="off", interface="asgi3", log_config=None)
        config.http = Protocol
        config.load()
        self.state = ServerState()
        self.state.default_headers = [(b"date", b"today")]
        self.protocol = Protocol(config, self.state, {}, asyncio.get_running_loop())
        self.protocol.direct = Direct(re.compile(rb"/(direct|held|broken)"), self.answer)
        self.transport = Transport()
        self.protocol.connection_made(self.transport)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.ways.append("asgi")
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    def answer(self, match: re.Match[bytes], headers: Sequence[Header], body: bytes, respond: Respond) -> None:
        self.ways.append("direct")
        if match[1] == b"broken":
            raise RuntimeError("a bug")
        if match[1] == b"held":
            self.held.append((respond, body))
        else:
            respond(202, [], body)

    def release(self) -> None:
        respond, body = self.held.pop(0)
        respond(202, [], body)

    async def feed(self, *parts: bytes) -> None:
        """Each part is one read; the tasks of the loop get their turns in between."""
        for part in parts:
            if self.transport.closing:
                break
            while not self.transport.reading:
                await self.turns()
            self.protocol.data_received(part)
            await self.turns()

    async def turns(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def bodies(self) -> list[bytes]:
        """Of the answers so far."""
        found, rest = [], self.transport.written
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            assert head.startswith(b"HTTP/1.1 202 Accepted\r\ndate: today\r\n")
            assert length is not None
            found.append(rest[: int(length[1])])
            rest = rest[int(length[1]) :]
        return found


class Protocol(BoundedProtocol):
    request_s = 30.0
    connections_max = 10
    overloaded = staticmethod(too_many_connections)


def post(body: bytes, path: bytes = b"/direct", *headers: bytes, version: bytes = b"1.1") -> bytes:
    lines = (b"POST %b HTTP/%b" % (path, version), b"Host: x", b"Content-Length: %d" % len(body), *headers, b"", body)
    return b"\r\n".join(lines)


def chunked(body: bytes) -> bytes:
    head = b"POST /direct HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n0\r\nx-trailer: y\r\n\r\n" % (len(body), body)


WHOLE: dict[str, tuple[bytes, str]] = {
    "a POST": (post(b"a"), "direct"),
    "without a body": (post(b""), "direct"),
    "in chunks, with a trailer": (chunked(b"a"), "direct"),
    "which expects a word before its body": (post(b"a", b"/direct", b"Expect: 100-continue"), "direct"),
    "to another path": (post(b"a", b"/else"), "asgi"),
    "with a query": (post(b"a", b"/direct?b"), "asgi"),
    "as a proxy writes it": (post(b"a", b"http://x/direct"), "asgi"),
    "with an upgrade": (post(b"a", b"/direct", b"Connection: Upgrade", b"Upgrade: h2c"), "asgi"),
    "by another method": (post(b"a").replace(b"POST", b"PUT"), "asgi"),
}


@pytest.mark.parametrize("name", WHOLE)
async def test_a_request_that_came_whole_goes_the_way_that_its_kind_goes(name: str) -> None:
    request, way = WHOLE[name]
    server = Server()
    await server.feed(request)
    assert server.ways == [way]
    assert server.bodies in ([b"a"], [b""])


async def test_a_request_in_two_reads_goes_to_asgi_with_all_that_came() -> None:
    request = post(b"abcdef", b"/direct", b"X-Y: z")
    for cut in range(1, len(request)):
        server = Server()
        await server.feed(request[:cut], request[cut:])
        head_is_whole_in_second = cut <= request.index(b"\r\n\r\n") + 3
        assert server.ways == ["direct" if head_is_whole_in_second else "asgi"], cut
        assert server.bodies == [b"abcdef"]


@given(st.data())
def test_wherever_a_connection_is_cut_its_answers_are_the_same_and_in_order(data: st.DataObject) -> None:
    made = {"direct": post, "else": lambda body: post(body, b"/else"), "chunked": chunked}
    kinds = data.draw(st.lists(st.sampled_from(sorted(made)), min_size=1, max_size=6))
    stream = b"".join(made[kind](b"%d" % number) for number, kind in enumerate(kinds))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    parts = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    async def talk() -> list[bytes]:
        server = Server()
        await server.feed(*parts)
        for _ in range(10 * len(kinds)):
            await server.turns()
        return server.bodies

    assert asyncio.run(talk()) == [b"%d" % number for number in range(len(kinds))]


async def test_what_is_pipelined_behind_an_answer_under_way_waits_for_it() -> None:
    server = Server()
    await server.feed(post(b"1", b"/held") + post(b"2") + post(b"3", b"/else"))
    assert (server.ways, server.bodies, server.transport.reading) == (["direct"], [], False)
    server.release()
    for _ in range(10):
        await server.turns()
    assert server.ways == ["direct", "asgi", "asgi"]
    assert (server.bodies, server.transport.reading) == ([b"1", b"2", b"3"], True)


async def test_a_client_that_does_not_read_fills_no_buffer_by_the_direct_way() -> None:
    server = Server()
    server.protocol.pause_writing()
    await server.feed(post(b"1") + post(b"2"))
    assert (server.ways, server.bodies) == (["asgi"], [])
    server.protocol.resume_writing()
    for _ in range(10):
        await server.turns()
    assert server.bodies == [b"1", b"2"]


async def test_one_read_gets_one_answer_on_the_direct_way_however_many_requests_it_brings() -> None:
    server = Server()
    await server.feed(post(b"") * 50)
    assert server.ways.count("direct") == 1


async def test_what_waits_behind_an_answer_is_answered_in_order_up_to_the_bound() -> None:
    server = Server()
    await server.feed(b"".join(post(b"%d" % number, b"/held") for number in range(1 + PIPELINED_MAX)))
    assert (server.ways, server.transport.closing) == (["direct"], False)
    server.release()
    for _ in range(2 * PIPELINED_MAX):
        await server.turns()
    assert server.bodies == [b"%d" % number for number in range(1 + PIPELINED_MAX)]
    assert not server.transport.closing


@pytest.mark.parametrize("path", [b"/held", b"/else"])
async def test_beyond_the_bound_the_connection_is_closed_and_nothing_more_of_the_read_becomes_a_request(
    path: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bytes] = []

    def on_url(protocol: HttpToolsProtocol, url: bytes) -> None:
        begun.append(url)
        HttpToolsProtocol.on_url(protocol, url)

    monkeypatch.setattr(Protocol, "on_url", on_url)
    server = Server()
    await server.feed(post(b"{}", path) * 4000)
    assert len(begun) == 1 + PIPELINED_MAX
    assert (server.transport.closing, len(server.protocol.pipeline)) == (True, 0)
    assert b" 400 " not in server.transport.written
    for _ in range(10):
        await server.turns()
    assert len(server.ways) == 1


async def test_the_bound_is_on_what_waits_over_all_reads() -> None:
    server = Server()
    await server.feed(post(b"a", b"/held"))
    for _ in range(PIPELINED_MAX):
        server.protocol.data_received(post(b"b"))
    assert not server.transport.closing
    server.protocol.data_received(post(b"b"))
    assert (server.transport.closing, server.transport.written) == (True, b"")


LAST: dict[str, bytes] = {
    "HTTP/1.0": post(b"a", version=b"1.0"),
    "Connection: close": post(b"a", b"/direct", b"Connection: close"),
}


@pytest.mark.parametrize("name", LAST)
async def test_after_its_last_answer_a_connection_is_closed_and_nothing_more_is_begun(name: str) -> None:
    server = Server()
    await server.feed(LAST[name] + post(b"b"))
    assert (server.ways, server.bodies, server.transport.closing) == (["direct"], [b"a"], True)
    assert b"\r\nconnection: close\r\n" in server.transport.written


async def test_a_client_that_is_gone_is_not_written_to_and_what_it_pipelined_is_not_begun() -> None:
    server = Server()
    await server.feed(post(b"a", b"/held") + post(b"b"))
    server.transport.close()
    server.protocol.connection_lost(None)
    server.release()
    await server.turns()
    assert (server.transport.written, server.ways) == (b"", ["direct"])


async def test_a_bug_on_the_direct_way_is_a_500_and_no_bad_request() -> None:
    server = Server()
    await server.feed(post(b"a", b"/broken"))
    assert server.transport.written.startswith(b"HTTP/1.1 500 ")
    assert server.ways == ["direct"]


GARBAGE = b"garbage\x00\r\n\r\n"
BAD_CHUNK = b"POST /else HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"


@pytest.mark.parametrize("whole", [[b"/held"], [b"/else"], [b"/held", b"/else", b"/else"]])
async def test_what_is_broken_behind_whole_requests_closes_the_connection_behind_their_answers(
    whole: list[bytes],
) -> None:
    server = Server()
    server.protocol.data_received(b"".join(post(b"a", path) for path in whole) + GARBAGE)
    assert (server.transport.written, server.transport.closing) == (b"", False)
    server.protocol.data_received(post(b"b"))
    if server.held:
        server.release()
    for _ in range(10):
        await server.turns()
    assert (server.bodies, server.transport.closing) == ([b"a"] * len(whole), True)
    assert server.transport.written.count(b"\r\nconnection: close\r\n") == 1


async def test_what_is_broken_behind_an_answer_is_a_400_behind_it() -> None:
    server = Server()
    await server.feed(post(b"a") + GARBAGE)
    first, _, second = server.transport.written.partition(b"a" + b"HTTP/1.1 400 ")
    assert first.startswith(b"HTTP/1.1 202 ")
    assert (second != b"", server.transport.closing) == (True, True)


async def test_a_body_that_is_broken_is_a_400_unless_another_answer_is_due_before() -> None:
    alone, behind = Server(), Server()
    await alone.feed(BAD_CHUNK)
    await behind.feed(post(b"a", b"/held") + BAD_CHUNK)
    assert alone.transport.written.startswith(b"HTTP/1.1 400 ")
    assert behind.transport.written == b""
    assert (alone.transport.closing, behind.transport.closing) == (True, True)


async def test_told_to_stop_it_closes_behind_the_answer_under_way_which_is_waited_for() -> None:
    server = Server()
    await server.feed(post(b"a", b"/held"))
    server.protocol.shutdown()
    assert not server.transport.closing
    (under_way,) = server.state.tasks
    server.release()
    await under_way
    assert (server.bodies, server.transport.closing) == ([b"a"], True)


async def test_told_to_stop_without_anything_under_way_it_closes() -> None:
    server = Server()
    await server.feed(post(b"a"))
    server.protocol.shutdown()
    assert (server.transport.closing, server.state.tasks) == (True, set())


async def test_idle_is_what_has_been_answered_and_sends_nothing() -> None:
    server = Server()
    now = asyncio.get_running_loop().time()
    await server.feed(post(b"a", b"/held"))
    assert server.protocol.idle_since > now + 1e9
    server.release()
    assert now <= server.protocol.idle_since <= now + 60
    await server.feed(post(b"a", b"/else"))
    assert now <= server.protocol.idle_since <= now + 60
    await server.feed(post(b"abc")[:-1])
    assert server.protocol.idle_since > now + 1e9


async def test_beyond_its_connections_everything_is_503() -> None:
    server = Server()
    others: Any = {object() for _ in range(Protocol.connections_max)}
    server.state.connections |= others
    await server.feed(post(b"a"))
    assert server.transport.written.startswith(b"HTTP/1.1 503 ")
    assert (b"\r\nretry-after: 1\r\n" in server.transport.written, server.ways) == (True, [])
