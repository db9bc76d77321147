"""Devices' side of a broker, for many of them: each has a connection and a session of its own. MQTT 3.1.1, QoS 1.

A message that got no PUBACK is to be sent again, after a reconnect too: the same bytes, by which the bridge knows it.
Sessions are clean, so nothing of a device stays with the broker. Devices may listen, too.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from pulse.adapters.mqtt.broker import Account, address_of
from pulse.adapters.mqtt.device_link import VERSION, Link, Reply
from pulse.adapters.mqtt.packets import encode_connect
from pulse.adapters.mqtt.reasons import SYSTEM
from pulse.domain.errors import Outage
from pulse.domain.mqtt_access import prefix, user_name
from pulse.domain.simulation import Message
from pulse.domain.tally import NO_ANSWER

CONNECT_S_MAX = 10.0
CONNECTING_MAX = 64
"""Connections that are being made at the same time."""
PUBACK_S_MAX = 15.0
CONFIRMED, NOT_LET_IN = "puback", "not let in"


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What one try came to: a PUBACK, or nothing that is final."""

    name: str
    duplicate: bool = False
    """Always: a broker does not tell."""
    retry_after_s: float = 0.0
    """Always: a broker does not ask."""

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

    def __init__(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        *,
        tenant_id: str,
        listens_to: Sequence[str] = (),
        reply: Reply = lambda _topic, _payload: (),
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._tenant_id = tenant_id
        self._listens_to = listens_to
        self._reply = reply
        self._links: dict[str, Link] = {}
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
        return isinstance(link, Link)

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

    async def _connected(self, device_id: str, token: str) -> Link | Answer:
        link = self._links.get(device_id)
        if link is not None and link.is_open:
            return link
        async with self._opening.setdefault(device_id, asyncio.Lock()):
            link = self._links.get(device_id)
            if link is not None and link.is_open:
                return link
            async with self._turns:
                return await self._open(device_id, token)

    async def _open(self, device_id: str, token: str) -> Link | Answer:
        name = user_name(self._tenant_id, device_id)
        connect = encode_connect(
            version=VERSION, client_id=name, keep_alive_s=0, username=name, password=token, clean_start=True
        )
        link = Link(connect, prefix=prefix(self._tenant_id, device_id), reply=self._reply)
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                await asyncio.get_running_loop().create_connection(lambda: link, self._host, self._port, ssl=self._tls)
                code = await link.connack
                if code == 0 and self._listens_to and not await link.subscribe(self._listens_to):
                    code = None
        except OSError:
            link.abort()
            return Answer(NO_ANSWER)
        if code != 0:
            link.abort()
            return Answer(NO_ANSWER if code is None else NOT_LET_IN)
        self._links[device_id] = link
        return link


@asynccontextmanager
async def open_device_fleet(
    account: Account, *, tenant_id: str, listens_to: Sequence[str] = (), reply: Reply = lambda _topic, _payload: ()
) -> AsyncIterator[DeviceFleet]:
    """Devices at the broker of `account`, of which only the address and the certificates count.

    They listen to the kinds of `listens_to`, and say what `reply` makes of what they hear. Raises ConfigurationError
    where its URL is none.
    """
    host, port, tls = address_of(account)
    fleet = DeviceFleet(host, port, tls, tenant_id=tenant_id, listens_to=listens_to, reply=reply)
    try:
        yield fleet
    finally:
        await fleet.close()
