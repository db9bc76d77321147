"""Messages of chosen subscriptions as they stand on the wire, past nats-py's parser and its objects for each message.

    socket ─► nats-py's read loop ─► FrameParser ─┬─ chosen subscription ─► its receiver, synchronously, in runs
                                                  └─ all else ─► nats-py's own parser
    socket ◄─ nats-py's flusher ◄─ `write`: many commands in one buffer, without an await

nats-py keeps the connection: TLS, authentication, reconnects and subscribing anew, pings. Its parser spends 20 µs on a
message; this one spends one. See docs/adr/0006.

Relies on nats-py 2.16, which tests/integration/test_frames.py pins: `Client._ps` (the parser; `parse` gets what was
read, `reset` ends a connection), `_sid` (the last subscription's number), `_pending`, `_pending_data_size` and
`_flush_queue` (what the flusher writes, its bytes, and what wakes it), `_transport` (where it writes to).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

log = structlog.get_logger()

Frame = tuple[bytes, bytes, bytes, bytes]
"""Subject, reply subject, header block (NATS ADR-4), payload; what is not there is empty."""
Receiver = Callable[[list[Frame]], None]
"""Gets what arrived together, in its order. It must not raise: it runs inside nats-py's read loop."""

LINE_BYTES_MAX = 1024 * 1024
"""Of one control line; INFO is the only long one, for it names all servers of a cluster."""
MESSAGE_BYTES_MAX = 128 * 1024 * 1024
"""Twice what a nats-server can be told to carry; what waits here for the end of a message is bounded by it."""
LINE_END = b"\r\n"
DRAIN_S_MAX = 1


class FrameParser(Parser):
    """Cuts what was read into frames; nats-py's own parser sees the others' whole, in their order among all."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._receivers: dict[bytes, Receiver] = {}
        self._resets = 0
        super().__init__(client)

    def reset(self) -> None:
        """Forget what is left of a connection that is over."""
        super().reset()
        self._resets += 1
        self._rest = bytearray()
        self._needed = 0

    def route(self, sid: int, receiver: Receiver | None) -> None:
        """Hand the messages of subscription `sid` to `receiver` from now on, or to nats-py."""
        self._receivers.pop(b"%d" % sid, None)
        if receiver is not None:
            self._receivers[b"%d" % sid] = receiver

    async def parse(self, data: bytes = b"") -> None:
        """Take what was read. Raises ProtocolError, on which nats-py connects anew."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
        resets, at = self._resets, 0
        while True:
            receiver, frames, end = self._run(data, at)
            if end == at:
                break
            if receiver is not None:
                self._count(frames)
                receiver(frames)
            else:
                await super().parse(data[at:end])
                if self._resets != resets:
                    return
                if self.buf:
                    raise ProtocolError("nats: unknown protocol")
            at = end
        if len(data) - at > max(self._needed, LINE_BYTES_MAX):
            raise ProtocolError("nats: a line without an end")
        self._rest = bytearray(data[at:])

    def _run(self, data: bytes, start: int) -> tuple[Receiver | None, list[Frame], int]:
        """The longest run of whole frames at `start` for one receiver (None: nats-py), and where it ends."""
        receivers, find, length = self._receivers, data.find, len(data)
        receiver: Receiver | None = None
        frames: list[Frame] = []
        add = frames.append
        at, self._needed = start, 0
        while (line_end := find(LINE_END, at)) >= 0:
            tokens = data[at:line_end].split(b" ")
            operation, body = tokens[0], line_end + 2
            with_headers = operation == b"HMSG"
            if with_headers or operation == b"MSG":
                try:
                    to = receivers.get(tokens[2])
                    end = body + int(tokens[-1])
                    payload = body + int(tokens[-2]) if with_headers else body
                except (ValueError, IndexError) as error:
                    raise ProtocolError("nats: malformed MSG") from error
                with_reply = len(tokens) - 4 - with_headers
                if not (0 <= with_reply <= 1 and body <= payload <= end <= body + MESSAGE_BYTES_MAX):
                    raise ProtocolError("nats: malformed MSG")
                after = end + 2
                if after > length:
                    self._needed = after - at
                    break
            else:
                to, after = None, body
            if to is not receiver:
                if at != start:
                    break
                receiver = to
            if to is not None:
                add((tokens[1], tokens[3] if with_reply else b"", data[body:payload], data[payload:end]))
            at = after
        return receiver, frames, at

    def _count(self, frames: list[Frame]) -> None:
        stats = self._client.stats
        stats["in_msgs"] += len(frames)
        stats["in_bytes"] += sum([len(frame[3]) for frame in frames])


class FrameSubscription:
    """A subscription whose messages go to a receiver; ends with `unsubscribe` or the client."""

    def __init__(self, client: Client, parser: FrameParser, subscription: Subscription) -> None:
        self._client = client
        self._parser = parser
        self._subscription = subscription

    async def unsubscribe(self) -> None:
        """Tell the server; what is on its way is dropped by nats-py."""
        await self._subscription.unsubscribe()
        self._parser.route(self._subscription._id, None)

    async def drain(self) -> None:
        """`unsubscribe`, but what the server has sent by then still comes, within DRAIN_S_MAX."""
        await self._subscription.unsubscribe()
        try:
            if self._client.is_connected:
                await self._client.flush(DRAIN_S_MAX)
        except (nats.errors.Error, OSError) as error:
            log.debug("what was on its way did not come", error=str(error) or type(error).__name__)
        finally:
            self._parser.route(self._subscription._id, None)


async def subscribe(client: Client, subject: str, receiver: Receiver) -> FrameSubscription:
    """Subscribe to `subject`; its messages go to `receiver` alone, from the first one on, over all reconnects.

    `client` must have had a FrameParser since before it connected, as every PulseClient has. Raises nats-py's errors.
    """
    parser = client._ps
    assert isinstance(parser, FrameParser), "this client reads with nats-py's parser alone"
    sid = client._sid + 1
    parser.route(sid, receiver)
    try:
        subscription = await client.subscribe(subject, cb=_unreachable)
    except BaseException:
        parser.route(sid, None)
        raise
    assert subscription._id == sid, "nats-py numbers its subscriptions in another way"
    return FrameSubscription(client, parser, subscription)


def write(client: Client, data: bytes, *, messages: int) -> None:
    """Send `data`, whole PUB and HPUB commands of `messages` messages; call while connected.

    As the client's own `publish` does, but all at once and without an await. The caller bounds how much that is. Where
    nothing waits for the client's flusher it goes past it, which is a turn of the event loop sooner.
    """
    client.stats["out_msgs"] += messages
    client.stats["out_bytes"] += len(data)
    if not client._pending and isinstance(client._transport, TcpTransport):
        client._transport.write(data)  # type: ignore[no-untyped-call]
        return
    client._pending.append(data)
    client._pending_data_size += len(data)
    if client._flush_queue is not None and client._flush_queue.empty():
        client._flush_queue.put_nowait(asyncio.get_running_loop().create_future())


async def _unreachable(message: Msg) -> None:
    raise AssertionError(f"a message on {message.subject} has passed its receiver by")
