"""What is published to a broker: packets, the window, order, PUBACKs, and the end of a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from unittest.mock import Mock

import pytest

from pulse.adapters.mqtt import connection as connection_module
from pulse.adapters.mqtt.connection import Connection
from pulse.adapters.mqtt.outgoing import HEAD_BYTES_MAX, IN_FLIGHT_MAX, Outgoing
from pulse.adapters.mqtt.packets import Puback, Version
from pulse.adapters.mqtt.reader import Reader
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.mqtt import Arrival

TOPIC = "tenant/acme/device/t-1/commands"
GONE = Outage("mqtt", "the connection was closed")


class Wire:
    """Reads what is written as a broker would."""

    def __init__(self, version: Version) -> None:
        self._reader = Reader(version)
        self.arrived: list[Arrival] = []
        self.writes = self.bytes = 0

    def write(self, data: bytes) -> None:
        self.writes += 1
        self.bytes += len(data)
        self.arrived += self._reader.feed(data)[0]

    @property
    def payloads(self) -> list[bytes]:
        return [each.payload for each in self.arrived]


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.mark.parametrize("version", list(Version))
async def test_what_is_published_in_one_turn_is_one_write_in_its_order(version: Version) -> None:
    wire = Wire(version)
    outgoing = Outgoing(wire.write, version=version)
    futures = [outgoing.publish(TOPIC, b"%d" % number) for number in range(5)]
    assert wire.writes == 0
    await turns()
    assert (wire.writes, wire.payloads) == (1, [b"0", b"1", b"2", b"3", b"4"])
    assert {each.topic for each in wire.arrived} == {TOPIC.encode()}
    assert not any(future.done() for future in futures)
    for each in reversed(wire.arrived):
        outgoing.confirm(Puback(each.packet_id))
    assert [future.result() for future in futures] == [0] * 5
    assert outgoing.oldest_at is None


async def test_no_more_is_in_flight_than_the_broker_takes() -> None:
    wire = Wire(Version.V5)
    outgoing = Outgoing(wire.write, version=Version.V5, in_flight_max=2)
    futures = [outgoing.publish(TOPIC, b"%d" % number) for number in range(5)]
    await turns()
    assert wire.payloads == [b"0", b"1"]
    outgoing.confirm(Puback(wire.arrived[1].packet_id, code=0x10))
    await turns()
    assert wire.payloads == [b"0", b"1", b"2"]
    assert (futures[1].result(), futures[0].done()) == (0x10, False)
    for _ in range(4):
        for each in wire.arrived:
            outgoing.confirm(Puback(each.packet_id))
        await turns()
    assert wire.payloads == [b"0", b"1", b"2", b"3", b"4"]
    assert all(future.done() for future in futures)


async def test_a_broker_without_a_bound_gets_ours() -> None:
    wire = Wire(Version.V3_1_1)
    outgoing = Outgoing(wire.write, version=Version.V3_1_1)
    futures = [outgoing.publish(TOPIC, b"") for _ in range(IN_FLIGHT_MAX + 1)]
    await turns()
    assert len(wire.arrived) == IN_FLIGHT_MAX
    assert len({each.packet_id for each in wire.arrived}) == IN_FLIGHT_MAX
    outgoing.end(GONE)
    assert [type(future.exception()) for future in futures] == [Outage] * (IN_FLIGHT_MAX + 1)


async def test_a_packet_id_is_not_used_again_before_its_puback() -> None:
    wire = Wire(Version.V5)
    outgoing = Outgoing(wire.write, version=Version.V5)
    first = outgoing.publish(TOPIC, b"first")
    await turns()
    for number in range(66):
        futures = [outgoing.publish(TOPIC, b"") for _ in range(999)]
        await turns()
        assert wire.arrived[0].packet_id not in {each.packet_id for each in wire.arrived[1:]}, number
        for each in wire.arrived[1:]:
            outgoing.confirm(Puback(each.packet_id))
        del wire.arrived[1:]
        assert all(future.done() for future in futures)
    assert not first.done()


async def test_the_end_fails_what_is_in_flight_and_what_waits_and_what_comes_later() -> None:
    wire = Wire(Version.V5)
    outgoing = Outgoing(wire.write, version=Version.V5, in_flight_max=1)
    futures = [outgoing.publish(TOPIC, b"") for _ in range(2)]
    await turns()
    outgoing.end(GONE)
    assert [future.exception() for future in futures] == [GONE, GONE]
    with pytest.raises(Outage):
        outgoing.publish(TOPIC, b"")
    await turns()
    assert len(wire.arrived) == 1


async def test_a_puback_for_nothing_means_nothing() -> None:
    wire = Wire(Version.V5)
    outgoing = Outgoing(wire.write, version=Version.V5)
    future = outgoing.publish(TOPIC, b"")
    await turns()
    outgoing.confirm(Puback(wire.arrived[0].packet_id + 1))
    assert not future.done()
    future.cancel()
    outgoing.confirm(Puback(wire.arrived[0].packet_id))


async def test_what_the_broker_does_not_take_is_refused_before_it_ends_the_connection() -> None:
    wire = Wire(Version.V5)
    outgoing = Outgoing(wire.write, version=Version.V5, packet_bytes_max=200)
    fitting = 200 - HEAD_BYTES_MAX - len(TOPIC)
    with pytest.raises(Refusal) as caught:
        outgoing.publish(TOPIC, b"x" * (fitting + 1))
    assert caught.value.reason is Reason.TOO_LARGE
    outgoing.publish(TOPIC, b"x" * fitting)
    await turns()
    assert [len(payload) for payload in wire.payloads] == [fitting]
    assert wire.bytes <= 200


class Transport(Mock):
    """Where a connection writes to; keeps what is written."""

    written = b""

    def write(self, data: bytes) -> None:
        self.written += data


class Receiver:
    def opened(self, connection: Connection, *, session_present: bool) -> None:
        pass

    def received(self, arrivals: list[Arrival]) -> None:
        pass


async def opened(
    connack: bytes, *, version: Version = Version.V5, keep_alive_s: int = 0
) -> tuple[Connection, Transport]:
    """A connection to a broker that says `connack` and grants the subscription."""
    transport = Transport()
    connection = Connection(Receiver(), version=version, keep_alive_s=keep_alive_s)
    connection.connection_made(transport)
    subscribed = asyncio.create_task(connection.handshake(b"", ["a"], ["a"]))
    await turns()
    connection.data_received(connack)
    await turns()
    connection.data_received(b"\x90\x04\x00\x01\x00\x01" if version is Version.V5 else b"\x90\x03\x00\x01\x01")
    await subscribed
    transport.written = b""
    return connection, transport


def published(transport: Transport, version: Version = Version.V5) -> Sequence[Arrival]:
    return Reader(version).feed(transport.written)[0]


async def test_a_connection_keeps_to_the_brokers_receive_maximum_and_packet_size() -> None:
    connection, transport = await opened(b"\x20\x0b\x00\x00\x08\x21\x00\x03\x27\x00\x00\x01\x00")
    futures = [connection.publish(TOPIC, b"%d" % number) for number in range(5)]
    with pytest.raises(Refusal):
        connection.publish(TOPIC, b"x" * 256)
    await turns()
    assert [each.payload for each in published(transport)] == [b"0", b"1", b"2"]
    connection.data_received(b"\x40\x02\x00\x01" + b"\x40\x03\x00\x02\x10" + b"\x40\x04\x00\x03\x87\x00")
    assert [future.result() for future in futures[:3]] == [0, 0x10, 0x87]
    connection.connection_lost(None)
    assert [type(future.exception()) for future in futures[3:]] == [Outage, Outage]


async def test_a_connection_of_3_1_1_publishes_and_is_confirmed() -> None:
    connection, transport = await opened(b"\x20\x02\x01\x00", version=Version.V3_1_1)
    future = connection.publish(TOPIC, b"x")
    await turns()
    [arrival] = published(transport, Version.V3_1_1)
    assert (arrival.payload, arrival.packet_id) == (b"x", 1)
    connection.data_received(b"\x40\x02\x00\x01")
    assert future.result() == 0


async def test_a_puback_that_says_too_little_ends_the_connection() -> None:
    connection, _ = await opened(b"\x20\x03\x00\x00\x00")
    future = connection.publish(TOPIC, b"x")
    await turns()
    connection.data_received(b"\x40\x01\x00")
    assert isinstance(future.exception(), Outage)


async def test_a_broker_that_confirms_nothing_loses_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "PUBACK_S_MAX", 0.0)
    monkeypatch.setattr(connection_module, "LOOK_S", 0.0)
    connection, transport = await opened(b"\x20\x03\x00\x00\x00")
    future = connection.publish(TOPIC, b"x")
    why = await connection.ended()
    assert "has not confirmed" in str(why)
    assert future.exception() is why
    transport.abort.assert_called_once()


async def test_while_it_reads_nothing_a_connection_does_not_wait_for_a_puback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "PUBACK_S_MAX", 0.0)
    monkeypatch.setattr(connection_module, "LOOK_S", 0.0)
    connection, _ = await opened(b"\x20\x03\x00\x00\x00")
    connection.pause()
    future = connection.publish(TOPIC, b"x")
    ending = asyncio.create_task(connection.ended())
    for _ in range(50):
        await asyncio.sleep(0)
    assert not ending.done()
    connection.resume()
    await ending
    assert isinstance(future.exception(), Outage)


async def test_the_time_in_which_it_read_nothing_does_not_count_as_unconfirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    connection, _ = await opened(b"\x20\x03\x00\x00\x00")
    future = connection.publish(TOPIC, b"x")
    await turns()
    sent_at = asyncio.get_running_loop().time()
    clock = Mock(time=lambda: sent_at + 100)
    monkeypatch.setattr(connection, "_loop", clock)
    assert connection._unconfirmed_s() >= 100
    connection.pause()
    connection.resume()
    assert connection._unconfirmed_s() == 0
    clock.time = lambda: sent_at + 130
    assert connection._unconfirmed_s() == pytest.approx(30)
    connection.data_received(b"\x40\x02\x00\x01")
    assert future.result() == connection._unconfirmed_s() == 0
