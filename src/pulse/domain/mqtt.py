"""A message as an MQTT broker hands it over, and which message it is when it comes again.

A payload with a `seq` has an id of its own. Without one, what a broker may hand over twice is told apart by where it
stood in the session: its packet id, which the broker uses again only after our PUBACK, and its bytes. So the id is

    m/{session}/{packet id}/{digest}/{tenant}/{device}

which a bridge that was killed and started again makes anew for what was not acknowledged. A packet id comes round,
so that in the end two honest messages have the same id, where a device says the same thing twice within JetStream's
duplicate window: see `is_another`.
"""

from __future__ import annotations

import hashlib

import msgspec

from pulse.domain.receipt import Receipt

DELIVERY = "m/"


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One PUBLISH from a broker; `packet_id` is 0 at QoS 0.

    `size` is the payload's as it was sent, in bytes; where that was more than the reader keeps, `payload` is empty.
    `repeated` is the flag DUP, `retained` the flag RETAIN: kept by the broker, and sent because we subscribed.
    """

    topic: bytes
    payload: bytes
    size: int
    packet_id: int
    repeated: bool = False
    retained: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the payload was kept."""
        return len(self.payload) == self.size


def session_name(client_id: str) -> str:
    """What stands for the session of `client_id` in message ids."""
    return hashlib.blake2b(client_id.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def delivery_name(session: str, packet_id: int) -> str:
    """What a message that came as `packet_id` has in common with itself when the broker repeats it."""
    return f"{DELIVERY}{session}/{packet_id}"


def is_delivery_id(message_id: str) -> bool:
    """Whether a message has this id for want of one of its own."""
    return message_id.startswith(DELIVERY)


def same_message(left: Arrival, right: Arrival) -> bool:
    """Whether both, of one packet id that was not acknowledged in between, are the same message."""
    return left.payload == right.payload and left.topic == right.topic and left.size == right.size


def is_another(arrival: Arrival, receipt: Receipt, *, floor: int) -> bool:
    """Whether the stream took `arrival` for an older message that had the same id, so that it has to get another one.

    `floor` is a sequence of the stream that was there before `arrival` was first published. A duplicate of something
    above it is our own earlier try, whose answer was lost. One at or below it, of what the broker sends for the first
    time, is a message that was acknowledged and had the same packet id and bytes. What is sent again (DUP) is taken for
    the one that is there.
    """
    return receipt.duplicate and not arrival.repeated and receipt.seq <= floor
