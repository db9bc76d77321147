"""The delivery role's own connection to the MQTT broker, on which it only publishes; opened anew whenever it is lost.

It is opened once a route has something to publish: who has no such route needs no broker.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from pulse.domain.errors import Outage
from pulse.domain.mqtt import Arrival
from pulse.services.waiting import WaitMetrics, Waits

SYSTEM = "mqtt"


class Connection(Protocol):
    """A connection to the broker."""

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[int]:
        """Publish at QoS 1; the future gets the PUBACK's reason code, or an Outage. Raises Outage, Refusal."""

    async def ended(self) -> Outage:
        """Waits until it is over; returns why."""

    async def close(self) -> None:
        """End it in order."""


class Broker(Protocol):
    """Opens connections."""

    async def connect(self, receiver: Republishing) -> Connection:
        """A connection; raises Outage."""


class Republishing:
    """The service; satisfies `services.sending.Republisher`."""

    name = "republish"

    def __init__(
        self, broker: Broker, *, metrics: WaitMetrics, retry_delay_s_min: float, retry_delay_s_max: float
    ) -> None:
        self._broker = broker
        self._waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        self._connection: Connection | None = None
        self._is_wanted = asyncio.Event()

    def opened(self, connection: object, *, session_present: bool) -> None:
        """The broker's word on a new connection; there is nothing to do about it."""

    def received(self, arrivals: list[Arrival]) -> None:
        """Nothing is subscribed, so nothing comes; what comes all the same is nobody's."""

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[int]:
        """Publish at QoS 1; the future gets the PUBACK's reason code, or an Outage. Raises Outage, Refusal."""
        if self._connection is None:
            self._is_wanted.set()
            raise Outage(SYSTEM, "there is no connection to the broker")
        return self._connection.publish(topic, payload)

    async def run(self, stop: asyncio.Event) -> None:
        """Stay connected until `stop`."""
        attempt = 0
        await _either(self._is_wanted, stop)
        while not stop.is_set():
            try:
                self._connection = await self._broker.connect(self)
                attempt = 0
                self._waits.over()
                why = await self._until_over(self._connection, stop)
                if why is not None:
                    raise why
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
            finally:
                connection, self._connection = self._connection, None
                if connection is not None:
                    await connection.close()

    async def _until_over(self, connection: Connection, stop: asyncio.Event) -> Outage | None:
        """Why it has ended; None where it was `stop`."""
        ended = asyncio.create_task(connection.ended(), name="republish-ended")
        told = asyncio.create_task(stop.wait(), name="republish-stop")
        try:
            await asyncio.wait((ended, told), return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else None
        finally:
            ended.cancel()
            told.cancel()
            await asyncio.wait((ended, told))


async def _either(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait(), name="republish-wanted") for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for each in waiting:
        each.cancel()
