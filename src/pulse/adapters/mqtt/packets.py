"""MQTT control packets of a client that receives and sends at QoS 0 and 1, with 3.1.1 and 5: what is written as bytes.

What is read becomes the structures here, in `reader.py`. No I/O in either.
Sources: MQTT 3.1.1 and MQTT 5.0, OASIS Standards; section numbers are those of 5.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import msgspec

PACKET_ID_MAX = 65_535
TEXT_BYTES_MAX = 65_535

PINGREQ = b"\xc0\x00"
DISCONNECT = b"\xe0\x00"
"""Normal disconnection (3.14.2.1): the session and its messages stay with the broker."""


class Version(IntEnum):
    """The protocol level of a CONNECT."""

    V3_1_1 = 4
    V5 = 5


class Malformed(Exception):
    """What was read is no MQTT, or nothing that this client has asked for."""


class Connack(msgspec.Struct, frozen=True):
    """The answer to a CONNECT; a `code` of 0 is yes. The rest is as the broker says with 5, else the default."""

    session_present: bool
    code: int
    keep_alive_s: int | None = None
    shared_subscriptions: bool = True
    reason: str = ""
    receive_max: int | None = None
    packet_bytes_max: int | None = None


class Suback(msgspec.Struct, frozen=True):
    """The answer to a SUBSCRIBE: the QoS of each filter, or from 128 on why not."""

    packet_id: int
    codes: bytes


class Puback(msgspec.Struct, frozen=True):
    """The answer to a PUBLISH of ours; from 128 on a `code` says why it was refused (5 alone)."""

    packet_id: int
    code: int = 0


class Pingresp(msgspec.Struct, frozen=True):
    """The answer to a PINGREQ."""


class Disconnect(msgspec.Struct, frozen=True):
    """The broker ends the connection, and says why (5 alone)."""

    code: int = 0
    reason: str = ""


Control = Connack | Suback | Puback | Pingresp | Disconnect


def encode_connect(
    *,
    version: Version,
    client_id: str,
    keep_alive_s: int,
    username: str = "",
    password: str = "",
    clean_start: bool = False,
    session_expiry_s: int = 0,
    receive_max: int = PACKET_ID_MAX,
) -> bytes:
    """CONNECT; the last two are of 5 alone (with 3.1.1 a session that is not clean has no end)."""
    flags = (0x02 if clean_start else 0) | (0x80 if username else 0) | (0x40 if password else 0)
    head = [_text("MQTT"), bytes((version, flags)), keep_alive_s.to_bytes(2, "big")]
    if version is Version.V5:
        properties = b"\x11" + session_expiry_s.to_bytes(4, "big") + b"\x21" + receive_max.to_bytes(2, "big")
        head.append(_length(len(properties)) + properties)
    head.append(_text(client_id))
    head += [_text(each) for each in (username, password) if each]
    return _packet(0x10, b"".join(head))


def encode_subscribe(packet_id: int, filters: Sequence[str], *, version: Version) -> bytes:
    """SUBSCRIBE at QoS 1; with 5 what is retained is not sent (3.8.3.1), as it is not new."""
    is_5 = version is Version.V5
    options = b"\x21" if is_5 else b"\x01"
    parts = [packet_id.to_bytes(2, "big"), b"\x00" if is_5 else b"", *(_text(each) + options for each in filters)]
    return _packet(0x82, b"".join(parts))


def encode_publish(
    topic: str, payload: bytes, *, packet_id: int, version: Version, repeated: bool = False, retain: bool = False
) -> bytes:
    """PUBLISH at QoS 1, at QoS 0 where `packet_id` is 0."""
    first = 0x30 | (0x02 if packet_id else 0) | (0x08 if repeated else 0) | retain
    named = packet_id.to_bytes(2, "big") if packet_id else b""
    return _packet(first, _text(topic) + named + (b"\x00" if version is Version.V5 else b"") + payload)


def encode_pubacks(packet_ids: Sequence[int]) -> bytes:
    """A PUBACK for each, with success, which is the same in both versions (3.4.2.1)."""
    return b"".join([b"@\x02" + packet_id.to_bytes(2, "big") for packet_id in packet_ids])


def _length(value: int) -> bytes:
    encoded = bytearray()
    while True:
        value, digit = value >> 7, value & 0x7F
        encoded.append(digit | 0x80 if value else digit)
        if not value:
            return bytes(encoded)


def _text(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > TEXT_BYTES_MAX:
        raise ValueError(f"MQTT carries no text of {len(encoded)} bytes")
    return len(encoded).to_bytes(2, "big") + encoded


def _packet(first: int, body: bytes) -> bytes:
    return bytes((first,)) + _length(len(body)) + body
