"""Listening on subjects as they are published: for a work queue, whose messages nobody but its workers may read.

Nothing is replayed: what was published before, or while the connection was lost, is not seen here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.aio.client import Client
from nats.aio.msg import Msg

from pulse.adapters.nats.errors import mapped
from pulse.adapters.nats.follow import Message

QUEUE_MAX = 10_000
"""Messages that wait here; one more is dropped and counted."""
IDLE_S = 1.0


class Listening:
    """A subscription under way; see `listen`."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Message] = asyncio.Queue(QUEUE_MAX)
        self.dropped = 0
        """Messages that came faster than they were read."""

    async def read(self) -> list[Message]:
        """The next messages; none, where there were none for a second. Their `sequence` and `pending` are 0."""
        try:
            async with asyncio.timeout(IDLE_S):
                messages = [await self._queue.get()]
        except TimeoutError:
            return []
        while not self._queue.empty():
            messages.append(self._queue.get_nowait())
        return messages

    async def take(self, message: Msg) -> None:
        """What the subscription calls."""
        if self._queue.full():
            self.dropped += 1
            return
        self._queue.put_nowait(Message(message.subject, message.data, message.headers, 0, 0, time.time_ns()))


@asynccontextmanager
async def listen(client: Client, *, subject: str) -> AsyncIterator[Listening]:
    """Listen on `subject` (wildcards allowed) until the block ends. Raises Outage where NATS is away."""
    listening = Listening()
    doing = f"cannot listen on {subject}"
    with mapped(doing):
        subscription = await client.subscribe(subject, cb=listening.take)
        await client.flush()
    try:
        yield listening
    finally:
        if not client.is_closed:
            with mapped(doing):
                await subscription.unsubscribe()
