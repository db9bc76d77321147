"""One connection to an MQTT broker that subscribes and publishes at QoS 1 and acknowledges what it is told to.

    CONNECT ─► CONNACK ─► SUBSCRIBE ─► SUBACK ─► messages ─► its receiver, synchronously, as many as were read at once
                                                 PUBACKs ◄─ `acknowledge`, one write for all of a turn of the loop
                                                 PUBLISH ◄─ `publish`, see outgoing.py

Who acks: nobody here. A PUBACK is written for a packet id only when the receiver says so, and only on the connection
that it says it to, so an answer that comes late never acknowledges another message of a later connection. There is no
reconnect either: a connection ends once, with an Outage that says why, and its owner opens the next one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol, TypeVar, cast

import structlog

from pulse.adapters.mqtt.outgoing import Outgoing
from pulse.adapters.mqtt.packets import (
    DISCONNECT,
    PINGREQ,
    Connack,
    Control,
    Disconnect,
    Malformed,
    Puback,
    Suback,
    Version,
    encode_pubacks,
    encode_subscribe,
)
from pulse.adapters.mqtt.reader import Reader
from pulse.adapters.mqtt.reasons import SYSTEM, refusal_of, subscription_failure
from pulse.domain.errors import Outage
from pulse.domain.mqtt import Arrival

log = structlog.get_logger()

T = TypeVar("T")

SUBSCRIBE_ID = 1
SILENCES_MAX = 1.5
"""Of how many keep alive intervals a connection ends on which nothing was read; a broker takes as much (3.1.2.10)."""
PUBACK_S_MAX = 60.0
"""A broker that leaves a message of ours unconfirmed for longer has lost it, or its count of what is in flight."""
LOOK_S = 15.0
"""How often that is looked at where there is no keep alive."""


class Receiver(Protocol):
    """Whoever takes the messages; both calls happen inside the read of the socket, and must not raise."""

    def opened(self, connection: Connection, *, session_present: bool) -> None:
        """The broker knows us, or does not; comes before any message of this connection."""

    def received(self, arrivals: list[Arrival]) -> None:
        """These came together, in this order."""


class UnsupportedVersion(Exception):
    """The broker does not speak this version of MQTT."""


class Connection(asyncio.Protocol):
    """A connection; `broker.py` makes it."""

    def __init__(self, receiver: Receiver, *, version: Version, keep_alive_s: int) -> None:
        self._receiver = receiver
        self._reader = Reader(version)
        self._version = version
        self._keep_alive_s = keep_alive_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._is_connected = False
        self._connack: asyncio.Future[Connack] = self._loop.create_future()
        self._suback: asyncio.Future[Suback] = self._loop.create_future()
        self._acknowledged: list[int] = []
        self._outgoing: Outgoing | None = None
        self._is_paused = False
        self._read_at = time.monotonic()
        self._resumed_at = self._loop.time()
        self._ended: asyncio.Future[Outage] = self._loop.create_future()
        self._next_ping: asyncio.TimerHandle | None = None

    @property
    def version(self) -> Version:
        """The version of MQTT that it speaks."""
        return self._version

    def acknowledge(self, packet_id: int) -> None:
        """Let the broker forget this message of this connection; written at the end of this turn of the loop."""
        if not self._acknowledged:
            self._loop.call_soon(self._write_pubacks)
        self._acknowledged.append(packet_id)

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[int]:
        """Publish at QoS 1, once it is subscribed; see `Outgoing.publish`."""
        assert self._outgoing is not None, "not subscribed yet"
        return self._outgoing.publish(topic, payload)

    def pause(self) -> None:
        """Read no more for now; the broker keeps what it has."""
        if not self._is_paused and not self._ended.done():
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._is_paused and not self._ended.done():
            self._is_paused = False
            self._read_at = time.monotonic()
            self._resumed_at = self._loop.time()
            self._transport.resume_reading()

    async def ended(self) -> Outage:
        """Waits until it is over; returns why."""
        return await asyncio.shield(self._ended)

    async def close(self) -> None:
        """End it in order, after what was acknowledged is written; the session stays with the broker."""
        if not self._ended.done():
            self._write_pubacks()
            self._transport.write(DISCONNECT)
            self._end(Outage(SYSTEM, "the connection was closed"))
            self._transport.close()

    def abort(self, why: str) -> None:
        """End it at once, without a word to the broker; nothing where it has ended, or never begun."""
        if self._is_connected:
            self._fail(why)

    async def handshake(self, connect: bytes, filters: Sequence[str], shared: Sequence[str]) -> None:
        """Introduce ourselves and subscribe: to `shared` where the broker shares a subscription, else to `filters`.

        Without filters nothing is subscribed: such a connection only publishes.

        Raises Outage where the broker refuses or the connection ends, UnsupportedVersion.
        """
        self._transport.write(connect)
        connack = await self._unless_ended(self._connack)
        if connack.code:
            if connack.code in (0x01, 0x84):
                raise UnsupportedVersion
            raise refusal_of(connack)
        if connack.keep_alive_s is not None:
            self._keep_alive_s = connack.keep_alive_s
        if filters:
            await self._subscribe(connack, filters, shared)
        self._outgoing = Outgoing(
            self._transport.write,
            version=self._version,
            in_flight_max=connack.receive_max,
            packet_bytes_max=connack.packet_bytes_max,
        )
        self._keep_alive()

    async def _subscribe(self, connack: Connack, filters: Sequence[str], shared: Sequence[str]) -> None:
        is_shared = self._version is Version.V5 and connack.shared_subscriptions
        if self._version is Version.V5 and not is_shared:
            log.warning("the broker shares no subscriptions: only one bridge may run")
        wanted = shared if is_shared else filters
        self._transport.write(encode_subscribe(SUBSCRIBE_ID, wanted, version=self._version))
        suback = await self._unless_ended(self._suback)
        for each, code in zip(wanted, suback.codes, strict=False):
            if code != 1:
                raise subscription_failure(each, code)
        if len(suback.codes) != len(wanted):
            raise Outage(SYSTEM, f"the broker answers {len(suback.codes)} of {len(wanted)} subscriptions")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's: the socket is connected."""
        # uvloop's transport is none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        self._is_connected = True

    def data_received(self, data: bytes) -> None:
        """asyncio's: `data` was read."""
        self._read_at = time.monotonic()
        try:
            arrivals, controls = self._reader.feed(data)
            for control in controls:
                self._take(control)
        except Malformed as error:
            self._fail(f"the broker sent {error}")
            return
        if arrivals and not self._ended.done():
            self._receiver.received(arrivals)

    def eof_received(self) -> None:
        """asyncio's: the broker has closed its side; ours follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's: the socket is gone."""
        self._end(Outage(SYSTEM, "the broker closed the connection" if exc is None else f"the connection broke: {exc}"))

    def _take(self, control: Control) -> None:
        match control:
            case Connack() if not self._connack.done():
                if not control.code:
                    self._receiver.opened(self, session_present=control.session_present)
                self._connack.set_result(control)
            case Suback() if self._connack.done() and not self._suback.done():
                self._suback.set_result(control)
            case Puback() if self._outgoing is not None:
                self._outgoing.confirm(control)
            case Disconnect():
                self._end(refusal_of(control))
                self._transport.close()
            case Connack() | Suback():
                raise Malformed("an answer that nobody waits for")

    async def _unless_ended(self, answer: asyncio.Future[T]) -> T:
        awaited: list[asyncio.Future[T] | asyncio.Future[Outage]] = [answer, self._ended]
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise self._ended.result()

    def _write_pubacks(self) -> None:
        packet_ids, self._acknowledged = self._acknowledged, []
        if packet_ids and not self._ended.done():
            self._transport.write(encode_pubacks(packet_ids))

    def _keep_alive(self) -> None:
        """Ask for a sign of life twice in each interval; 0 is no keep alive at all."""
        if self._ended.done():
            return
        silence_s = time.monotonic() - self._read_at
        if not self._is_paused and self._keep_alive_s and silence_s > SILENCES_MAX * self._keep_alive_s:
            self._fail(f"the broker was silent for {silence_s:.0f} s")
        elif not self._is_paused and self._unconfirmed_s() > PUBACK_S_MAX:
            self._fail(f"the broker has not confirmed a message within {PUBACK_S_MAX:g} s")
        else:
            if self._keep_alive_s:
                self._transport.write(PINGREQ)
            self._next_ping = self._loop.call_later(self._keep_alive_s / 2 or LOOK_S, self._keep_alive)

    def _unconfirmed_s(self) -> float:
        """How long the first message of ours has waited for its PUBACK while we were reading."""
        oldest_at = self._outgoing.oldest_at if self._outgoing is not None else None
        return 0.0 if oldest_at is None else self._loop.time() - max(oldest_at, self._resumed_at)

    def _fail(self, why: str) -> None:
        self._end(Outage(SYSTEM, why))
        self._transport.abort()

    def _end(self, why: Outage) -> None:
        if not self._ended.done():
            self._ended.set_result(why)
        if self._outgoing is not None:
            self._outgoing.end(why)
        if self._next_ping is not None:
            self._next_ping.cancel()
