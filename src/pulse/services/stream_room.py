"""How much room a stream has left, and when it will have none."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pulse.domain.pipeline import Picture
from pulse.domain.stream_status import StreamStatus

FOREVER_S = 10 * 366 * 86_400.0


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """`fill` of the bytes; at `rate` it is full in `full_in_s`, None where age, quiet or acks keep it from that.

    `steady_fill` is where age will hold it, at that rate.
    """

    fill: float | None
    rate: float | None
    full_in_s: float | None
    steady_fill: float | None


def rooms(streams: Iterable[StreamStatus], picture: Picture | None) -> dict[str, Room]:
    """By name; without a picture nothing is known of rates."""
    return {stream.name: room_of(stream, _rate(stream.name, picture)) for stream in streams}


def room_of(stream: StreamStatus, rate: float | None) -> Room:
    """What follows from how large its messages are, how many come, and how long they stay."""
    if stream.bytes_max is None:
        return Room(fill=None, rate=rate, full_in_s=None, steady_fill=None)
    fill = stream.bytes / stream.bytes_max
    if not rate or not stream.messages or not stream.keeps_acked:
        return Room(fill=fill, rate=rate, full_in_s=None, steady_fill=None)
    bytes_per_s = rate * stream.bytes / stream.messages
    steady = None if stream.age_s_max is None else bytes_per_s * stream.age_s_max / stream.bytes_max
    full_in_s = None
    if steady is None or steady > 1:
        seconds = max(0.0, stream.bytes_max - stream.bytes) / bytes_per_s
        full_in_s = seconds if seconds < FOREVER_S else None
    return Room(fill=fill, rate=rate, full_in_s=full_in_s, steady_fill=steady)


def _rate(name: str, picture: Picture | None) -> float | None:
    stage = None if picture is None else picture.stages.get(name)
    return None if stage is None else stage.rate
