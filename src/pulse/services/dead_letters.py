"""Dead letters as an operator handles them, from the command line or the control API: list, show, replay, purge.

A replay publishes a page of letters, and then records the page. Cut off in between, the same letters are published
again next time under the same message ids, which JetStream takes for one message within its duplicate window. Nothing
is removed by a replay, so nothing can be lost by one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

from pulse.domain.dead_letter import Filter, Letter, Replay, Replayed, Summary, replay_of
from pulse.domain.envelope import unwrap
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.receipt import Receipt
from pulse.domain.route import read_job

REPLAY_PAGE = 100
"""Letters that are published together; what a kill can leave published and not recorded."""
PURGE_PAGE = 1000
RATE_SLICE_S = 0.1
"""A replay at a limited rate publishes so many seconds' worth at a time."""


@dataclass(frozen=True, slots=True)
class Matching:
    """How many letters match, how many of them were replayed, and the newest id: what comes later is not meant."""

    count: int
    replayed: int
    last_id: int


class Store(Protocol):
    """The table; every call raises Outage where the database is away."""

    async def page(self, wanted: Filter, *, before: int | None, limit: int) -> Sequence[Summary]:
        """Those that match, newest first, below the id `before`."""

    async def letter(self, letter_id: int) -> Letter | None:
        """One of them whole."""

    async def letters(self, wanted: Filter, *, after: int, last: int, limit: int) -> Sequence[Letter]:
        """Those that match, whole, oldest first, above the id `after` and up to `last`."""

    async def count(self, wanted: Filter) -> tuple[int, int, int]:
        """How many match, how many of these were replayed, and the highest id, 0 where none matches."""

    async def record_replays(self, replays: Sequence[tuple[int, int, int]]) -> None:
        """Of each (id, how often it was replayed before, sequence of the new message); nothing that is recorded."""

    async def delete(self, wanted: Filter, *, last: int, limit: int) -> int:
        """Delete at most `limit` of those that match, up to the id `last`; returns how many."""


class Publisher(Protocol):
    """The streams."""

    async def publish(self, replay: Replay) -> Receipt:
        """Store one message. Raises Outage, and Refusal where its stream can never take it."""


class DeadLetters:
    """Every call raises Outage; `publisher` is needed for replays alone."""

    def __init__(self, *, store: Store, publisher: Publisher | None = None) -> None:
        self._store = store
        self._publisher = publisher

    async def page(self, wanted: Filter, *, before: int | None = None, limit: int = 100) -> Sequence[Summary]:
        """Those that match, newest first; the next page is `before` the last id of this one."""
        return await self._store.page(wanted, before=before, limit=limit)

    async def show(self, letter_id: int) -> Letter:
        """One letter whole. Refusal NOT_FOUND where there is none."""
        letter = await self._store.letter(letter_id)
        if letter is None:
            raise Refusal(Reason.NOT_FOUND, f"there is no dead letter {letter_id}")
        return letter

    async def count(self, wanted: Filter) -> Matching:
        """What `replay` or `purge` would be about, for a question before it."""
        return Matching(*await self._store.count(wanted))

    async def replay_one(self, letter_id: int, *, body: bytes | None = None) -> Replayed:
        """Publish one letter again, with another `body` where one is given, replayed before or not.

        Raises Refusal where there is no such letter or its stream cannot take it.
        """
        letter = await self.show(letter_id)
        if body is not None:
            _check_mended(letter, body)
        (replayed,) = await self._uncut(self._publish([letter], body))
        if replayed.refusal:
            raise replayed.refusal
        return replayed

    async def replay(
        self, wanted: Filter, *, last_id: int, rate_per_s: float | None = None
    ) -> AsyncGenerator[list[Replayed], None]:
        """Publish again all that match up to `last_id`, oldest first; yields what is published and recorded.

        Ends by an Outage where NATS or the database goes away: what was yielded is done, and the rest can be repeated.
        """
        page_size = REPLAY_PAGE if rate_per_s is None else max(1, min(REPLAY_PAGE, int(rate_per_s * RATE_SLICE_S)))
        started_at, done, after = time.monotonic(), 0, 0
        while letters := await self._store.letters(wanted, after=after, last=last_id, limit=page_size):
            if rate_per_s is not None:
                await asyncio.sleep(max(0.0, started_at + done / rate_per_s - time.monotonic()))
            yield await self._uncut(self._publish(letters))
            done += len(letters)
            after = letters[-1].summary.id

    async def purge(self, wanted: Filter, *, last_id: int) -> AsyncGenerator[int, None]:
        """Delete all that match up to `last_id`; yields how many at each step."""
        while deleted := await self._store.delete(wanted, last=last_id, limit=PURGE_PAGE):
            yield deleted

    async def _publish(self, letters: Sequence[Letter], body: bytes | None = None) -> list[Replayed]:
        """Publish `letters` and record what was published; then raise the first Outage, if there was one."""
        assert self._publisher is not None, "a replay needs a publisher"
        outages: list[Outage] = []
        published: list[tuple[int, int, int]] = []

        async def one(letter: Letter, publisher: Publisher) -> Replayed | None:
            replay = replay_of(letter, body=body)
            try:
                receipt = await publisher.publish(replay)
            except Outage as outage:
                outages.append(outage)
                return None
            except Refusal as refusal:
                return Replayed(replay.letter_id, replay.stream, None, refusal)
            published.append((replay.letter_id, letter.summary.replays, receipt.seq))
            return Replayed(replay.letter_id, replay.stream, receipt.seq)

        done = await asyncio.gather(*(one(letter, self._publisher) for letter in letters))
        if published:
            await self._store.record_replays(published)
        if outages:
            raise outages[0]
        return [each for each in done if each is not None]

    async def _uncut(self, page: Coroutine[None, None, list[Replayed]]) -> list[Replayed]:
        """A page that is cancelled is finished first: what was published shall be recorded."""
        task = asyncio.create_task(page, name="replay-page")
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise


def _check_mended(letter: Letter, body: bytes) -> None:
    """Raise Refusal where `body` would only die again, and with it who had sent it."""
    subject = letter.summary.subject
    try:
        if subject.startswith("routes."):
            read_job(subject, body)
        else:
            unwrap(subject, body)
    except Refusal as refusal:
        raise Refusal(
            refusal.reason,
            f"the mended body is no whole message, envelope and payload: {refusal.message}",
            field=refusal.field,
        ) from refusal
