"""One device's connection to a broker: what it sends and who waits for that, and what it says to what it hears."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

from pulse.adapters.mqtt.packets import (
    DISCONNECT,
    PACKET_ID_MAX,
    Connack,
    Malformed,
    Puback,
    Suback,
    Version,
    encode_pubacks,
    encode_publish,
    encode_subscribe,
)
from pulse.adapters.mqtt.reader import Reader
from pulse.domain.mqtt import Arrival

VERSION = Version.V3_1_1
IN_FLIGHT_MAX = 1000
"""Messages of one device that wait for their PUBACK; one more is not sent."""
SUBSCRIBE_ID = 1
REFUSED_FROM = 128

Reply = Callable[[str, bytes], Sequence[tuple[str, bytes]]]
"""What a device says to a topic and payload that it hears, as topics (below its prefix) and payloads; once."""


class Link(asyncio.Protocol):
    """One connection of one device, and what waits on it."""

    def __init__(self, connect: bytes, *, prefix: str, reply: Reply) -> None:
        self._connect = connect
        self._prefix = prefix
        self._reply = reply
        self._reader = Reader(VERSION)
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._packet_id = 0
        self.connack: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """The broker's code; None where the connection ended without one."""
        self._suback: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.is_open = False

    async def publish(self, topic: str, payload: bytes) -> bool:
        """Whether a PUBACK came; False where the connection ended before, or too many wait."""
        waiter = self._send(topic, payload)
        return waiter is not None and await waiter

    async def subscribe(self, kinds: Sequence[str]) -> bool:
        """Whether the broker grants them all."""
        assert self._transport is not None
        filters = [self._prefix + kind for kind in kinds]
        self._transport.write(encode_subscribe(SUBSCRIBE_ID, filters, version=VERSION))
        return await self._suback

    def _send(self, topic: str, payload: bytes) -> asyncio.Future[bool] | None:
        """Whether a PUBACK comes; None where nothing was sent."""
        if self._transport is None or not self.is_open or len(self._waiting) >= IN_FLIGHT_MAX:
            return None
        packet_id = self._next_packet_id()
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiter.add_done_callback(lambda _: self._waiting.pop(packet_id, None))
        self._waiting[packet_id] = waiter
        self._transport.write(encode_publish(topic, payload, packet_id=packet_id, version=VERSION))
        return waiter

    def close(self) -> None:
        """End it in order."""
        if self._transport is not None and self.is_open:
            self._transport.write(DISCONNECT)
            self._transport.close()

    def abort(self) -> None:
        """End it at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's: the socket is connected."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._connect)

    def data_received(self, data: bytes) -> None:
        """asyncio's: `data` was read."""
        try:
            arrivals, controls = self._reader.feed(data)
        except Malformed:
            self.abort()
            return
        for control in controls:
            if isinstance(control, Puback):
                waiter = self._waiting.get(control.packet_id)
                if waiter is not None and not waiter.done():
                    waiter.set_result(True)
            elif isinstance(control, Connack) and not self.connack.done():
                self.is_open = control.code == 0
                self.connack.set_result(control.code)
            elif isinstance(control, Suback) and not self._suback.done():
                self._suback.set_result(max(control.codes) < REFUSED_FROM)
        self._hear(arrivals)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's: it is over."""
        self.is_open = False
        if not self.connack.done():
            self.connack.set_result(None)
        if not self._suback.done():
            self._suback.set_result(False)
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_result(False)

    def _hear(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            for kind, payload in self._reply(arrival.topic.decode().removeprefix(self._prefix), arrival.payload):
                self._send(self._prefix + kind, payload)
        if self._transport is not None and (packet_ids := [each.packet_id for each in arrivals if each.packet_id]):
            self._transport.write(encode_pubacks(packet_ids))

    def _next_packet_id(self) -> int:
        while True:
            self._packet_id = self._packet_id % PACKET_ID_MAX + 1
            if self._packet_id not in self._waiting:
                return self._packet_id
