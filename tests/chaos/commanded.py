"""Devices that are told what to do, over MQTT and over HTTP, and keep a book of what they have heard.

Each answers as its manner has it. What it said, it says again until it is confirmed; what it hears again, it answers
again with the same words. So does a well made device.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import aiohttp
import msgspec

from chaos.load import TENANT
from pulse.adapters.mqtt.packets import (
    Connack,
    Puback,
    Suback,
    Version,
    encode_connect,
    encode_pubacks,
    encode_publish,
    encode_subscribe,
)
from pulse.adapters.mqtt.reader import Reader

VERSION = Version.V3_1_1
RETRY_S = 0.1
REQUEST_S_MAX = 15.0
ENDS = ("succeeded", "failed", "rejected")


class Manner(Enum):
    """What a device does with a command."""

    OBEYS = "obeys"
    NEVER_ENDS = "acknowledges, and nothing more"
    NEVER_ANSWERS = "says nothing"


@dataclass(kw_only=True)
class Device:
    """One device; `heard` is how often it has been told of each command."""

    device_id: str
    manner: Manner = Manner.OBEYS
    heard: dict[str, int] = field(default_factory=dict)
    strange: list[object] = field(default_factory=list)

    def hear(self, told: dict[str, Any]) -> list[bytes]:
        """The answers to what it is told."""
        if set(told) != {"commandId", "name", "payload", "issuedAt", "expiresAt"} or told["payload"] != self.device_id:
            self.strange.append(told)
        command_id = told["commandId"]
        self.heard[command_id] = self.heard.get(command_id, 0) + 1
        if self.manner is Manner.NEVER_ANSWERS:
            return []
        states = ["acknowledged"] + ([end_of(command_id)] if self.manner is Manner.OBEYS else [])
        return [msgspec.json.encode({"commandId": command_id, "state": state}) for state in states]


def end_of(command_id: str) -> str:
    """What an obedient device makes of this command."""
    return ENDS[int(command_id[-2:], 16) % len(ENDS)]


class OverMqtt:
    """A device with a session that outlives its connections; those it makes anew as often as they break."""

    def __init__(self, device: Device, *, port: int, username: str, password: str) -> None:
        self.device = device
        self._port = port
        self._account = (username, password)
        self._unconfirmed: dict[int, bytes] = {}
        self._packet_ids: Iterator[int] = iter(range(2, 60_000))
        self.subscribed = asyncio.Event()

    @property
    def _prefix(self) -> str:
        return f"tenant/{TENANT}/device/{self.device.device_id}"

    async def run(self) -> None:
        """Be there until cancelled."""
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._be_connected()
            await asyncio.sleep(RETRY_S)

    async def _be_connected(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            username, password = self._account
            client_id = f"{TENANT}-{self.device.device_id}"
            writer.write(
                encode_connect(
                    version=VERSION, client_id=client_id, keep_alive_s=0, username=username, password=password
                )
            )
            packets = Reader(VERSION)
            while data := await reader.read(65_536):
                arrivals, controls = packets.feed(data)
                for control in controls:
                    self._heed(control, writer)
                for arrival in arrivals:
                    for answer in self.device.hear(msgspec.json.decode(arrival.payload)):
                        packet_id = next(self._packet_ids)
                        self._unconfirmed[packet_id] = answer
                        writer.write(self._answer(packet_id, answer))
                    writer.write(encode_pubacks([arrival.packet_id]))
        finally:
            writer.close()

    def _heed(self, control: object, writer: asyncio.StreamWriter) -> None:
        match control:
            case Connack():
                if control.code:
                    return  # the account is not there yet: the server hangs up, and we come again
                writer.write(encode_subscribe(1, [f"{self._prefix}/commands"], version=VERSION))
                for packet_id, answer in self._unconfirmed.items():
                    writer.write(self._answer(packet_id, answer))
            case Suback():
                self.subscribed.set()
            case Puback():
                self._unconfirmed.pop(control.packet_id, None)

    def _answer(self, packet_id: int, answer: bytes) -> bytes:
        return encode_publish(f"{self._prefix}/commands/ack", answer, packet_id=packet_id, version=VERSION)


class OverHttp:
    """A device that polls, and waits where there is nothing to do."""

    def __init__(self, device: Device, session: aiohttp.ClientSession, *, url: str, token: str) -> None:
        self.device = device
        self._session = session
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    async def run(self) -> None:
        """Be there until cancelled."""
        poll = f"{self._url}/device/v1/tenant/{TENANT}/device/{self.device.device_id}/commands?wait=5"
        while True:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with self._session.get(poll, headers=self._headers) as response:
                    told = (await response.json())["commands"] if response.status == 200 else []
                for each in told:
                    for answer in self.device.hear(each):
                        await self._say(answer)
            # What it was told comes again until its answer has been taken in.
            await asyncio.sleep(RETRY_S)

    async def _say(self, answer: bytes) -> None:
        target = f"{self._url}/ingest/v1/tenant/{TENANT}/device/{self.device.device_id}/commands-ack"
        while True:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with self._session.post(target, data=answer, headers=self._headers) as response:
                    if response.status == 202:
                        return
                    if response.status not in (429, 503):
                        self.device.strange.append((response.status, await response.text()))
                        return
            await asyncio.sleep(RETRY_S)


@asynccontextmanager
async def open_session() -> AsyncIterator[aiohttp.ClientSession]:
    """HTTP for all devices."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_S_MAX)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session
