"""MQTT on the wire: what is read back, wherever it is cut, and that no bytes do worse than Malformed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.adapters.mqtt.packets import (
    Connack,
    Control,
    Disconnect,
    Malformed,
    Pingresp,
    Puback,
    Suback,
    Version,
    encode_connect,
    encode_pubacks,
    encode_publish,
    encode_subscribe,
)
from pulse.adapters.mqtt.reader import HEAD_BYTES_MAX, Reader
from pulse.domain.mqtt import Arrival

VERSIONS = list(Version)
KEPT = 64


def read(version: Version, data: bytes, cuts: list[int], *, kept: int = KEPT) -> tuple[list[Arrival], list[Control]]:
    reader = Reader(version, payload_bytes_max=kept)
    arrivals: list[Arrival] = []
    controls: list[Control] = []
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for begin, end in itertools.pairwise(places):
        some, others = reader.feed(data[begin:end])
        arrivals += some
        controls += others
    return arrivals, controls


MESSAGES = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable()),
        st.binary(max_size=200),
        st.integers(0, 65_535),
        st.booleans(),
        st.booleans(),
    ),
    max_size=8,
)


@given(st.sampled_from(VERSIONS), MESSAGES, st.lists(st.integers(0, 5000), max_size=12))
def test_messages_are_read_back_wherever_the_stream_is_cut(
    version: Version, messages: list[tuple[str, bytes, int, bool, bool]], cuts: list[int]
) -> None:
    wire = b"\xd0\x00".join(
        encode_publish(topic, payload, packet_id=number, version=version, repeated=repeated, retain=retain)
        for topic, payload, number, repeated, retain in messages
    )
    arrivals, controls = read(version, wire, cuts)
    assert len(arrivals) == len(messages)
    assert controls == [Pingresp()] * max(0, len(messages) - 1)
    for arrival, (topic, payload, number, repeated, retain) in zip(arrivals, messages, strict=True):
        assert arrival.topic == topic.encode()
        assert arrival.size == len(payload)
        assert arrival.payload == (payload if arrival.is_whole else b"")
        assert arrival.is_whole == (arrival.payload == payload)
        assert arrival.is_whole or len(payload) + len(topic.encode()) + 5 > KEPT
        assert (arrival.packet_id, arrival.repeated, arrival.retained) == (number, repeated, retain)


def test_a_payload_that_is_too_large_is_passed_over_and_never_held() -> None:
    reader = Reader(Version.V5)
    wire = encode_publish("t", bytes(50_000_000), packet_id=7, version=Version.V5)
    for at in range(0, len(wire), 65_536):
        assert len(reader._rest) <= HEAD_BYTES_MAX + 65_536
        arrivals, _ = reader.feed(wire[at : at + 65_536])
        assert bool(arrivals) == (at + 65_536 >= len(wire)), "it has come when its last byte has"
    (arrival,) = arrivals
    assert (arrival.size, arrival.payload, arrival.packet_id, arrival.is_whole) == (50_000_000, b"", 7, False)
    assert reader.feed(b"\xd0\x00") == ([], [Pingresp()])


def test_properties_of_a_message_are_skipped() -> None:
    properties = b"\x01\x01" + b"\x26\x00\x01a\x00\x01b" * 30
    body = (
        b"\x00\x01t" + b"\x00\x05" + bytes((0x80 | (len(properties) & 0x7F), len(properties) >> 7)) + properties + b"{}"
    )
    wire = b"\x32" + bytes((0x80 | (len(body) & 0x7F), len(body) >> 7)) + body
    (arrival,), _ = read(Version.V5, wire, [], kept=1000)
    assert arrival == Arrival(b"t", b"{}", 2, 5)


@pytest.mark.parametrize(
    ("version", "wire", "packet"),
    [
        (Version.V3_1_1, b"\x20\x02\x01\x00", Connack(True, 0)),
        (Version.V3_1_1, b"\x20\x02\x00\x05", Connack(False, 5)),
        (Version.V5, b"\x20\x02\x00\x01", Connack(False, 1)),
        (Version.V5, b"\x20\x03\x01\x00\x00", Connack(True, 0)),
        (
            Version.V5,
            b"\x20\x13\x00\x00\x10\x13\x00\x0a\x24\x01\x2a\x00\x26\x00\x01a\x00\x01b\x1f\x00\x00",
            Connack(False, 0, keep_alive_s=10, shared_subscriptions=False),
        ),
        (Version.V5, b"\x20\x09\x00\x87\x06\x1f\x00\x03bad", Connack(False, 0x87, reason="bad")),
        (Version.V3_1_1, b"\x90\x04\x00\x01\x01\x80", Suback(1, b"\x01\x80")),
        (Version.V5, b"\x90\x05\x00\x01\x00\x01\x8f", Suback(1, b"\x01\x8f")),
        (Version.V3_1_1, b"\x40\x02\x01\x02", Puback(0x102)),
        (Version.V5, b"\x40\x03\x01\x02\x10", Puback(0x102, 0x10)),
        (Version.V5, b"\xe0\x00", Disconnect()),
        (Version.V5, b"\xe0\x01\x8e", Disconnect(0x8E)),
        (Version.V5, b"\xe0\x07\x8e\x05\x1f\x00\x02no", Disconnect(0x8E, "no")),
        (Version.V3_1_1, b"\xd0\x00", Pingresp()),
    ],
)
def test_answers_of_a_broker_are_read(version: Version, wire: bytes, packet: Control) -> None:
    if wire[0] == 0x20 and wire[1] == 0x13:
        wire = wire[:1] + bytes((len(wire) - 2,)) + wire[2:4] + bytes((len(wire) - 5,)) + wire[5:]
    assert read(version, wire, []) == ([], [packet])


@pytest.mark.parametrize(
    "wire",
    [
        b"\x32\x00",
        b"\x32\x01\x00",
        b"\x32\x02\x00\x05",
        b"\x32\x03\x00\x01t",
        b"\x32\x05\x00\x01t\x00\x00",
        b"\x34\x06\x00\x01t\x00\x01\x00",
        b"\x32\x06\x00\x01t\x00\x01\x7f",
        b"\xf0\x00",
        b"\x00\x00",
        b"\x30\xff\xff\xff\xff\x01",
        b"\x20\x01\x00",
        b"\xd0\xff\xff\xff\x7f",
    ],
)
def test_what_is_no_mqtt_is_malformed(wire: bytes) -> None:
    with pytest.raises(Malformed):
        read(Version.V5, wire, [])


@given(st.sampled_from(VERSIONS), st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_no_bytes_do_worse_than_malformed(version: Version, data: bytes, cuts: list[int]) -> None:
    try:
        found = read(version, data, cuts)
    except Malformed:
        with pytest.raises(Malformed):
            read(version, data, [])
    else:
        assert found == read(version, data, [])


def test_pubacks_are_one_write() -> None:
    assert encode_pubacks([1, 258]) == b"\x40\x02\x00\x01\x40\x02\x01\x02"


def test_a_session_is_asked_for_and_never_thrown_away() -> None:
    told = encode_connect(
        version=Version.V5,
        client_id="c",
        keep_alive_s=30,
        username="u",
        password="p",
        session_expiry_s=60,
        receive_max=9,
    )
    assert told == (
        b"\x10\x1c\x00\x04MQTT\x05\xc0\x00\x1e\x08\x11\x00\x00\x00\x3c\x21\x00\x09\x00\x01c\x00\x01u\x00\x01p"
    )
    assert encode_connect(version=Version.V3_1_1, client_id="c", keep_alive_s=30) == (
        b"\x10\x0d\x00\x04MQTT\x04\x00\x00\x1e\x00\x01c"
    )


def test_subscriptions_are_at_qos_1_and_ask_for_nothing_retained() -> None:
    assert encode_subscribe(1, ["a/+"], version=Version.V5) == b"\x82\x09\x00\x01\x00\x00\x03a/+\x21"
    assert encode_subscribe(1, ["a/+"], version=Version.V3_1_1) == b"\x82\x08\x00\x01\x00\x03a/+\x01"
