"""JetStream's word for one message: it is on disk, under this sequence."""

from __future__ import annotations

import msgspec


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What a PubAck says of one message.

    `duplicate` is true where the stream already had the message id inside its duplicate window; `seq` is then
    the sequence of the first one. Source: NATS JetStream wire API, `io.nats.jetstream.api.v1.pub_ack_response`.
    """

    stream: str
    seq: int
    duplicate: bool = False
