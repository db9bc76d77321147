"""A pull consumer that has one message in hand, and none on its way: for messages that may kill who takes them.

A delivery counts as a try of the message, so whatever waited here for its turn would be charged with the death that
another one caused. It costs a few round trips a message; `consumer.py` is for a flood.

Source: NATS ADR-13 (pull consumers), ADR-15 (acknowledgement subjects), ADR-4 (headers).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from pulse.adapters.nats.consumer import ACK, IN_PROGRESS, NAK, Batch, Fetched
from pulse.adapters.nats.errors import SYSTEM, mapped
from pulse.domain.errors import Outage
from pulse.domain.settlement import Message

POLL_S = 1.0
"""How long `fetch` waits for a message; bounds how long a stop goes unnoticed."""
ANSWER_S_MAX = 5.0
"""How much longer the server may take to say that there was none."""
NOTHING = frozenset({"404", "408"})


class SingleConsumer:
    """Pulls one by one from a durable consumer that exists; satisfies `services.ingest.Source`."""

    def __init__(self, client: Client, *, stream: str, consumer: str, created_ns: Callable[[], Awaitable[int]]) -> None:
        self._client = client
        self._created = created_ns
        self._next_subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._created_before = 0
        self._arrived: Message | None = None

    async def fetch(self) -> Fetched | None:
        """The next message; None where none came within a second. Raises Outage."""
        if self._arrived is None:
            self._created_before = await self._created()
            self._arrived = await self._next()
            if self._arrived is None:
                return None
        # An outage of the asking leaves it here. Of a stream that was made anew, it is left to come again.
        after = await self._created()
        message, self._arrived = self._arrived, None
        return Fetched(after, [message]) if after == self._created_before else None

    async def ack(self, batch: Batch) -> None:
        """Acknowledge; returns when it is on its way, for the ledger makes a lost ack harmless. Raises Outage."""
        await self._answer_for_good(batch, ACK)

    async def keep_alive(self, messages: Sequence[Message]) -> None:
        """Start the ack wait anew of each. Raises Outage."""
        await self._answer(messages, IN_PROGRESS)

    async def give_back(self, batch: Batch) -> None:
        """Have each delivered again at once. Raises Outage."""
        await self._answer_for_good(batch, NAK)

    async def _next(self) -> Message | None:
        self._check_connected()
        body = msgspec.json.encode({"batch": 1, "expires": int(POLL_S * 1e9)})
        with mapped("cannot pull"):
            # An inbox of its own: a message arrives under its own subject, which nats-py's shared inbox cannot place.
            answer = await self._client.request(self._next_subject, body, timeout=POLL_S + ANSWER_S_MAX, old_style=True)
        headers = answer.headers or {}
        status = None if answer.reply else headers.get("Status")
        if status is None:
            return _read(answer)
        if status in NOTHING:
            return None
        raise Outage(SYSTEM, f"{self._next_subject}: {status} {headers.get('Description', '')}")

    async def _answer_for_good(self, batch: Batch, word: bytes) -> None:
        """An ack names a sequence alone: one to a stream that was made anew would settle a stranger."""
        if await self._created() == batch.created_ns:
            await self._answer(batch.messages, word)

    async def _answer(self, messages: Sequence[Message], word: bytes) -> None:
        self._check_connected()
        with mapped("cannot answer"):
            for message in messages:
                await self._client.publish(message.reply, word)

    def _check_connected(self) -> None:
        if not self._client.is_connected:
            raise Outage(SYSTEM, "not connected; the message will come again")


def _read(message: Msg) -> Message:
    tokens = message.reply.split(".")
    # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>, and since 2.10 the longer
    # $JS.ACK.<domain>.<account>.<stream>.… of the same tail with a random token behind it.
    tail = tokens[4:9] if len(tokens) == 9 else tokens[6:11]
    lines = "".join(f"{name}: {value}\r\n" for name, value in (message.headers or {}).items())
    return Message(
        subject=message.subject,
        body=message.data,
        headers=f"NATS/1.0\r\n{lines}\r\n".encode("utf-8", "surrogateescape") if lines else b"",
        reply=message.reply,
        sequence=int(tail[1]),
        published_ns=int(tail[3]),
        attempts=int(tail[0]),
    )
