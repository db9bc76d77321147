"""A message on its way to JetStream: who waits for it, what bounds all of them, and what it looks like on the wire."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from pulse.domain.batching import Ack, Lane, sequences
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.receipt import Receipt, Waiting

HEADER_BYTES_MAX = 160
"""All of a message's headers without its id: 23 + 17 + 20 + 23 + 4 + 22 + 4, and room."""
SUBJECT = re.compile(r"[!-)+-=?-~]{1,256}")
"""Visible ASCII without the wildcards: a space or line end would let a sender write NATS protocol of its own."""
SUBJECTS_KNOWN_MAX = 10_000
MESSAGE_ID = re.compile(r"[!-~]{1,512}")


class Publication:
    """One message that has no answer yet, and who waits for it; a `batching.Message`.

    `followers` published the same id while this one was pending; they get its answer, as duplicates. Nearly always
    there are none.
    """

    __slots__ = ("body", "deadline", "followers", "message_id", "settled", "size", "subject", "waiting")

    def __init__(self, subject: bytes, body: bytes, message_id: bytes, deadline: float, waiting: Waiting) -> None:
        self.subject = subject
        self.body = body
        self.message_id = message_id
        self.size = len(body) + len(message_id) + HEADER_BYTES_MAX
        self.deadline = deadline
        self.waiting = waiting
        self.followers: tuple[Waiting, ...] = ()
        self.settled = False


class Pending:
    """How much waits for an answer, and the giving of answers; a caller that was cancelled is passed over."""

    def __init__(self, *, messages_max: int, bytes_max: int) -> None:
        self.messages = 0
        self.bytes = 0
        self._messages_max = messages_max
        self._bytes_max = bytes_max

    @property
    def is_full(self) -> bool:
        return self.messages >= self._messages_max or self.bytes >= self._bytes_max

    def add(self, lane: Lane[Publication], message: Publication) -> bool:
        """Count `message` and put it in its lane; False where it follows one that is pending there under its id."""
        self.messages += 1
        first = lane.add(message)
        if first is None:
            self.bytes += len(message.body)
            return True
        first.followers += (message.waiting,)
        return False

    def succeed(self, lane: Lane[Publication], messages: Sequence[Publication], ack: Ack) -> None:
        """`messages` are stored, under contiguous sequences of which `ack` names the last."""
        stream, duplicate, settle = ack.stream, ack.duplicate, self._settle
        for message, seq in zip(messages, sequences(ack, len(messages)), strict=True):
            if message.settled:
                continue
            settle(lane, message, stored=True)
            waiting = message.waiting
            if not waiting.done():
                waiting.set_result(Receipt(stream, seq, duplicate))
            for follower in message.followers:
                if not follower.done():
                    follower.set_result(Receipt(stream, seq, duplicate=True))

    def fail(
        self, lane: Lane[Publication], messages: Iterable[Publication], make_error: Callable[[], Refusal | Outage]
    ) -> None:
        """Each caller gets an error of its own: a traceback grows with every task that raises it."""
        for message in messages:
            if not message.settled:
                self._settle(lane, message, stored=False)
                for waiting in (message.waiting, *message.followers):
                    if not waiting.done():
                        waiting.set_exception(make_error())

    def _settle(self, lane: Lane[Publication], message: Publication, *, stored: bool) -> None:
        lane.settle(message, stored=stored)
        self.messages -= 1 + len(message.followers)
        self.bytes -= len(message.body)


class Subjects:
    """The lane of each subject, and how it stands in a frame; up to SUBJECTS_KNOWN_MAX are not checked anew.

    `lanes` are by a subject's first token.
    """

    def __init__(self, lanes: Mapping[str, Lane[Publication]]) -> None:
        self._lanes = lanes
        self._known: dict[str, tuple[Lane[Publication], bytes]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, subject: str) -> tuple[Lane[Publication], bytes]:
        """Raises Refusal for what cannot stand in a frame, and for a subject of no stream."""
        known = self._known.get(subject)
        if known is not None:
            return known
        if not SUBJECT.fullmatch(subject):
            raise Refusal(Reason.INVALID_SUBJECT, "not a subject that can be published to", field="subject")
        lane = self._lanes.get(subject.partition(".")[0])
        if lane is None:
            raise Refusal(Reason.INVALID_SUBJECT, f"no stream is known for {subject}", field="subject")
        if len(self._known) >= SUBJECTS_KNOWN_MAX:
            self._known.clear()
        known = self._known[subject] = (lane, subject.encode())
        return known


def check_message_id(message_id: str) -> None:
    """Raise Refusal for a message id that cannot stand in a NATS frame."""
    if not MESSAGE_ID.fullmatch(message_id):
        raise Refusal(Reason.INVALID_IDENTITY, "1 to 512 visible ASCII characters are allowed", field="message_id")


def plain_frame(message: Publication, reply: bytes) -> bytes:
    """One publish with its message id, as it stands on the wire."""
    headers = b"NATS/1.0\r\nNats-Msg-Id: %b\r\n\r\n" % message.message_id
    size, body = len(headers), message.body
    return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (message.subject, reply, size, size + len(body), headers, body)


def batch_frames(messages: list[Publication], batch_id: bytes, reply: bytes) -> list[bytes]:
    """The publishes of one atomic batch; only the last asks for an answer.

    Source: ADR-50 of nats-architecture-and-design, "JetStream Batch Publishing".
    """
    frames = []
    last = len(messages)
    constant = b"\r\nNats-Batch-Id: %b\r\nNats-Batch-Sequence: " % batch_id
    end, to = b"\r\n\r\n", b""
    for sequence, message in enumerate(messages, 1):
        if sequence == last:
            end, to = b"\r\nNats-Batch-Commit: 1\r\n\r\n", reply
        headers = b"NATS/1.0\r\nNats-Msg-Id: %b%b%d%b" % (message.message_id, constant, sequence, end)
        size, body = len(headers), message.body
        frames.append(b"HPUB %b %b %d %d\r\n%b%b\r\n" % (message.subject, to, size, size + len(body), headers, body))
    return frames
