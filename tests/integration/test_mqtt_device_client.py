"""The devices' side of MQTT, against a broker that misbehaves as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from pulse.adapters.mqtt import device
from pulse.adapters.mqtt.broker import Account
from pulse.adapters.mqtt.device import CONFIRMED, NOT_LET_IN, Answer, DeviceFleet, open_device_fleet
from pulse.cli import simulate_delivery
from pulse.cli.simulate_delivery import deliver as deliver_until_final
from pulse.domain.errors import ConfigurationError, Outage
from pulse.domain.simulation import COMMANDS, DELTA, Message, reply
from pulse.domain.tally import NO_ANSWER
from pulse.runtime.settings import Settings

MESSAGE = Message("t-1", "token", "telemetry", b'{"metrics":{"t":1}}', "key-1")
ACCEPTED, REFUSED = b"\x20\x02\x00\x00", b"\x20\x02\x00\x05"
PUBLISH = 0x32


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_delivery, "RETRY_DELAY_S_MIN", 0.001)
    monkeypatch.setattr(simulate_delivery, "RETRY_DELAY_S_MAX", 0.001)


def account(port: int) -> Account:
    made = msgspec.convert(Settings(), Account, from_attributes=True)
    return msgspec.structs.replace(made, mqtt_url=f"mqtt://127.0.0.1:{port}")


class Broker:
    """Takes packets apart as far as it must; `packets` is all that it was sent, `answer` what it does with each."""

    def __init__(self, answer: Callable[[int, bytes, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self.packets: list[tuple[int, bytes]] = []
        self.connections = 0
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                first, length = await reader.readexactly(2)
                body = await reader.readexactly(length)
                self.packets.append((first, body))
                await self._answer(len(self.packets), bytes([first]) + body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    @property
    def published(self) -> list[bytes]:
        return [body[2 + int.from_bytes(body[:2], "big") + 2 :] for first, body in self.packets if first == PUBLISH]


@asynccontextmanager
async def broker(
    answer: Callable[[int, bytes, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[tuple[DeviceFleet, Broker]]:
    made = Broker(answer)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    async with server, open_device_fleet(account(server.sockets[0].getsockname()[1]), tenant_id="acme") as fleet:
        yield fleet, made


def puback(packet: bytes) -> bytes:
    at = 3 + int.from_bytes(packet[1:3], "big")
    return b"\x40\x02" + packet[at : at + 2]


async def well(_: int, packet: bytes, writer: asyncio.StreamWriter) -> None:
    if packet[0] == 0x10:
        writer.write(ACCEPTED)
    elif packet[0] == PUBLISH:
        writer.write(puback(packet))


async def deliver(fleet: DeviceFleet) -> tuple[Answer, list[str]]:
    told: list[str] = []
    async with asyncio.timeout(30):
        answer = await deliver_until_final(fleet.send, MESSAGE, told=lambda each: told.append(each.name))
    return answer, told


async def test_a_device_says_who_it_is_and_what_it_has_to_say() -> None:
    async with broker(well) as (fleet, made):
        assert (await deliver(fleet))[1] == [CONFIRMED]
        assert (await deliver(fleet))[1] == [CONFIRMED]
    connect, publish, *_ = made.packets
    assert connect[1].endswith(b"\x00\x08acme/t-1\x00\x08acme/t-1\x00\x05token")
    assert b"tenant/acme/device/t-1/telemetry" in publish[1]
    assert made.published == [MESSAGE.body] * 2
    assert made.connections == 1


async def test_each_device_has_a_connection_of_its_own() -> None:
    async with broker(well) as (fleet, made):
        assert all(await asyncio.gather(*(fleet.let_in(f"t-{number}", "token") for number in range(20))))
        assert all(await asyncio.gather(*(fleet.let_in(f"t-{number}", "token") for number in range(20))))
        assert made.connections == 20


async def test_many_messages_of_one_device_are_under_way_together_and_each_gets_its_own_answer() -> None:
    held: list[bytes] = []

    async def in_reverse(_: int, packet: bytes, writer: asyncio.StreamWriter) -> None:
        if packet[0] != PUBLISH:
            return await well(_, packet, writer)
        held.append(puback(packet))
        if len(held) == 50:
            writer.write(b"".join(reversed(held)))
        return None

    async with broker(in_reverse) as (fleet, made):
        answers = await asyncio.gather(*(deliver(fleet) for _ in range(50)))
    assert {told for _, [told] in answers} == {CONFIRMED}
    assert len(set(held)) == 50
    assert made.connections == 1


async def test_what_was_not_confirmed_is_sent_again_over_a_new_connection() -> None:
    async def hang_up_twice(count: int, packet: bytes, writer: asyncio.StreamWriter) -> None:
        if packet[0] == PUBLISH and count <= 4:
            writer.close()
        else:
            await well(count, packet, writer)

    async with broker(hang_up_twice) as (fleet, made):
        answer, told = await deliver(fleet)
    assert answer.accepted
    assert told == [NO_ANSWER, NO_ANSWER, CONFIRMED]
    assert made.published == [MESSAGE.body] * 3
    assert made.connections == 3


async def test_a_device_that_is_not_let_in_tries_again() -> None:
    async def later(count: int, packet: bytes, writer: asyncio.StreamWriter) -> None:
        if count == 1:
            writer.write(REFUSED)
        else:
            await well(count, packet, writer)

    async with broker(later) as (fleet, _):
        assert (await deliver(fleet))[1] == [NOT_LET_IN, CONFIRMED]


async def test_a_broker_that_talks_rubbish_is_left() -> None:
    async def rubbish(count: int, packet: bytes, writer: asyncio.StreamWriter) -> None:
        if count <= 2 and packet[0] == PUBLISH:
            writer.write(b"\xff" * 8)
        else:
            await well(count, packet, writer)

    async with broker(rubbish) as (fleet, made):
        assert (await deliver(fleet))[1] == [NO_ANSWER, CONFIRMED]
    assert made.connections == 2


async def test_a_broker_that_says_nothing_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PUBACK_S_MAX", 0.05)
    monkeypatch.setattr(simulate_delivery, "RETRY_S_MAX", 0.2)

    async def silent(count: int, packet: bytes, writer: asyncio.StreamWriter) -> None:
        if packet[0] == 0x10:
            writer.write(ACCEPTED)

    async with broker(silent) as (fleet, _):
        answer, told = await deliver(fleet)
    assert not answer.accepted
    assert set(told) == {NO_ANSWER}


async def test_whoever_is_stopped_does_not_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_delivery, "RETRY_DELAY_S_MIN", 10.0)
    monkeypatch.setattr(simulate_delivery, "RETRY_DELAY_S_MAX", 10.0)

    async def refuse(_: int, __: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(REFUSED)

    async with broker(refuse) as (fleet, _):
        told: list[str] = []
        answer = await deliver_until_final(
            fleet.send, MESSAGE, told=lambda each: told.append(each.name), stopped=lambda: True
        )
    assert (answer.name, told) == (NOT_LET_IN, [NOT_LET_IN])


async def test_a_broker_that_is_not_there_is_an_outage(free_port: int) -> None:
    async with open_device_fleet(account(free_port), tenant_id="acme") as fleet:
        with pytest.raises(Outage, match=f"no broker answers at 127.0.0.1:{free_port}"):
            await fleet.check()


async def test_what_is_no_url_of_a_broker_is_refused() -> None:
    wrong = msgspec.structs.replace(account(1), mqtt_url="http://127.0.0.1")
    with pytest.raises(ConfigurationError, match="mqtt_url"):
        async with open_device_fleet(wrong, tenant_id="acme"):
            pass


async def test_devices_that_listen_do_as_they_are_told_and_confirm_it() -> None:
    own = b"tenant/acme/device/t-1/"
    heard = [(b"commands", b'{"commandId":"c-1","name":"blink","payload":{}}'),
             (b"shadow/update/delta", b'{"state":{"on":true},"version":3}')]  # fmt: skip
    confirmed = asyncio.Event()

    async def speak(_: int, packet: bytes, writer: asyncio.StreamWriter) -> None:
        await well(_, packet, writer)
        if packet[0] == 0x82:
            writer.write(b"\x90\x04" + packet[1:3] + b"\x01\x01")
            for packet_id, (kind, body) in enumerate(heard, 7):
                rest = (len(own + kind)).to_bytes(2, "big") + own + kind + packet_id.to_bytes(2, "big") + body
                writer.write(b"\x32" + bytes([len(rest)]) + rest)
        elif packet == b"\x40\x00\x08":
            confirmed.set()

    made = Broker(speak)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with (
        server,
        asyncio.timeout(30),
        open_device_fleet(account(port), tenant_id="acme", listens_to=(COMMANDS, DELTA), reply=reply) as fleet,
    ):
        assert await fleet.let_in("t-1", "token")
        await confirmed.wait()
        assert (await fleet.send(MESSAGE)).accepted
    (subscribed,) = [body for first, body in made.packets if first == 0x82]
    assert own + b"commands" in subscribed
    assert [msgspec.json.decode(body) for body in made.published] == [
        {"commandId": "c-1", "state": "acknowledged"},
        {"commandId": "c-1", "state": "succeeded"},
        {"state": {"reported": {"on": True}}},
        {"metrics": {"t": 1}},
    ]


async def test_a_device_that_may_not_listen_is_not_let_in() -> None:
    async def refuse(_: int, packet: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED if packet[0] == 0x10 else b"\x90\x03" + packet[1:3] + b"\x80")

    server = await asyncio.start_server(Broker(refuse).serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with (
        server,
        asyncio.timeout(30),
        open_device_fleet(account(port), tenant_id="acme", listens_to=(DELTA,)) as it,
    ):
        assert not await it.let_in("t-1", "token")
