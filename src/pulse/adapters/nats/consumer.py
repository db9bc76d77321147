"""A pull consumer: batches as they come, acknowledged in bulk.

Pull requests overlap, for as many messages as there is room (`pulls.py`); while a batch is being worked on, the next
one gathers here, in the frames that it came in (`frames.py`). `fetch` hands over what has gathered once the oldest of
it has waited for `linger_s` or the batch is full, so a lone message waits for `linger_s` and a flood comes in full
batches.

Which making of the stream a message belongs to is not in the message. So the stream is asked when it was made before
the first pull and after each batch: where both say the same, all that arrived in between is of that making. Where
they differ, what arrived is left unacknowledged and comes again. An ack names its message by the sequence alone: one to
a message of a former making would settle a stranger, so the stream is asked before each ack as well.

Source: NATS ADR-13 (pull consumers), ADR-15 (acknowledgement subjects).
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Protocol, Self

import msgspec
import structlog
from nats.aio.client import Client

from pulse.adapters.nats.errors import mapped
from pulse.adapters.nats.frames import Frame, FrameSubscription, subscribe, write
from pulse.adapters.nats.pulls import HEARTBEAT, Pulls, read_status
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

WINDOW = 2
"""Batches that may be on their way or wait here: one is fetched while the next one comes."""
ACK_PREFIX = b"$JS.ACK."
FRAME_BYTES_MAX = 4096
"""Subject and reply of a message, which the server counts as well; nats-server's max_control_line is as long."""

_numbers = msgspec.json.Decoder(list[int])


class Batch(Protocol):
    """Messages that arrived together, of the making of the stream at `created_ns`."""

    @property
    def created_ns(self) -> int: ...

    @property
    def messages(self) -> Sequence[Message]: ...


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
        self._pulls = Pulls(size=batch_max, window=WINDOW * batch_max)
        self._pulled_on = -1
        self._subscription: FrameSubscription | None = None
        self._buffer: list[Frame] = []
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._heard_at = 0.0
        self._refusal: str | None = None
        self._created_ns: int | None = None

    async def __aenter__(self) -> Self:
        with mapped("cannot pull"):
            self._subscription = await subscribe(self._client, f"{self._inbox}.*", self._on_frames)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._client.is_closed:
            await self._leave()
            if self._buffer and self._created_ns is not None:
                with contextlib.suppress(Outage):  # then they come again after their ack wait
                    await self.give_back(Fetched(self._created_ns, _read(self._buffer)))

    async def fetch(self) -> Fetched | None:
        """The next batch; None where no message came within a second. Raises Outage."""
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise Outage("nats", refusal)
        self._check_connected()
        if self._created_ns is None:
            self._created_ns = await self._created()
        self._pull()
        if not self._buffer and not await _within(POLL_S, self._arrived):
            self._check_alive()
            return None
        if len(self._buffer) < self._batch_max:
            self._full.clear()
            await _within(self._linger_s, self._full)
        # Counted before the stream is asked, taken after: an outage of the asking leaves all of it here.
        count = self._batch_count()
        before, after = self._created_ns, await self._created()
        if before != after:
            log.warning("stream was made anew; what arrived is left to be redelivered", messages=len(self._buffer))
            self._created_ns = after
            count = 0
            self._buffer.clear()
        messages = _read(self._buffer[:count]) if count else []
        del self._buffer[:count]
        if not self._buffer:
            self._arrived.clear()
        self._pull()
        return Fetched(after, messages) if messages else None

    async def ack(self, batch: Batch) -> None:
        """Acknowledge; returns when it is on its way, for the ledger makes a lost ack harmless. Raises Outage."""
        await self._answer_for_good(batch, ACK)

    async def keep_alive(self, messages: Sequence[Message]) -> None:
        """Start the ack wait anew of each, and of what waits here to be fetched. Raises Outage."""
        self._check_connected()
        self._answer((message.reply for message in messages), IN_PROGRESS)
        self._answer((frame[1].decode() for frame in self._buffer), IN_PROGRESS)

    async def give_back(self, batch: Batch) -> None:
        """Have each delivered again at once, to others: from then on nothing comes here. Raises Outage."""
        self._check_connected()
        await self._leave()
        await self._answer_for_good(batch, NAK)

    async def _leave(self) -> None:
        """Pull no more: what is given back would come straight back, which costs it an attempt.

        What is on its way is waited for, to be given back too: dropped, it would come again only after its ack wait.
        """
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with mapped("cannot pull"):
                await subscription.drain()

    async def _answer_for_good(self, batch: Batch, word: bytes) -> None:
        self._check_connected()
        if await self._created() == batch.created_ns:
            self._answer((message.reply for message in batch.messages), word)
        else:
            log.warning("stream was made anew; the old one needs no answer", messages=len(batch.messages))

    def _check_connected(self) -> None:
        if not self._client.is_connected:
            raise Outage("nats", "not connected; the messages will come again")

    def _answer(self, replies: Iterable[str], word: bytes) -> None:
        """One PUB for each, all in one buffer."""
        targets = list(replies)
        if targets:
            end = f" {len(word)}\r\n{word.decode()}\r\n"
            write(self._client, f"PUB {f'{end}PUB '.join(targets)}{end}".encode(), messages=len(targets))

    def _batch_count(self) -> int:
        """How many of those that have gathered make a batch; at least one where there is one."""
        sizes = [len(frame[3]) for frame in self._buffer[: self._batch_max]]
        return min(len(sizes), bisect_left(list(accumulate(sizes)), self._batch_bytes_max) + 1)

    def _pull(self) -> None:
        """Ask for as much as there is room for."""
        connection = self._client.stats["reconnects"]
        if connection != self._pulled_on:
            self._pulls.lost()
        while self._can_pull and self._pulls.wanted(len(self._buffer)):
            request = {
                "batch": self._pulls.size,
                # The largest message has to fit, or it and all behind it would wait for ever.
                "max_bytes": max(self._batch_bytes_max, self._client.max_payload + FRAME_BYTES_MAX),
                "expires": int(PULL_EXPIRES_S * 1e9),
                "idle_heartbeat": int(IDLE_HEARTBEAT_S * 1e9),
            }
            body = msgspec.json.encode(request)
            head = f"PUB {self._next_subject} {self._inbox}.{self._pulls.sent()} {len(body)}\r\n"
            write(self._client, b"%b%b\r\n" % (head.encode(), body), messages=1)
            self._pulled_on = connection
            self._heard_at = asyncio.get_running_loop().time()

    @property
    def _can_pull(self) -> bool:
        return self._subscription is not None and self._refusal is None and self._client.is_connected

    def _check_alive(self) -> None:
        """Give up pull requests of which nothing was heard: the server, or the connection to it, has lost them."""
        silent_s = asyncio.get_running_loop().time() - self._heard_at
        if silent_s > SILENCE_S_MAX:
            self._pulls.lost()
        self._check_connected()

    def _on_frames(self, frames: list[Frame]) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        messages = [frame for frame in frames if frame[1].startswith(ACK_PREFIX)]
        if messages:
            self._buffer += messages
            self._pulls.arrived(len(messages))
            self._arrived.set()
        if len(messages) < len(frames):
            for frame in frames:
                self._on_status(frame)
        if len(self._buffer) >= self._batch_max:
            self._full.set()
        self._pull()

    def _on_status(self, frame: Frame) -> None:
        """Status 404 or 408: that request is over. 409 or 503 as its first word: another one is not wanted now."""
        subject, reply, headers, _ = frame
        status = read_status(headers) if not reply else None
        number = subject.rpartition(b".")[2]
        if status is None or status.code == HEARTBEAT or not number.isdigit():
            return
        if self._pulls.ended(int(number), status):
            self._refusal = f"{self._next_subject}: {status.code} {status.description or 'no responders'}"
        self._full.set()


async def _within(limit_s: float, event: asyncio.Event) -> bool:
    """Whether `event` was set within `limit_s`."""
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _read(frames: Sequence[Frame]) -> list[Message]:
    """The messages of these frames, of which there is at least one."""
    subjects, replies, headers, bodies = zip(*frames, strict=True)
    # Not every subject is UTF-8: the server does not look. There are a few, one a tenant, and many messages of each.
    names = {subject: subject.decode("utf-8", "surrogateescape") for subject in set(subjects)}
    targets, numbers = _read_replies(replies)
    attempts, sequences, published = numbers[0::5], numbers[1::5], numbers[3::5]
    return list(
        map(Message, [names[subject] for subject in subjects], bodies, headers, targets, sequences, published, attempts)
    )


def _read_replies(replies: Sequence[bytes]) -> tuple[list[str], list[int]]:
    """The ack subjects as text, and the five numbers of each: attempts, stream and consumer sequence, ns, pending.

    $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>, and since 2.10 the longer
    $JS.ACK.<domain>.<account>.<stream>.… of the same tail with a random token behind it.
    """
    text = b" ".join(replies).decode()
    targets = text.split(" ")
    start = ".".join(targets[0].split(".", 4)[:4]) + "."
    if text.count(start) == len(targets):
        # All begin alike: what is left is numbers, which are read at once, a third of the time of one by one.
        with contextlib.suppress(msgspec.DecodeError):
            numbers = _numbers.decode(f"[{text.replace(start, '').replace('.', ',').replace(' ', ',')}]")
            if len(numbers) == 5 * len(targets):
                return targets, numbers
    tails = [target.split(".") for target in targets]
    return targets, [int(token) for tail in tails for token in (tail[4:9] if len(tail) == 9 else tail[6:11])]
