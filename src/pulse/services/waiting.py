"""What every worker does while it waits: wait out an outage, and keep alive what it has in hand."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import structlog

from pulse.domain.errors import Outage
from pulse.domain.retry import delay_s
from pulse.domain.settlement import Message

log = structlog.get_logger()

KEEP_ALIVE_S = 10.0
"""How often what waits tells the stream that it is still worked on; a third of the ack wait of 30 s."""


class Batch(Protocol):
    """Messages that arrived together, all from one making of the stream."""

    @property
    def created_ns(self) -> int:
        """When that making was made; the server's own word, in ns since the epoch."""

    @property
    def messages(self) -> Sequence[Message]:
        """At least one message."""


class Source(Protocol):
    """The stream's consumer; every call raises Outage where the stream is away."""

    async def fetch(self) -> Batch | None:
        """The next messages; None where none came within the poll time."""

    async def ack(self, batch: Batch) -> None:
        """Done with these, for good."""

    async def keep_alive(self, messages: Sequence[Message]) -> None:
        """Still working on these: start their ack wait anew, and that of what arrived and was not fetched yet."""

    async def give_back(self, batch: Batch) -> None:
        """Deliver these again, at once, to others: after this, nothing more can be fetched."""


class WaitMetrics(Protocol):
    """What is told of waiting."""

    def waiting(self, system: str, waiting: bool) -> None:
        """The worker began or ceased to wait for a system."""


class Waits:
    """The outages that a worker waits for."""

    def __init__(self, metrics: WaitMetrics, *, delay_s_min: float, delay_s_max: float) -> None:
        self._metrics = metrics
        self._delay_s_min = delay_s_min
        self._delay_s_max = delay_s_max
        self._since: dict[str, float] = {}

    async def out(self, outage: Outage, attempt: int, stop: asyncio.Event) -> None:
        """Wait for as long as the `attempt`-th failure in a row deserves, or until `stop`."""
        if outage.system not in self._since:
            self._since[outage.system] = time.monotonic()
            self._metrics.waiting(outage.system, True)
            log.warning("waiting", system=outage.system, error=str(outage))
        pause = delay_s(
            attempt,
            minimum_s=self._delay_s_min,
            maximum_s=self._delay_s_max,
            random=random.random(),  # noqa: S311 jitter, not a secret
        )
        try:
            await asyncio.wait_for(stop.wait(), pause)
        except TimeoutError:
            return

    def over(self, *systems: str) -> None:
        """These are there again; without names, all."""
        for system in systems or tuple(self._since):
            since = self._since.pop(system, None)
            if since is not None:
                self._metrics.waiting(system, False)
                log.info("recovered", system=system, after_s=round(time.monotonic() - since, 2))


class KeptAlive:
    """The messages that a worker holds: what stays long is kept alive, so that it is not delivered to others."""

    def __init__(self, source: Source, *, keep_alive_s: float) -> None:
        self._source = source
        self._keep_alive_s = keep_alive_s
        self._held: dict[object, Iterable[Message]] = {}

    def take(self, key: object, messages: Iterable[Message]) -> None:
        """Hold `messages` under `key` until it is dropped."""
        self._held[key] = messages

    def drop(self, key: object) -> None:
        """What is held under `key` is done with, in whatever way."""
        self._held.pop(key, None)

    async def keep_alive(self) -> None:
        """Tell the stream of what has been held for a while, for ever."""
        while True:
            before = self._held.copy()
            await asyncio.sleep(self._keep_alive_s)
            messages = [message for key, held in before.items() if self._held.get(key) is held for message in held]
            if not messages:
                continue
            try:
                await self._source.keep_alive(messages)
            except Outage as outage:
                log.warning("messages may be redelivered", error=str(outage), messages=len(messages))

    async def give_back(self, batch: Batch) -> None:
        """Have others take `batch`; where the stream is away, it is delivered again by itself."""
        try:
            await self._source.give_back(batch)
        except Outage as outage:
            log.warning("messages wait for redelivery", error=str(outage), messages=len(batch.messages))
