"""What is published on one connection and waits for its PUBACK. No I/O but `write`, no clock but the loop's.

    publish ─► waiting, in order ─► as many as the broker takes at once ─► PUBACK ─► its future, and room for the next
                                    one write for all of a turn of the loop

Nothing of it outlives the connection: what has no PUBACK by then may have arrived or not, and is published anew, as
another message, by whoever still wants it said. At QoS 1 a broker keeps nothing of us that this could disturb.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from pulse.adapters.mqtt.packets import PACKET_ID_MAX, Puback, Version, encode_publish
from pulse.domain.errors import Outage, Reason, Refusal

IN_FLIGHT_MAX = 1000
"""Without a PUBACK, where the broker does not allow less: what is written and not read by it stays bounded."""
HEAD_BYTES_MAX = 16
"""Of a PUBLISH: fixed header, length of the topic, packet id, no properties."""


class _Sent(NamedTuple):
    sent_at: float
    confirmed: asyncio.Future[int]


class Outgoing:
    """Publishes by `write`; `in_flight_max` and `packet_bytes_max` are what the broker takes (3.2.2.3)."""

    def __init__(
        self,
        write: Callable[[bytes], None],
        *,
        version: Version,
        in_flight_max: int | None = None,
        packet_bytes_max: int | None = None,
    ) -> None:
        self._write = write
        self._version = version
        self._in_flight_max = min(IN_FLIGHT_MAX, in_flight_max or IN_FLIGHT_MAX)
        self._packet_bytes_max = packet_bytes_max
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[str, bytes, asyncio.Future[int]]] = deque()
        self._in_flight: dict[int, _Sent] = {}
        self._packet_id = 0
        self._is_due = False
        self._ended: Outage | None = None

    @property
    def oldest_at(self) -> float | None:
        """When the first of those in flight was written, on the loop's clock; None where there is none."""
        return next(iter(self._in_flight.values())).sent_at if self._in_flight else None

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[int]:
        """Publish at QoS 1, in the order of the calls; the future gets the PUBACK's reason code, or an Outage.

        The caller bounds how many wait. Raises Outage once the connection is over, Refusal TOO_LARGE for what the
        broker does not take.
        """
        if self._ended is not None:
            raise self._ended
        size = HEAD_BYTES_MAX + len(topic.encode()) + len(payload)
        if self._packet_bytes_max is not None and size > self._packet_bytes_max:
            raise Refusal(Reason.TOO_LARGE, f"the broker takes no more than {self._packet_bytes_max} bytes")
        future: asyncio.Future[int] = self._loop.create_future()
        self._waiting.append((topic, payload, future))
        self._pump_soon()
        return future

    def confirm(self, puback: Puback) -> None:
        """The broker has this one, or refuses it; a PUBACK of nothing that is in flight means nothing."""
        sent = self._in_flight.pop(puback.packet_id, None)
        if sent is not None and not sent.confirmed.done():
            sent.confirmed.set_result(puback.code)
        if self._waiting:
            self._pump_soon()

    def end(self, why: Outage) -> None:
        """The connection is over: all that is not confirmed fails."""
        if self._ended is not None:
            return
        self._ended = why
        futures = [each.confirmed for each in self._in_flight.values()] + [future for *_, future in self._waiting]
        self._in_flight.clear()
        self._waiting.clear()
        for future in futures:
            if not future.done():
                future.set_exception(why)

    def _pump_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._is_due = False
        packets, now = [], self._loop.time()
        while self._waiting and len(self._in_flight) < self._in_flight_max:
            topic, payload, future = self._waiting.popleft()
            packet_id = self._next_packet_id()
            self._in_flight[packet_id] = _Sent(now, future)
            packets.append(encode_publish(topic, payload, packet_id=packet_id, version=self._version))
        if packets:
            self._write(b"".join(packets))

    def _next_packet_id(self) -> int:
        while True:
            self._packet_id = self._packet_id % PACKET_ID_MAX + 1
            if self._packet_id not in self._in_flight:
                return self._packet_id
