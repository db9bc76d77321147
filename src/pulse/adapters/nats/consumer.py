"""A pull consumer: batches as they come, acknowledged in bulk.

One pull request is under way at a time, for as many messages as there is room; while a batch is being worked on, the
next one gathers here. `fetch` hands over what has gathered once the oldest of it has waited for `linger_s` or the
batch is full, so a lone message waits for `linger_s` and a flood comes in full batches.

Which making of the stream a message belongs to is not in the message. So the stream is asked when it was made before
the first pull and after each batch: where both say the same, all that arrived in between is of that making. Where
they differ, what arrived is left unacknowledged and comes again.

Source: NATS ADR-13 (pull consumers), ADR-15 (acknowledgement subjects).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from pulse.adapters.nats.errors import mapped
from pulse.domain.errors import Outage
from pulse.domain.settlement import Message

log = structlog.get_logger()

PULL_EXPIRES_S = 30.0
IDLE_HEARTBEAT_S = 5.0
SILENCE_S_MAX = 2 * IDLE_HEARTBEAT_S
"""Two heartbeats missed: the pull request is gone, whatever became of it."""
POLL_S = 1.0
"""How long `fetch` waits for a first message; bounds how long a stop goes unnoticed."""

ACK = b"+ACK"
IN_PROGRESS = b"+WPI"
NAK = b"-NAK"

STATUS_HEARTBEAT = "100"


class Fetched:
    """Messages that arrived together, all from the making of the stream at `created_ns`."""

    __slots__ = ("created_ns", "messages")

    def __init__(self, created_ns: int, messages: Sequence[Message]) -> None:
        self.created_ns = created_ns
        self.messages = messages


class PullConsumer:
    """Pulls from a durable consumer that exists; satisfies `services.ingest.Source`. Use as `async with`."""

    def __init__(
        self,
        client: Client,
        *,
        stream: str,
        consumer: str,
        created_ns: Callable[[], Awaitable[int]],
        batch_max: int,
        batch_bytes_max: int,
        linger_s: float,
    ) -> None:
        self._client = client
        self._created = created_ns
        self._batch_max = batch_max
        self._batch_bytes_max = batch_bytes_max
        self._linger_s = linger_s
        self._next_subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._inbox = client.new_inbox()
        self._subscription: Subscription | None = None
        self._buffer: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._outstanding = 0
        self._heard_at = 0.0
        self._refusal: str | None = None
        self._created_ns: int | None = None

    async def __aenter__(self) -> Self:
        with mapped("cannot pull"):
            # What may wait in nats-py is bounded by the pull request itself, in messages and in bytes.
            self._subscription = await self._client.subscribe(
                self._inbox, cb=self._on_message, pending_msgs_limit=0, pending_bytes_limit=0
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._subscription is not None and not self._client.is_closed:
            with mapped("cannot pull"):
                await self._subscription.unsubscribe()

    async def fetch(self) -> Fetched | None:
        """The next batch; None where no message came within a second. Raises Outage."""
        if self._created_ns is None:
            self._created_ns = await self._created()
        await self._pull()
        if not self._buffer and not await _within(POLL_S, self._arrived):
            self._check_alive()
            return None
        if len(self._buffer) < self._batch_max:
            self._full.clear()
            await _within(self._linger_s, self._full)
        # Counted before the stream is asked, taken after: an outage of the asking leaves all of it here.
        count = min(len(self._buffer), self._batch_max)
        before, after = self._created_ns, await self._created()
        if before != after:
            log.warning("stream was made anew; what arrived is left to be redelivered", messages=len(self._buffer))
            self._created_ns = after
            count = 0
            self._buffer.clear()
        messages = [self._buffer.popleft() for _ in range(count)]
        if not self._buffer:
            self._arrived.clear()
        return Fetched(after, messages) if messages else None

    async def ack(self, messages: Sequence[Message]) -> None:
        """Acknowledge; returns when it is on its way, for the ledger makes a lost ack harmless. Raises Outage."""
        await self._answer(messages, ACK)

    async def keep_alive(self, messages: Sequence[Message]) -> None:
        """Start the ack wait anew of each, and of what waits here to be fetched. Raises Outage."""
        await self._answer([*messages, *self._buffer], IN_PROGRESS)

    async def give_back(self, messages: Sequence[Message]) -> None:
        """Have each delivered again at once. Raises Outage."""
        await self._answer(messages, NAK)

    async def _answer(self, messages: Sequence[Message], word: bytes) -> None:
        if not self._client.is_connected:
            raise Outage("nats", "not connected; the messages will come again")
        with mapped("cannot pull"):
            for message in messages:
                await self._client.publish(message.reply, word)

    async def _pull(self) -> None:
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise Outage("nats", refusal)
        if self._outstanding > 0 or len(self._buffer) >= self._batch_max:
            return
        request = {
            "batch": self._batch_max,
            "max_bytes": self._batch_bytes_max,
            "expires": int(PULL_EXPIRES_S * 1e9),
            "idle_heartbeat": int(IDLE_HEARTBEAT_S * 1e9),
        }
        with mapped("cannot pull"):
            await self._client.publish(self._next_subject, msgspec.json.encode(request), reply=self._inbox)
        self._outstanding = self._batch_max
        self._heard_at = asyncio.get_running_loop().time()

    def _check_alive(self) -> None:
        """Give up a pull request of which nothing was heard: the server, or the connection to it, has lost it."""
        silent_s = asyncio.get_running_loop().time() - self._heard_at
        if self._outstanding > 0 and (silent_s > SILENCE_S_MAX or not self._client.is_connected):
            self._outstanding = 0
            if not self._client.is_connected:
                raise Outage("nats", "not connected")

    async def _on_message(self, message: Msg) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        headers = message.headers or {}
        status = headers.get("Status") if not message.reply else None
        if status is None:
            self._buffer.append(_read(message))
            self._outstanding = max(0, self._outstanding - 1)
            self._arrived.set()
            if len(self._buffer) >= self._batch_max:
                self._full.set()
        elif status != STATUS_HEARTBEAT:
            # 404 and 408: the request is over. 409 and 503: and the consumer, or the server, does not want another.
            self._outstanding = 0
            self._full.set()
            if status in ("409", "503"):
                self._refusal = f"{self._next_subject}: {status} {headers.get('Description', 'no responders')}"


async def _within(limit_s: float, event: asyncio.Event) -> bool:
    """Whether `event` was set within `limit_s`."""
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _read(message: Msg) -> Message:
    tokens = message.reply.split(".")
    # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>, and since 2.10 the longer
    # $JS.ACK.<domain>.<account>.<stream>.… of the same tail with a random token behind it.
    tail = tokens[4:9] if len(tokens) == 9 else tokens[6:11]
    headers = message.headers
    return Message(
        subject=message.subject,
        body=message.data,
        headers=_header_block(headers) if headers else b"",
        reply=message.reply,
        sequence=int(tail[1]),
        published_ns=int(tail[3]),
        attempts=int(tail[0]),
    )


def _header_block(headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"NATS/1.0\r\n{lines}\r\n".encode("utf-8", "surrogateescape")
