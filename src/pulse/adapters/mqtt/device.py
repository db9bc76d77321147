"""Devices' side of a broker, for many of them: each has a connection and a session of its own. MQTT 3.1.1, QoS 1.

A message that got no PUBACK is sent again, after a reconnect too, for RETRY_S_MAX at most: the same bytes, by which the
bridge knows it. Sessions are clean, so nothing of a device stays with the broker.
"""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import msgspec

from pulse.adapters.mqtt.broker import Account, address_of
from pulse.adapters.mqtt.packets import (
    DISCONNECT,
    PACKET_ID_MAX,
    Connack,
    Malformed,
    Puback,
    Version,
    encode_connect,
    encode_publish,
)
from pulse.adapters.mqtt.reader import Reader
from pulse.adapters.mqtt.reasons import SYSTEM
from pulse.domain.errors import Outage
from pulse.domain.mqtt_access import prefix, user_name
from pulse.domain.retry import delay_s
from pulse.domain.simulation import Message
from pulse.domain.tally import NO_ANSWER

VERSION = Version.V3_1_1
CONNECT_S_MAX = 10.0
CONNECTING_MAX = 64
"""Connections that are being made at the same time."""
PUBACK_S_MAX = 15.0
IN_FLIGHT_MAX = 1000
"""Messages of one device that wait for their PUBACK; one more is not sent."""
RETRY_S_MAX = 60.0
"""Half of the window in which a retry is recognised."""
RETRY_DELAY_S_MIN = 0.1
RETRY_DELAY_S_MAX = 5.0
STOP_LOOK_S = 0.2
CONFIRMED, NOT_LET_IN = "puback", "not let in"


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What one try came to: a PUBACK, or nothing that is final."""

    name: str
    duplicate: bool = False
    """Always: a broker does not tell."""

    @property
    def accepted(self) -> bool:
        """Whether the broker has taken the message over."""
        return self.name == CONFIRMED

    @property
    def final(self) -> bool:
        """Whether trying again would change nothing."""
        return self.accepted


class DeviceFleet:
    """Sends for all devices of one tenant; made by `open_device_fleet`."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, *, tenant_id: str) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._tenant_id = tenant_id
        self._links: dict[str, _Link] = {}
        self._opening: dict[str, asyncio.Lock] = {}
        self._turns = asyncio.Semaphore(CONNECTING_MAX)

    async def check(self) -> None:
        """Raise Outage where nobody listens."""
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                _, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else type(error).__name__
            raise Outage(
                SYSTEM,
                f"no broker answers at {self._host}:{self._port} ({why})",
                hint="is it running? `pulse up` starts one",
            ) from error
        writer.close()

    async def let_in(self, device_id: str, token: str) -> bool:
        """Connect a device that is not; whether the broker lets it in, now."""
        link = await self._connected(device_id, token)
        return isinstance(link, _Link)

    async def deliver(
        self, message: Message, *, told: Callable[[Answer], None], stopped: Callable[[], bool] = lambda: False
    ) -> Answer:
        """The last answer: a PUBACK, or what there was when time was up or `stopped` said so; `told` hears of all."""
        give_up_at = time.monotonic() + RETRY_S_MAX
        attempt = 0
        while True:
            attempt += 1
            answer = await self.send(message)
            told(answer)
            if answer.final:
                return answer
            again_at = time.monotonic() + delay_s(
                attempt,
                minimum_s=RETRY_DELAY_S_MIN,
                maximum_s=RETRY_DELAY_S_MAX,
                random=random.random(),  # noqa: S311
            )
            if again_at > give_up_at:
                return answer
            while (left_s := again_at - time.monotonic()) > 0:
                if stopped():
                    return answer
                await asyncio.sleep(min(left_s, STOP_LOOK_S))

    async def send(self, message: Message) -> Answer:
        """One try."""
        link = await self._connected(message.device_id, message.token)
        if isinstance(link, Answer):
            return link
        topic = prefix(self._tenant_id, message.device_id) + message.kind
        try:
            async with asyncio.timeout(PUBACK_S_MAX):
                return Answer(CONFIRMED if await link.publish(topic, message.body) else NO_ANSWER)
        except TimeoutError:
            link.abort()
            return Answer(NO_ANSWER)

    async def close(self) -> None:
        """Say goodbye for all devices."""
        for link in self._links.values():
            link.close()
        await asyncio.sleep(0)

    async def _connected(self, device_id: str, token: str) -> _Link | Answer:
        link = self._links.get(device_id)
        if link is not None and link.is_open:
            return link
        async with self._opening.setdefault(device_id, asyncio.Lock()):
            link = self._links.get(device_id)
            if link is not None and link.is_open:
                return link
            async with self._turns:
                return await self._open(device_id, token)

    async def _open(self, device_id: str, token: str) -> _Link | Answer:
        name = user_name(self._tenant_id, device_id)
        connect = encode_connect(
            version=VERSION, client_id=name, keep_alive_s=0, username=name, password=token, clean_start=True
        )
        link = _Link(connect)
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                await asyncio.get_running_loop().create_connection(lambda: link, self._host, self._port, ssl=self._tls)
                code = await link.connack
        except OSError:
            link.abort()
            return Answer(NO_ANSWER)
        if code != 0:
            link.abort()
            return Answer(NO_ANSWER if code is None else NOT_LET_IN)
        self._links[device_id] = link
        return link


class _Link(asyncio.Protocol):
    """One connection of one device, and what waits on it."""

    def __init__(self, connect: bytes) -> None:
        self._connect = connect
        self._reader = Reader(VERSION)
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._packet_id = 0
        self.connack: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """The broker's code; None where the connection ended without one."""
        self.is_open = False

    async def publish(self, topic: str, payload: bytes) -> bool:
        """Whether a PUBACK came; False where the connection ended before, or too many wait."""
        if self._transport is None or not self.is_open or len(self._waiting) >= IN_FLIGHT_MAX:
            return False
        packet_id = self._next_packet_id()
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[packet_id] = waiter
        self._transport.write(encode_publish(topic, payload, packet_id=packet_id, version=VERSION))
        try:
            return await waiter
        finally:
            self._waiting.pop(packet_id, None)

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
            _, controls = self._reader.feed(data)
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

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's: it is over."""
        self.is_open = False
        if not self.connack.done():
            self.connack.set_result(None)
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_result(False)

    def _next_packet_id(self) -> int:
        while True:
            self._packet_id = self._packet_id % PACKET_ID_MAX + 1
            if self._packet_id not in self._waiting:
                return self._packet_id


@asynccontextmanager
async def open_device_fleet(account: Account, *, tenant_id: str) -> AsyncIterator[DeviceFleet]:
    """Devices at the broker of `account`, of which only the address and the certificates count.

    Raises ConfigurationError where its URL is none.
    """
    host, port, tls = address_of(account)
    fleet = DeviceFleet(host, port, tls, tenant_id=tenant_id)
    try:
        yield fleet
    finally:
        await fleet.close()
