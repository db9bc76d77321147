"""Following a stream live: every message from a sequence on, in order, none left out.

An ephemeral push consumer without acks, in memory, with flow control: it costs the server little, and the server
never sends more than we have taken. What may go wrong (the consumer or the stream is gone, a message was lost on the
way) ends in Interrupted; the caller begins again where it was. The manner is that of NATS's ordered consumer, ADR-17.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from pulse.adapters.nats.errors import ErrorCode, JetStreamRefusal, mapped
from pulse.adapters.nats.jetstream import request

HEARTBEAT_S = 1.0
SILENCE_S_MAX = 3.0
"""Three heartbeats missed: the consumer is gone, or the connection is."""
INACTIVE_S_MAX = 10
"""The server forgets the consumer of a process that is gone."""
READ_MAX = 1024
"""Messages that are taken at once, and that wait here; the rest waits under the server's flow control."""

NS = 1_000_000_000

_CONFIG: dict[str, object] = {
    "deliver_policy": "by_start_sequence",
    "ack_policy": "none",
    "max_deliver": 1,
    "flow_control": True,
    "idle_heartbeat": int(HEARTBEAT_S * NS),
    "inactive_threshold": INACTIVE_S_MAX * NS,
    "mem_storage": True,
    "num_replicas": 1,
}


class _ConsumerCreated(msgspec.Struct, frozen=True):
    num_pending: int


class _StreamInfo(msgspec.Struct, frozen=True):
    created: str


class Interrupted(Exception):
    """The following broke off: begin again behind the last sequence that was read."""


class Message(msgspec.Struct, frozen=True):
    """One message: `sequence` in the stream, `pending` how many more there were behind it when it was sent.

    `stored_ns` is when the stream took it, in nanoseconds since 1970.
    """

    subject: str
    data: bytes
    headers: Mapping[str, str] | None
    sequence: int
    pending: int
    stored_ns: int


class Following:
    """A consumer under way; see `follow`."""

    def __init__(self, client: Client, queue: asyncio.Queue[Msg], *, pending: int, stream_created: str) -> None:
        self._client = client
        self._queue = queue
        self._delivered = 0
        self.pending = pending
        """Messages that there were when the following began."""
        self.stream_created = stream_created
        """When the stream was made, in the server's words: another value is another stream of that name."""

    async def read(self) -> list[Message]:
        """The next messages, at least one; or none, which says that there were no more for a heartbeat's time.

        Raises Interrupted.
        """
        messages: list[Message] = []
        idle = False
        while not messages and not idle:
            try:
                async with asyncio.timeout(SILENCE_S_MAX):
                    idle = await self._take(await self._queue.get(), messages)
            except TimeoutError as error:
                raise Interrupted("no heartbeat") from error
            while not self._queue.empty() and len(messages) < READ_MAX:
                idle = await self._take(self._queue.get_nowait(), messages)
        return messages

    async def _take(self, message: Msg, messages: list[Message]) -> bool:
        """Append what `message` is; whether it is a heartbeat that says that nothing waits."""
        headers = message.headers
        if headers is not None and "Status" in headers and not message.data:
            return await self._control(message, headers)
        consumer_sequence, parsed = _parse(message)
        if consumer_sequence != self._delivered + 1:
            raise Interrupted(f"message {self._delivered + 1} of the consumer was lost")
        self._delivered = consumer_sequence
        messages.append(parsed)
        return False

    async def _control(self, message: Msg, headers: Mapping[str, str]) -> bool:
        if headers["Status"] != "100":
            raise Interrupted(f"status {headers['Status']}")
        if message.reply:
            await self._answer(message.reply)
            return False
        if stalled := headers.get("Nats-Consumer-Stalled"):
            await self._answer(stalled)
            return False
        if int(headers.get("Nats-Last-Consumer", self._delivered)) != self._delivered:
            raise Interrupted("the last messages of the consumer were lost")
        return True

    async def _answer(self, subject: str) -> None:
        with mapped("cannot answer flow control"):
            await self._client.publish(subject)


@asynccontextmanager
async def follow(
    client: Client,
    *,
    stream: str,
    from_sequence: int = 1,
    from_time: datetime | None = None,
    subject: str | None = None,
    headers_only: bool = False,
    timeout_s: float = 5.0,
) -> AsyncIterator[Following]:
    """Follow `stream` from `from_sequence` or `from_time` (aware) on; the consumer ends with the block.

    `subject` (wildcards allowed) leaves out all others: then sequences have gaps.

    Raises Interrupted where there is no such stream, Outage where NATS does not answer, ConfigurationError where it
    refuses.
    """
    queue: asyncio.Queue[Msg] = asyncio.Queue(READ_MAX)
    doing = f"cannot follow stream {stream}"
    inbox = client.new_inbox()
    name = secrets.token_hex(8)
    config = _CONFIG | {
        "name": name,
        "opt_start_seq": from_sequence,
        "deliver_subject": inbox,
        "headers_only": headers_only,
    }
    if from_time is not None:
        del config["opt_start_seq"]
        config |= {"deliver_policy": "by_start_time", "opt_start_time": from_time.isoformat()}
    if subject is not None:
        config["filter_subject"] = subject
    with mapped(doing):
        subscription = await client.subscribe(inbox, cb=queue.put)
    try:
        body = {"stream_name": stream, "config": config}
        with mapped(doing):
            try:
                create = f"CONSUMER.CREATE.{stream}.{name}"
                consumer = await request(client, create, body, _ConsumerCreated, doing=doing, timeout_s=timeout_s)
                # asked for after the consumer was made: it cannot tell of a stream that came before the consumer's
                info = await request(client, f"STREAM.INFO.{stream}", {}, _StreamInfo, doing=doing, timeout_s=timeout_s)
            except JetStreamRefusal as refusal:
                if refusal.err_code != ErrorCode.STREAM_NOT_FOUND:
                    raise
                raise Interrupted(f"there is no stream {stream}") from refusal
        yield Following(client, queue, pending=consumer.num_pending, stream_created=info.created)
    finally:
        if not client.is_closed:
            with mapped(doing):
                await subscription.unsubscribe()


def _parse(message: Msg) -> tuple[int, Message]:
    """The consumer's sequence, and the message.

    The reply subject is $JS.ACK.stream.consumer.delivered.stream_sequence.consumer_sequence.time.pending; with a
    domain and an account after ACK, and a token more at the end, where it came through a leaf node.
    """
    tokens = message.reply.split(".")
    stream_sequence, consumer_sequence, stored_ns, pending = tokens[5:9] if len(tokens) == 9 else tokens[7:11]
    parsed = Message(message.subject, message.data, message.headers, int(stream_sequence), int(pending), int(stored_ns))
    return int(consumer_sequence), parsed
