"""Acknowledging jobs one by one costs a question to the stream each: those of one moment go together.

Who acks: here, what `Delivery` says is done: delivered, or waiting in LATER, or a letter in DEAD_LETTERS. A crash
before it costs a redelivery: the same schedule or letter under the same id, or the same webhook under the same
webhook-id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pulse.domain.errors import Outage
from pulse.domain.settlement import Message
from pulse.services.waiting import Source, Waits


class Part(NamedTuple):
    """Messages of one making of a stream."""

    created_ns: int
    messages: Sequence[Message]


class Acks:
    """Acknowledges to one `source`; `done` is told of each message that is."""

    def __init__(
        self, source: Source, *, waits: Waits, done: Callable[[int, Message], None], probe: Callable[[str], None]
    ) -> None:
        self._source = source
        self._waits = waits
        self._done = done
        self._probe = probe
        self._gathered: dict[int, list[Message]] = {}
        self._some = asyncio.Event()

    def add(self, created_ns: int, message: Message) -> None:
        """`message` is done with."""
        self._gathered.setdefault(created_ns, []).append(message)
        self._some.set()

    async def run(self, stop: asyncio.Event, last: asyncio.Event) -> None:
        """Acknowledge until `last` is set and nothing is left; an outage is waited out until `stop`."""
        while not (last.is_set() and not self._gathered):
            if not self._gathered:
                self._some.clear()
                await _either(self._some, last)
                continue
            gathered, self._gathered = self._gathered, {}
            for created_ns, messages in gathered.items():
                await self._until_acked(Part(created_ns, messages), stop)
                for message in messages:
                    self._done(created_ns, message)

    async def _until_acked(self, part: Part, stop: asyncio.Event) -> None:
        attempt = 0
        while True:
            try:
                await self._source.ack(part)
            except Outage as outage:
                attempt += 1
                if stop.is_set():
                    return
                await self._waits.out(outage, attempt, stop)
                continue
            self._probe("delivery.acked")
            self._waits.over("nats")
            return


async def _either(*events: asyncio.Event) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for each in waiting:
        each.cancel()
