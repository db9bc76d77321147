"""Group commit without its I/O: which messages travel together, and what JetStream's answer means for them.

    add ─► waiting ─► take ─► request on its way ─► answer ─► judge ─┬─ STORED      each message its own sequence
              ▲                                                      ├─ DIVIDE      quarters of it, at last one by one
            again ◄──────────── divide, resend ◄─────────────────────┼─ ONE_BY_ONE  the stream takes no batches
                                                                     ├─ LATER       the same again, after a pause
                                                                     └─ FULL, REFUSED: its callers are told

There is no timer: while requests are on their way, what comes in gathers, and leaves as one request when a slot is
free. A request of many is an atomic batch: JetStream stores all of it, under contiguous sequences, or nothing. One
message that it will not take (a repeated id, say) refuses the whole batch and is not named, so the batch is divided.
Every retry carries the same message ids, hence a message that was stored already answers `duplicate`, never twice.
Division is slow, and a device that repeats itself must not slow the others: an id that this lane has seen stored goes
alone, so that a repetition costs a batch at most once.

A lane promises no order between messages that are unsettled at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, Protocol, TypeVar

import msgspec

BATCH_MESSAGES_MAX = 1000
"""The server's own bound on an atomic batch; a larger one is refused with 10199."""
DIVISOR = 4
"""One repeated id among 1000 messages: 3 batches of 250, 3 of 63 and some 63 plain publishes, not 1000 of those."""
PART_MIN = 20
"""A batch costs the server a staging file and as much time as some 16 plain publishes; a smaller part would lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds one lane; docs/adr/0005 has the measurements behind the defaults."""

    batch_min: int = 16
    """Fewer messages than this go as plain publishes: a batch costs the server as much as some 16 of them."""
    early_min: int = 32
    """Fewer than this wait until the callers of the batch before are told, and for what those send next."""
    batch_max: int = BATCH_MESSAGES_MAX
    batch_bytes_max: int = 1024 * 1024
    batches_in_flight_max: int = 4
    """Of full batches; while any batch is on its way, a smaller one waits and gathers."""
    alone_in_flight_max: int = 256
    remembered_max: int = 200_000
    """Message ids of which it is known that they are stored."""

    def __post_init__(self) -> None:
        if not 1 <= self.batch_min <= self.batch_max <= BATCH_MESSAGES_MAX:
            raise ValueError(f"not 1 <= {self.batch_min=} <= {self.batch_max=} <= {BATCH_MESSAGES_MAX}")


class Message(Protocol):
    """What a lane has to know of a message; `size` is in bytes, `settled` says that its caller has its answer."""

    message_id: bytes
    size: int
    settled: bool


M = TypeVar("M", bound=Message)


@dataclass(slots=True)
class Request(Generic[M]):
    """Messages that share one answer: one message is a plain publish, several are an atomic batch.

    `alone` says which kind of slot it holds: a message that may not travel in company has many slots of its own.
    `attempt` counts how often it was sent before without an answer that settles it.
    """

    messages: list[M]
    alone: bool = False
    attempt: int = 0


class Remembered:
    """The last `ids_max` ids or fewer, at least half as many: two generations, of which the older is dropped whole.

    It holds hashes, some 70 bytes each; two ids with the same hash cost a plain publish and nothing else.
    """

    def __init__(self, ids_max: int) -> None:
        self._generation_max = max(1, ids_max // 2)
        self._young: set[int] = set()
        self._old: set[int] = set()

    def add(self, message_id: bytes) -> None:
        self._young.add(hash(message_id))
        if len(self._young) >= self._generation_max:
            self._young, self._old = set(), self._young

    def __contains__(self, message_id: bytes) -> bool:
        return (key := hash(message_id)) in self._young or key in self._old


class Lane(Generic[M]):
    """The messages of one stream that have no answer yet, and how many requests may be on their way for them."""

    def __init__(self, limits: Limits) -> None:
        self.atomic = True
        self.unsettled: dict[bytes, M] = {}
        """By message id, oldest first."""
        self._limits = limits
        self._batches_in_flight = 0
        self._alone_in_flight = 0
        self._waiting: deque[M] = deque()
        self._waiting_bytes = 0
        self._again: deque[Request[M]] = deque()
        self._stored = Remembered(limits.remembered_max)

    @property
    def is_full(self) -> bool:
        """Whether a whole batch waits, by its messages or its bytes."""
        return len(self._waiting) >= self._limits.batch_max or self._waiting_bytes >= self._limits.batch_bytes_max

    def add(self, message: M) -> M | None:
        """Let `message` wait for a request, or return the unsettled one with the same id: they share an answer."""
        first = self.unsettled.setdefault(message.message_id, message)
        if first is not message:
            return first
        if message.message_id in self._stored:
            self._again.append(Request([message], alone=True))
        else:
            self._waiting.append(message)
            self._waiting_bytes += message.size
        return None

    def settle(self, message: M, *, stored: bool) -> None:
        """`message` has its answer, and whether that says it is stored; a later one with its id is one of its own."""
        message.settled = True
        del self.unsettled[message.message_id]
        if stored:
            self._stored.add(message.message_id)

    def take(self) -> Request[M] | None:
        """The next request to send, which now holds a slot; None where there is nothing to send or no slot is free."""
        while self._again and self._has_slot(alone=self._again[0].alone):
            request = self._again.popleft()
            request.messages = [message for message in request.messages if not message.settled]
            if request.messages:
                return self._occupy(request)
        while self._waiting:
            count = self._next_count()
            messages = self._gather(count)
            if messages:
                return self._occupy(Request(messages, alone=count == 1))
            if not count:
                break
        return None

    def leaves_early(self, answered: Request[M]) -> bool:
        """Whether what waits is to leave before the callers of `answered` are told, so that the server works meanwhile.

        A few had better go with what those callers send next: a batch has its cost, however small it is.
        """
        return len(answered.messages) == 1 or len(self._waiting) >= self._limits.early_min

    def free(self, request: Request[M]) -> None:
        """The slot of `request` is free again: it was answered, or given up."""
        if request.alone:
            self._alone_in_flight -= 1
        else:
            self._batches_in_flight -= 1

    def resend(self, request: Request[M]) -> None:
        """Nobody knows what became of `request`: all of it again."""
        request.attempt += 1
        self._again.append(request)

    def divide(self, request: Request[M], *, one_by_one: bool = False) -> None:
        """Send the messages of a refused batch again in smaller requests, so that each gets the answer it deserves.

        A batch that was sent before without an answer is taken for stored as a whole: its messages go one by one, and
        no repeated message costs the server a sync.
        """
        messages = request.messages
        part = -(-len(messages) // DIVISOR)
        if one_by_one or request.attempt or part < PART_MIN:
            part = 1
        for start in range(0, len(messages), part):
            self._again.append(Request(messages[start : start + part], alone=part == 1))

    def _next_count(self) -> int:
        """How many of the waiting messages may leave together now; 0 where they have to wait, and gather."""
        if not self.atomic:
            return 1 if self._has_slot(alone=True) else 0
        if self.is_full:
            return self._limits.batch_max if self._has_slot(alone=False) else 0
        if self._batches_in_flight:
            return 0
        if len(self._waiting) >= self._limits.batch_min:
            return self._limits.batch_max
        return 1 if self._alone_in_flight < self._limits.batch_min and self._has_slot(alone=True) else 0

    def _has_slot(self, *, alone: bool) -> bool:
        if alone:
            return self._alone_in_flight < self._limits.alone_in_flight_max
        return self._batches_in_flight < self._limits.batches_in_flight_max

    def _occupy(self, request: Request[M]) -> Request[M]:
        if request.alone:
            self._alone_in_flight += 1
        else:
            self._batches_in_flight += 1
        return request

    def _gather(self, messages_max: int) -> list[M]:
        waiting = self._waiting
        if len(waiting) <= messages_max and self._waiting_bytes <= self._limits.batch_bytes_max:
            self._waiting, self._waiting_bytes = deque(), 0
            return [message for message in waiting if not message.settled]
        messages: list[M] = []
        room = self._limits.batch_bytes_max
        while waiting and len(messages) < messages_max:
            size = waiting[0].size
            room -= size
            if room < 0 and messages:
                break
            message = waiting.popleft()
            self._waiting_bytes -= size
            if not message.settled:
                messages.append(message)
        return messages


class AckError(msgspec.Struct, frozen=True, gc=False):
    """The error of a PubAck: `code` is HTTP's, `err_code` the server's own (nats-server, `server/errors.json`)."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class Ack(msgspec.Struct, frozen=True, gc=False):
    """A PubAck; `seq` is the last one of a batch of `count`.

    Source: `io.nats.jetstream.api.v1.pub_ack_response`; for batches ADR-50 of nats-architecture-and-design.
    """

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    count: int = 0
    error: AckError | None = None


class Verdict(Enum):
    """What an answer means for the messages of its request; see the module."""

    STORED = auto()
    DIVIDE = auto()
    ONE_BY_ONE = auto()
    LATER = auto()
    FULL = auto()
    TOO_LARGE = auto()
    REFUSED = auto()


VERDICT_BY_ERROR = {
    10002: Verdict.FULL,  # account limits
    10023: Verdict.FULL,  # insufficient resources
    10028: Verdict.FULL,  # memory
    10047: Verdict.FULL,  # storage
    10077: Verdict.FULL,  # store failed: maximum messages or bytes, and discard new
    10122: Verdict.FULL,  # stream's share of the account
    10174: Verdict.ONE_BY_ONE,  # allow_atomic is off
}
MESSAGE_EXCEEDS_MAXIMUM = 10054
HTTP_CONFLICT, HTTP_TOO_MANY, HTTP_SERVER_ERROR = 409, 429, 500
"""409: the id is being stored at this moment (10158); 429: the stream's queue (10167) or its batches (10210)."""


def judge(ack: Ack, count: int) -> Verdict:
    """What `ack` says of a request of `count` messages.

    An ack of a batch that counts no messages comes from a server that knows no batches (before 2.12): it stored each
    message by itself and answered for the last alone.
    """
    error = ack.error
    if error is None:
        return Verdict.STORED if count in (1, ack.count) else Verdict.ONE_BY_ONE
    if error.err_code in VERDICT_BY_ERROR:
        return VERDICT_BY_ERROR[error.err_code]
    if error.code in (HTTP_CONFLICT, HTTP_TOO_MANY) or error.code >= HTTP_SERVER_ERROR:
        return Verdict.LATER
    if count > 1:
        return Verdict.DIVIDE
    return Verdict.TOO_LARGE if error.err_code == MESSAGE_EXCEEDS_MAXIMUM else Verdict.REFUSED


def sequences(ack: Ack, count: int) -> Iterator[int]:
    """The stream sequences of a stored request's `count` messages, in their order."""
    return iter(range(ack.seq - count + 1, ack.seq + 1))
