"""Raw frames: one contract for them and for nats-py's own subscriptions, and what only they have to stand.

The parser's own tests need no server, but stand here: what they hold it to is nats-py's behaviour.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from email.parser import BytesHeaderParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats import frames as module
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.consumer import PullConsumer
from pulse.adapters.nats.frames import Frame, FrameParser, subscribe, write

LIMIT_S = 20.0

Got = tuple[str, str, Mapping[str, str], bytes]
"""Subject, reply, headers, payload."""
Unsubscribe = Callable[[], Awaitable[None]]
Subscribe = Callable[[PulseClient, str, list[Got]], Awaitable[Unsubscribe]]


async def subscribe_plain(client: PulseClient, subject: str, got: list[Got]) -> Unsubscribe:
    async def receive(message: Msg) -> None:
        got.append((message.subject, message.reply, message.headers or {}, message.data))

    return (await client.subscribe(subject, cb=receive)).unsubscribe


async def subscribe_to_frames(client: PulseClient, subject: str, got: list[Got]) -> Unsubscribe:
    def receive(frames: list[Frame]) -> None:
        for to, reply, block, payload in frames:
            version, _, lines = block.partition(b"\r\n")
            assert version in {b"", b"NATS/1.0"}
            headers = {name: str(value) for name, value in BytesHeaderParser().parsebytes(lines).items()}
            got.append((to.decode(), reply.decode(), headers, payload))

    return (await subscribe(client, subject, receive)).unsubscribe


@pytest.fixture(params=[subscribe_plain, subscribe_to_frames], ids=["nats-py", "frames"])
def subscribe_either(request: pytest.FixtureRequest) -> Subscribe:
    way: Subscribe = request.param
    return way


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[PulseClient]:
    async with connection(nats.url, name="test") as client:
        yield client


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.01)


async def test_messages_come_whole_and_in_order(client: PulseClient, subscribe_either: Subscribe) -> None:
    got: list[Got] = []
    await subscribe_either(client, "a.>", got)
    sent: list[Got] = [
        ("a.b", "", {}, b"plain"),
        ("a.b", "", {}, b""),
        ("a.c", "reply.to.me", {}, b"\x00\xff\r\n"),
        ("a.b", "", {"Name": "value", "Other": "b: c"}, b"with headers"),
        ("a.d.e", "reply", {"Name": "v"}, b""),
        ("a.b", "", {}, b"MSG a.b 1 5\r\nhello\r\nPING\r\n-ERR 'no'\r\n"),
        ("a.b", "", {}, bytes(client.max_payload)),
        ("a.b", "", {}, b"after"),
    ]
    for subject, reply, headers, payload in sent:
        await client.publish(subject, payload, reply=reply, headers={**headers} or None)
    await until(lambda: len(got) == len(sent))
    assert got == sent


async def test_each_subscription_gets_its_own_and_requests_are_answered_meanwhile(
    client: PulseClient, subscribe_either: Subscribe
) -> None:
    left: list[Got] = []
    right: list[Got] = []
    await subscribe_either(client, "left", left)
    await subscribe_either(client, "right", right)

    async def answer(message: Msg) -> None:
        await message.respond(b"answer")

    await client.subscribe("question", cb=answer)
    for number in range(300):
        await client.publish("left", b"%d" % number)
        await client.publish("right", b"%d" % number, headers={"N": str(number)})
        if number % 50 == 0:
            assert (await client.request("question", b"?", timeout=LIMIT_S)).data == b"answer"
            await client.flush()
    await until(lambda: len(left) == len(right) == 300)
    assert [payload for *_, payload in left] == [payload for *_, payload in right] == [b"%d" % n for n in range(300)]


async def test_it_outlives_the_connection(nats: NatsServer, client: PulseClient, subscribe_either: Subscribe) -> None:
    got: list[Got] = []
    await subscribe_either(client, "a", got)
    for number in range(3):
        await client.publish("a", b"%d" % number)
        await until(lambda: bool(got))
        assert got.pop()[3] == b"%d" % number
        nats.kill()
        await until(lambda: not client.is_connected)
        await asyncio.to_thread(nats.start)
        await until(lambda: client.is_connected)


async def test_what_was_unsubscribed_gets_nothing_more(client: PulseClient, subscribe_either: Subscribe) -> None:
    got: list[Got] = []
    others: list[Got] = []
    await subscribe_either(client, "a", others)
    unsubscribe = await subscribe_either(client, "a", got)
    await unsubscribe()
    await client.publish("a", b"1")
    await until(lambda: bool(others))
    assert got == []
    if isinstance(client._ps, FrameParser):
        assert len(client._ps._receivers) <= 1


async def test_it_is_counted(client: PulseClient, subscribe_either: Subscribe) -> None:
    got: list[Got] = []
    await subscribe_either(client, "a", got)
    before = dict(client.stats)
    for _ in range(5):
        await client.publish("a", b"12345")
    await until(lambda: len(got) == 5)
    assert client.stats["in_msgs"] - before["in_msgs"] == 5
    assert client.stats["in_bytes"] - before["in_bytes"] == 25


async def test_a_drained_client_has_handed_over_what_had_come(nats: NatsServer, subscribe_either: Subscribe) -> None:
    got: list[Got] = []
    async with connection(nats.url, name="test") as leaving:
        await subscribe_either(leaving, "a", got)
        for _ in range(100):
            await leaving.publish("a", b"1")
    assert len(got) == 100


async def test_subjects_that_nats_py_cannot_read_are_messages_like_others(
    nats: NatsServer, client: PulseClient
) -> None:
    """nats-py's parser dies of the first and reconnects for ever on the second; nats-server carries both."""
    got: list[Frame] = []
    await subscribe(client, "a.>", got.extend)
    await client.flush()
    subjects = [b"a.\xff\xfe", b"a.b\x0bc", "a.é".encode(), b"a.b"]
    write(client, b"".join(b"PUB %b 2\r\nhi\r\n" % subject for subject in subjects), messages=len(subjects))
    await until(lambda: len(got) == len(subjects))
    assert [frame[0] for frame in got] == subjects
    assert client.is_connected
    assert client.stats["reconnects"] == 0


async def test_the_pull_consumer_hands_over_what_has_an_unreadable_subject_and_can_acknowledge_it(
    client: PulseClient,
) -> None:
    """Where it could not, one such message would hold up the stream for ever."""
    await client.jetstream().add_stream(name="S", subjects=["telemetry.>"])
    await client.jetstream().add_consumer("S", durable_name="C", ack_policy="explicit")
    write(client, b"PUB telemetry.\xff 2\r\nhi\r\n", messages=1)

    async def created_ns() -> int:
        return 1

    bounds = {"batch_max": 10, "batch_bytes_max": 1 << 20}
    async with PullConsumer(client, stream="S", consumer="C", created_ns=created_ns, linger_s=0.01, **bounds) as source:
        batch = await source.fetch()
        assert batch is not None
        (message,) = batch.messages
        assert message.subject.encode("utf-8", "surrogateescape") == b"telemetry.\xff"
        await source.ack(batch)
        async with asyncio.timeout(LIMIT_S):
            while (await client.jetstream().consumer_info("S", "C")).num_ack_pending:
                await client.flush()


async def test_what_is_written_at_once_arrives_and_is_counted(client: PulseClient) -> None:
    got: list[Frame] = []
    await subscribe(client, "a", got.extend)
    before = client.stats["out_msgs"]
    write(client, b"PUB a 1\r\nx\r\n" * 50_000, messages=50_000)
    assert client.pending_data_size >= 50_000 * len(b"PUB a 1\r\nx\r\n")
    await until(lambda: len(got) == 50_000)
    assert client.stats["out_msgs"] - before == 50_000
    await until(lambda: client.pending_data_size == 0)  # a PONG may be among what waits


async def test_what_is_written_while_nothing_waits_goes_past_the_flusher(client: PulseClient) -> None:
    got: list[Frame] = []
    await subscribe(client, "a", got.extend)
    await client.flush()
    for number in range(10):
        write(client, b"PUB a 1\r\n%d\r\n" % number, messages=1)
        assert (client._pending, client.pending_data_size) == ([], 0)
    await client.publish("a", b"x")
    write(client, b"PUB a 1\r\ny\r\n", messages=1)
    await until(lambda: len(got) == 12)
    assert b"".join(frame[3] for frame in got) == b"0123456789xy"


def test_nats_py_is_the_one_whose_inside_is_known() -> None:
    """Each of these is relied upon: with another version, read its parser, `subscribe` and flusher again."""
    assert importlib.metadata.version("nats-py") == "2.16.0"
    client = PulseClient()
    assert isinstance(client._ps, FrameParser)
    assert (client._sid, client._pending, client._pending_data_size) == (0, [], 0)
    assert inspect.iscoroutinefunction(Parser.parse)
    assert "self._ps.parse(b)" in inspect.getsource(Client._read_loop)
    assert "self._ps.reset()" in inspect.getsource(Client._process_op_err)
    flusher = inspect.getsource(Client._flusher)
    assert "self._flush_queue.get()" in flusher
    assert "self._transport.writelines(self._pending[:])" in flusher
    assert "self._io_writer.write(payload)" in inspect.getsource(TcpTransport.write)
    assert "self._sid += 1" in inspect.getsource(Client.subscribe)
    assert ssl.HAS_TLSv1_3, "TLS is nats-py's: it ends below the parser"


class Heard:
    """In a client's place: what nats-py's parser calls."""

    def __init__(self) -> None:
        self.stats = {"in_msgs": 0, "in_bytes": 0}
        self.events: list[object] = []
        self.parser: FrameParser | None = None

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.events.append(("message", sid, subject, reply, headers or b"", data))

    async def _process_ping(self) -> None:
        await asyncio.sleep(0)
        self.events.append("ping")

    async def _process_pong(self) -> None:
        self.events.append("pong")

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.events.append(("info", info))

    async def _process_err(self, text: str) -> None:
        self.events.append(("error", text))
        if "stale" in text and self.parser is not None:
            self.parser.reset()


CHOSEN = 7


def parsed(pieces: list[bytes]) -> list[object]:
    """Everything that happens when `pieces` are read one after the other, in its order."""
    heard = Heard()
    parser = heard.parser = FrameParser(heard)  # type: ignore[arg-type]
    parser.route(CHOSEN, lambda frames: heard.events.extend(("frame", frame) for frame in frames))

    async def read() -> None:
        for piece in pieces:
            await parser.parse(piece)

    asyncio.run(read())
    assert not parser._rest
    return heard.events


subjects = st.sampled_from([b"a", b"a.b", b"telemetry.\xc3\xa9", b"MSG", b"HMSG"])
replies = st.sampled_from([b"", b"reply", b"7", b"12", b"$JS.ACK.S.C.1.2.3.4.5"])
texts = st.sampled_from([b"", b"x", b"\r\n", b"MSG a 7 1\r\n", b"PING\r\n", b"y" * 300])
blocks = st.sampled_from([b"NATS/1.0\r\n\r\n", b"NATS/1.0 503\r\n\r\n", b"NATS/1.0\r\nA: b\r\n\r\n"])


@st.composite
def protocol(draw: st.DrawFn) -> tuple[bytes, object]:
    """One operation of a server as it stands on the wire, and what has to happen."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(
            st.sampled_from(
                [
                    (b"PING\r\n", "ping"),
                    (b"PONG\r\n", "pong"),
                    (b"+OK\r\n", None),
                    (b'INFO {"a":"' + b"i" * 6000 + b'"}\r\n', ("info", {"a": "i" * 6000})),
                    (b"-ERR 'Permissions Violation for Subscription to \"a\"'\r\n", "error"),
                ]
            )
        )
    subject, reply, payload = draw(subjects), draw(replies), draw(texts)
    headers = draw(blocks) if kind % 2 else b""
    sid = draw(st.sampled_from([CHOSEN, CHOSEN, CHOSEN, 1, 77]))
    to = b"%b " % reply if reply else b""
    if headers:
        line = b"HMSG %b %d %b%d %d\r\n" % (subject, sid, to, len(headers), len(headers) + len(payload))
    else:
        line = b"MSG %b %d %b%d\r\n" % (subject, sid, to, len(payload))
    event: object = ("message", sid, subject, reply, headers, payload)
    return line + headers + payload + b"\r\n", ("frame", (subject, reply, headers, payload)) if sid == CHOSEN else event


def expected(operations: list[tuple[bytes, object]]) -> list[object]:
    return [event for _, event in operations if event is not None and event != "error"]


@given(st.lists(protocol(), max_size=12), st.lists(st.integers(0, 10_000), max_size=12))
def test_however_it_is_cut_the_same_is_read_in_the_same_order(
    operations: list[tuple[bytes, object]], cuts: list[int]
) -> None:
    wire = b"".join(text for text, _ in operations)
    places = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in cuts)})
    pieces = [wire[low:high] for low, high in itertools.pairwise(places)]
    events = [event for event in parsed(pieces) if not (isinstance(event, tuple) and event[0] == "error")]
    assert events == expected(operations)


def test_it_may_be_cut_at_every_single_byte() -> None:
    wire = (
        b'INFO {"a":1}\r\nMSG a 7 2\r\nhi\r\nHMSG a.b 7 reply 12 14\r\nNATS/1.0\r\n\r\nho\r\nPING\r\nMSG a 1 r 0\r\n'
        b"\r\nMSG a 7 0\r\n\r\n-ERR 'permissions violation'\r\nHMSG a 1 12 13\r\nNATS/1.0\r\n\r\nx\r\nPONG\r\n+OK\r\n"
    )
    whole = parsed([wire])
    assert len(whole) == 9
    for cut in range(len(wire)):
        assert parsed([wire[:cut], wire[cut:]]) == whole
    assert parsed([wire[at : at + 1] for at in range(len(wire))]) == whole


@pytest.mark.parametrize(
    "wire",
    [
        b"NONSENSE\r\n",
        b"MSG a 7\r\n",
        b"MSG a 7 x\r\n",
        b"MSG a 7 -1\r\n",
        b"MSG\r\n",
        b"HMSG a 7 5 4\r\nNATS\r\n",
        b"HMSG a 7 -1 4\r\nNATS\r\n",
        b"HMSG a 7 4\r\nNATS\r\n",
        b"MSG a 7 99999999999999\r\n",
        b"msg a 7 1\r\nx\r\n",
    ],
)
def test_what_is_no_protocol_ends_the_connection_and_nothing_else(wire: bytes) -> None:
    for pieces in ([wire], [b"MSG a 7 1\r\nx\r\n" + wire]):
        with pytest.raises(ProtocolError):
            parsed(pieces)


def test_a_line_without_an_end_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_BYTES_MAX", 100_000)
    with pytest.raises(ProtocolError):
        parsed([b"INFO " + b"x" * 10_000] * 11)


def test_what_was_left_of_a_lost_connection_is_forgotten() -> None:
    """An error line may end the connection while behind it, in the same read, there is still something."""
    stale = b"-ERR 'Stale Connection'\r\n"
    assert parsed([b"MSG a 7 1\r\nx\r\n" + stale + b"MSG a 7 1\r\ny\r\nMSG a 7 100\r\ncut"]) == [
        ("frame", (b"a", b"", b"", b"x")),
        ("error", "'stale connection'"),
    ]


def test_a_large_message_in_many_pieces_is_put_together_once() -> None:
    """Each piece is looked at once: nothing is searched or copied again until the last one is there."""
    payload = bytes(1_000_000)
    wire = b"MSG a 7 %d\r\n%b\r\n" % (len(payload), payload)
    heard = Heard()
    parser = FrameParser(heard)  # type: ignore[arg-type]
    runs = 0
    run = parser._run

    def counted(data: bytes, start: int) -> Any:
        nonlocal runs
        runs += 1
        return run(data, start)

    parser._run = counted  # type: ignore[method-assign]
    got: list[Frame] = []
    parser.route(CHOSEN, got.extend)

    async def read() -> None:
        for at in range(0, len(wire), 1000):
            await parser.parse(wire[at : at + 1000])

    asyncio.run(read())
    assert got == [(b"a", b"", b"", payload)]
    assert runs <= 4
