"""The bridge: what devices say to an MQTT broker becomes messages in JetStream.

    broker ─► Admission ─► in flight ─► group commit ─► PubAck ─► PUBACK
                 │            └── Outage ─► again, under the same id, until it is stored; no PUBACK meanwhile
                 └── dropped: counted, PUBACK

Who acks: `services/in_flight.py`, after the PubAck. Until then the broker has the message too, so nothing is lost
with this process or a connection. Here a connection is opened again and again, and all is stopped in order: no message
is read any more, what is in flight is stored and acknowledged, and the session stays with the broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Protocol, TypeVar

from pulse.domain.errors import Outage
from pulse.domain.mqtt import Arrival
from pulse.services.bridge_admission import Devices
from pulse.services.bridge_ports import BridgeMetrics, Connection
from pulse.services.downlink import Line
from pulse.services.in_flight import InFlight
from pulse.services.waiting import Waits

T = TypeVar("T")

READY_POLL_S = 0.02
"""How often it is asked whether the devices have been read; `/readyz` says so meanwhile."""
STABLE_S = 10.0
"""What lasts longer was a connection, and the wait for the next one begins small again."""


class BrokerConnection(Connection, Line, Protocol):
    """A connection to the broker, subscribed."""

    async def ended(self) -> Outage:
        """Waits until it is over; returns why."""

    async def close(self) -> None:
        """End it; the broker keeps the session."""


class Broker(Protocol):
    """The MQTT broker."""

    async def connect(self, receiver: Bridge) -> BrokerConnection:
        """A connection that tells `receiver` of itself, then of messages. Raises Outage."""


class Link(Protocol):
    """Who wants to know whether the broker is there."""

    def up(self) -> None:
        """It is."""

    def down(self, detail: str) -> None:
        """It is not, and why."""


class Downlink(Protocol):
    """Who says something to devices."""

    def opened(self, line: Line) -> None:
        """There is a connection, subscribed."""

    def lost(self) -> None:
        """There is none any more."""


class Bridge:
    """The service; `last_sequences` reads the last sequence of each stream that messages are stored in."""

    name = "bridge"

    def __init__(
        self,
        *,
        broker: Broker,
        in_flight: InFlight,
        downlink: Downlink,
        devices: Devices,
        last_sequences: Callable[[], Awaitable[Mapping[str, int]]],
        link: Link,
        metrics: BridgeMetrics,
        retry_delay_s_min: float,
        retry_delay_s_max: float,
    ) -> None:
        self._broker = broker
        self._in_flight = in_flight
        self._downlink = downlink
        self._devices = devices
        self._last_sequences = last_sequences
        self._link = link
        self._waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        self.has_subscribed = False
        """Whether the broker has had our subscription once, since when it keeps what comes for us."""

    def opened(self, connection: Connection, *, session_present: bool) -> None:
        """The broker's word on a new connection, before its first message."""
        self._in_flight.opened(connection, session_present=session_present)

    def received(self, arrivals: list[Arrival]) -> None:
        """Messages of the connection; never raises: what goes wrong here ends `run`."""
        self._in_flight.take(arrivals)

    async def run(self, stop: asyncio.Event) -> None:
        """Bridge until `stop`, then until nothing is in flight."""
        async with asyncio.TaskGroup() as group:
            retries = group.create_task(self._in_flight.retry(), name="bridge-retries")
            bugs = group.create_task(self._in_flight.failed(), name="bridge-bugs")
            await self._stay_connected(stop)
            retries.cancel()
            bugs.cancel()

    async def _stay_connected(self, stop: asyncio.Event) -> None:
        attempt = 0
        while not (stop.is_set() or self._devices.ready):
            await _pause(READY_POLL_S, stop)
        while not stop.is_set():
            opened_at = time.monotonic()
            try:
                await self._one_connection(stop)
            except Outage as outage:
                attempt = 1 if time.monotonic() - opened_at > STABLE_S else attempt + 1
                if outage.system == "mqtt":
                    self._link.down(str(outage))
                await self._waits.out(outage, attempt, stop)

    async def _one_connection(self, stop: asyncio.Event) -> None:
        """Returns when told to stop, and nothing is in flight; raises Outage where the connection ends before."""
        self._in_flight.begin_above(await self._last_sequences())
        connection = None
        try:
            connection = await _unless(stop, self._broker.connect(self))
            if connection is not None:
                self.has_subscribed = True
                self._link.up()
                self._waits.over()
                self._downlink.opened(connection)
                await self._serve(connection, stop)
        finally:
            self._in_flight.lost()
            self._downlink.lost()
            if connection is not None:
                await connection.close()

    async def _serve(self, connection: BrokerConnection, stop: asyncio.Event) -> None:
        why = await _unless(stop, connection.ended())
        if why is not None:
            raise why
        connection.pause()
        await self._in_flight.empty.wait()


async def _pause(seconds: float, stop: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


async def _unless(stop: asyncio.Event, work: Coroutine[None, None, T]) -> T | None:
    """What `work` returns or raises; None, and `work` cancelled, where `stop` is set before."""
    working = asyncio.create_task(work, name="bridge-connection")
    told = asyncio.create_task(stop.wait(), name="bridge-stop")
    try:
        await asyncio.wait((working, told), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        told.cancel()
        await asyncio.wait((working, told))
