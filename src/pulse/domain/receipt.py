"""JetStream's word for one message: it is on disk, under this sequence."""

from __future__ import annotations

from typing import Protocol

import msgspec

from pulse.domain.errors import Outage, Refusal


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What a PubAck says of one message.

    `duplicate` is true where the stream already had the message id inside its duplicate window; `seq` is then
    the sequence of the first one. Source: NATS JetStream wire API, `io.nats.jetstream.api.v1.pub_ack_response`.
    """

    stream: str
    seq: int
    duplicate: bool = False


class Waiting(Protocol):
    """Who waits for the receipt of one message, or for the error instead; an `asyncio.Future[Receipt]` is one.

    It is told once, inside of whatever brought the news: it must neither raise nor take long.
    """

    def done(self) -> bool:
        """Whether it waits no longer."""

    def set_result(self, receipt: Receipt, /) -> None:
        """The message is on disk."""

    def set_exception(self, error: Refusal | Outage, /) -> None:
        """Nobody knows that it is."""
