"""What a broker sends, cut into packets; see `packets.py`.

A PUBLISH, of which there are thousands a second, takes one pass over its header; what is larger than the reader keeps
is passed over without being held in memory, and told with its size. Properties are read where something depends on
them (CONNACK, DISCONNECT) and else skipped: we announce no topic aliases, so no PUBLISH depends on one.
"""

from __future__ import annotations

from collections.abc import Iterator

from pulse.adapters.mqtt.packets import (
    Connack,
    Control,
    Disconnect,
    Malformed,
    Pingresp,
    Puback,
    Suback,
    Version,
)
from pulse.domain.mqtt import Arrival

PAYLOAD_BYTES_MAX = 512 * 1024
"""What a reader keeps of one message: a dead letter carries it in base64, and NATS takes 1 MB."""
HEAD_BYTES_MAX = 80 * 1024
"""Packet id, a topic of at most 64 KiB, and properties: of a PUBLISH that is passed over, this much is waited for."""
LENGTH_BYTES_MAX = 4


class Reader:
    """Cuts what a broker sends into packets, wherever the reads happen to end."""

    def __init__(self, version: Version, *, payload_bytes_max: int = PAYLOAD_BYTES_MAX) -> None:
        self._is_5 = version is Version.V5
        self._payload_bytes_max = payload_bytes_max
        self._rest = bytearray()
        self._needed = 0
        self._passing = 0
        self._passed: Arrival | None = None

    def feed(self, data: bytes) -> tuple[list[Arrival], list[Control]]:
        """All packets that end in `data`, the messages apart from the rest. Raises Malformed."""
        arrivals: list[Arrival] = []
        controls: list[Control] = []
        if self._passed is not None:
            if len(data) < self._passing:
                self._passing -= len(data)
                return arrivals, controls
            data = data[self._passing :]
            arrivals.append(self._passed)
            self._passed = None
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return arrivals, controls
            data = bytes(self._rest)
            self._rest.clear()
        at = self._cut(data, arrivals, controls)
        if at < len(data):
            self._rest += data[at:]
        return arrivals, controls

    def _cut(self, data: bytes, arrivals: list[Arrival], controls: list[Control]) -> int:
        """Where the first packet begins that is not all there; `_needed` then is how many bytes it takes to go on."""
        at, length, whole_max = 0, len(data), self._payload_bytes_max
        while True:
            self._needed = 2
            if at + 2 > length:
                return at
            size, body = data[at + 1], at + 2
            if size > 0x7F and at + 2 < length and data[at + 2] < 0x80:  # as of nearly all messages
                size, body = size & 0x7F | data[at + 2] << 7, at + 3
            elif size > 0x7F:
                found = _read_length(data, at + 1)
                if found is None:
                    self._needed = 0
                    return at
                size, body = found
            end = body + size
            first = data[at]
            if first & 0xF0 == 0x30:
                is_kept = size <= whole_max
                needed = end if is_kept else min(end, body + HEAD_BYTES_MAX)
                if needed > length:
                    self._needed = needed - at
                    return at
                arrival = self._publish(data, first, body, needed, end)
                if end > length:
                    self._passed, self._passing = arrival, end - length
                    return length
                arrivals.append(arrival)
            else:
                if size > HEAD_BYTES_MAX:
                    raise Malformed(f"a packet of type {first >> 4} with {size} bytes")
                if end > length:
                    self._needed = end - at
                    return at
                controls.append(self._control(first, data[body:end]))
            at = end

    def _publish(self, data: bytes, first: int, body: int, read: int, end: int) -> Arrival:
        """The message whose packet ends at `end`; `data` is there up to `read`, and all of it where it is kept."""
        topic = body + 2
        if topic > read:
            raise Malformed("a PUBLISH without a topic")
        at = topic + (data[body] << 8 | data[body + 1])
        if at > read:
            raise Malformed("a PUBLISH whose topic does not end")
        topic_end = at
        qos = first & 0x06
        packet_id = 0
        if qos:
            if qos != 0x02 or at + 2 > read:
                raise Malformed("a PUBLISH at a QoS that was not asked for")
            packet_id = data[at] << 8 | data[at + 1]
            if not packet_id:
                raise Malformed("a PUBLISH with packet id 0")
            at += 2
        if self._is_5:
            if at < read and not data[at]:
                at += 1
            else:
                at = sum(_properties(data, at, read))
        size = end - at
        payload = data[at:end] if read == end and size <= self._payload_bytes_max else b""
        return Arrival(data[topic:topic_end], payload, size, packet_id, first & 0x08 != 0, first & 0x01 != 0)

    def _control(self, first: int, body: bytes) -> Control:
        try:
            match first:
                case 0x20:
                    return _connack(body) if self._is_5 else Connack(bool(body[0] & 1), body[1])
                case 0x90:
                    codes = body[sum(_properties(body, 2, len(body))) :] if self._is_5 else body[2:]
                    return Suback(int.from_bytes(body[:2], "big"), codes)
                case 0x40:
                    return Puback(body[0] << 8 | body[1], body[2] if len(body) > 2 else 0)
                case 0xD0:
                    return Pingresp()
                case 0xE0:
                    return Disconnect(body[0] if body else 0, dict(_read_properties(body, 1)).get(0x1F, b"").decode())
        except (IndexError, UnicodeDecodeError) as error:
            raise Malformed(f"a packet of type {first >> 4} that does not say all it should") from error
        raise Malformed(f"a packet of type {first >> 4}, which no broker sends")


def _connack(body: bytes) -> Connack:
    # A broker that has no version 5 answers with the two bytes of its own (3.1.2.2).
    found = dict(_read_properties(body, 2))
    return Connack(
        session_present=bool(body[0] & 1),
        code=body[1],
        keep_alive_s=_number(found.get(0x13)),
        shared_subscriptions=found.get(0x2A, b"\1") != b"\0",
        reason=found.get(0x1F, b"").decode(),
        receive_max=_number(found.get(0x21)),
        packet_bytes_max=_number(found.get(0x27)),
    )


def _number(value: bytes | None) -> int | None:
    return None if value is None else int.from_bytes(value, "big")


_PROPERTY_BYTES = {
    0x01: 1, 0x02: 4, 0x11: 4, 0x13: 2, 0x17: 1, 0x18: 4, 0x19: 1, 0x21: 2, 0x22: 2, 0x23: 2, 0x24: 1, 0x25: 1,
    0x27: 4, 0x28: 1, 0x29: 1, 0x2A: 1,
}  # fmt: skip
"""Of the properties of fixed size (2.2.2.2); the others are text or binary data, and 0x26 is a pair of texts."""


def _properties(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(length, begin) of the properties at `at`; Malformed where they do not fit before `end`."""
    found = _read_length(data, at)
    if found is None or sum(found) > end:
        raise Malformed("properties that do not end")
    return found


def _read_properties(body: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """Identifier and value of each property at `at`; none where the body ends before."""
    if at >= len(body):
        return
    size, at = _properties(body, at, len(body))
    end = at + size
    while at < end:
        identifier, at = body[at], at + 1
        width = _PROPERTY_BYTES.get(identifier)
        for _ in range(2 if identifier == 0x26 else 1):
            if width is None:
                length, at = int.from_bytes(body[at : at + 2], "big"), at + 2
            else:
                length = width
            if at + length > end:
                raise Malformed("a property that does not end")
            yield identifier, body[at : at + length]
            at += length


def _read_length(data: bytes, at: int) -> tuple[int, int] | None:
    """A variable byte integer (1.5.5) at `at`, and where it ends; None where the data end before. Raises Malformed."""
    value = 0
    for place in range(LENGTH_BYTES_MAX):
        if at + place >= len(data):
            return None
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise Malformed("a length of more than four bytes")
