"""What the bridge has in flight: messages that the broker handed over and that wait for JetStream's word.

Who acks, and when: `_settle` alone lets the broker have its PUBACK, after JetStream's PubAck for the message, for its
dead letter or for the answer that rejects it, or after counting what is not kept.

It is bounded: by the receive maximum that the broker keeps to and, where one does not, by reading no more.
A connection that is lost takes nothing along: what came by it is stored all the same. Where the broker still has our
session it sends that again, and it is recognised by packet id and bytes, in flight or stored in the meantime. Only
what was never acknowledged can be: no packet id is used again before its PUBACK.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial

import structlog

from pulse.domain.errors import Outage, Refusal, StreamFull
from pulse.domain.mqtt import Arrival, is_another, same_message
from pulse.domain.receipt import Receipt
from pulse.domain.retry import delay_s
from pulse.services.bridge_admission import Admission, Dropped, Publication
from pulse.services.bridge_ports import BridgeMetrics, Connection, Publisher
from pulse.services.refusal_log import RefusalLog

log = structlog.get_logger()

BYTES_MAX = 48 * 1024 * 1024
"""Payloads in flight; below what the group commit lets wait."""
CATCH_UP_S_MAX = 3600.0
"""For so long after an outage of ours, at most, devices may exceed their rates."""
NOTHING = Publication(stream="", subject="", body=b"", message_id="")
"""Of a message that is dropped."""


class _Held:
    """One message in flight; it waits for its own receipt (`domain.receipt.Waiting`).

    `connection` is the one that it came by last, `floor` is explained at `is_another`.
    """

    __slots__ = ("_in_flight", "arrival", "connection", "floor", "publication", "received_at")

    def __init__(
        self, in_flight: InFlight, arrival: Arrival, publication: Publication, floor: int, received_at: float
    ) -> None:
        self._in_flight = in_flight
        self.arrival = arrival
        self.publication = publication
        self.connection = in_flight.connection
        self.floor = floor
        self.received_at = received_at

    def done(self) -> bool:
        """It always waits: nobody can cancel it."""
        return False

    def set_result(self, receipt: Receipt, /) -> None:
        """JetStream has it."""
        self._in_flight.stored(self, receipt)

    def set_exception(self, error: Refusal | Outage, /) -> None:
        """JetStream does not, or may not, have it."""
        self._in_flight.not_stored(self, error)


class InFlight:
    """All of them; `receive_max` is what the broker was told that it may send without an answer."""

    def __init__(
        self,
        *,
        publisher: Publisher,
        admission: Admission,
        metrics: BridgeMetrics,
        receive_max: int,
        retry_delay_s_min: float,
        retry_delay_s_max: float,
        probe: Callable[[str], None],
    ) -> None:
        self._publisher = publisher
        self._admission = admission
        self._metrics = metrics
        self._receive_max = receive_max
        self._pause_s = partial(delay_s, minimum_s=retry_delay_s_min, maximum_s=retry_delay_s_max)
        self._probe = probe
        self.empty = asyncio.Event()
        self.empty.set()

        self.connection: Connection | None = None
        self._count = self._bytes = 0
        self._is_paused = False
        self._by_packet_id: dict[int, _Held] = {}
        """In the session that the broker has; what came at QoS 0, or in a session that is lost, is not among them."""
        self._unacknowledged: dict[int, Arrival] = {}
        """Settled after their connection was lost; the broker will send them again."""
        self._floors: dict[str, int] = {}
        """The highest sequence of each stream that is known to be taken."""
        self._unlimited_until = 0.0
        self._retries: list[_Held] = []
        self._retry_due = asyncio.Event()
        self._retry_attempt = 0
        self._waiting_for: str | None = None
        self._bug: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refusals = RefusalLog()

    @property
    def count(self) -> int:
        """How many are neither stored nor refused yet."""
        return self._count

    def begin_above(self, sequences: Mapping[str, int]) -> None:
        """These sequences of each stream were there before whatever comes from now on."""
        for stream, sequence in sequences.items():
            self._raise_floor(stream, sequence)

    def opened(self, connection: Connection, *, session_present: bool) -> None:
        """Messages come by `connection` from now on; without a session none of them is one that came before."""
        self.connection = connection
        if session_present:
            self._catch_up()
        else:
            self._by_packet_id.clear()
            self._unacknowledged.clear()

    def lost(self) -> None:
        """The connection is over; what came by it can be acknowledged no more."""
        self.connection = None

    def take(self, arrivals: list[Arrival]) -> None:
        """Take them over. Never raises: a bug ends `failed`, and with it the process."""
        now = time.monotonic()
        self._metrics.received(len(arrivals))
        try:
            for arrival in arrivals:
                self._take(arrival, now)
        except Exception as error:  # noqa: BLE001 - `failed` raises it where it ends the process
            self._fail(error)
        if self.connection and (self._count >= 2 * self._receive_max or self._bytes >= BYTES_MAX):
            self._is_paused = True
            self.connection.pause()

    async def failed(self) -> None:
        """Returns never; raises the first bug."""
        await self._bug

    async def retry(self) -> None:
        """Publish again what an outage has sent back, in rounds; returns never."""
        while True:
            await self._retry_due.wait()
            self._retry_attempt += 1
            await asyncio.sleep(self._pause_s(self._retry_attempt, random=random.random()))  # noqa: S311 jitter
            again, self._retries = self._retries, []
            self._retry_due.clear()
            for held in again:
                self._publish(held)

    def _take(self, arrival: Arrival, now: float) -> None:
        packet_id = arrival.packet_id
        is_known = packet_id in self._by_packet_id or packet_id in self._unacknowledged
        if is_known and self._came_before(packet_id, arrival):
            self._metrics.settled("repeated", 0.0)
            return
        decision = self._admission.decide(arrival, limited=now >= self._unlimited_until)
        publication = decision if isinstance(decision, Publication) else NOTHING
        held = _Held(self, arrival, publication, self._floors.get(publication.stream, 0), now)
        if packet_id:
            self._by_packet_id[packet_id] = held
        self._count += 1
        self._bytes += len(arrival.payload)
        self.empty.clear()
        if isinstance(decision, Dropped):
            self._drop(held, decision)
        else:
            self._publish(held)

    def _came_before(self, packet_id: int, arrival: Arrival) -> bool:
        held = self._by_packet_id.get(packet_id)
        if held is not None and same_message(held.arrival, arrival):
            held.connection = self.connection
            return True
        before = self._unacknowledged.pop(packet_id, None)
        if before is None or not same_message(before, arrival) or self.connection is None:
            return False
        self.connection.acknowledge(packet_id)
        return True

    def stored(self, held: _Held, receipt: Receipt) -> None:
        """JetStream has it. Never raises."""
        try:
            self._judge(held, receipt)
        except Exception as error:  # noqa: BLE001 - `failed` raises it where it ends the process
            self._fail(error)

    def not_stored(self, held: _Held, error: Refusal | Outage) -> None:
        """JetStream does not, or may not, have it. Never raises."""
        try:
            if isinstance(error, Outage):
                self._later(held, error)
            else:
                self._refuse(held, error)
        except Exception as bug:  # noqa: BLE001 - `failed` raises it where it ends the process
            self._fail(bug)

    def _publish(self, held: _Held) -> None:
        publication = held.publication
        try:
            self._publisher.send(publication.subject, publication.body, message_id=publication.message_id, waiting=held)
        except Outage as outage:
            self._later(held, outage)
        except Refusal as refusal:
            self._refuse(held, refusal)

    def _judge(self, held: _Held, receipt: Receipt) -> None:
        publication = held.publication
        if self._waiting_for is not None:
            self._recovered(self._waiting_for, receipt.stream)
        self._probe("bridge.stored")
        if publication.refusal is not None:
            self._metrics.refused(publication.refusal.reason, publication.refused_as)
            self._refusals.note(publication.refusal.reason, str(publication.refusal), held.arrival.topic)
            self._settle(held, publication.refused_as)
        elif publication.names_delivery and is_another(held.arrival, receipt, floor=held.floor):
            another = publication._replace(message_id=f"{publication.message_id}/{secrets.token_hex(8)}")
            held.publication = another._replace(names_delivery=False)
            self._publish(held)
        else:
            self._raise_floor(publication.stream, receipt.seq)
            self._settle(held, "duplicate" if receipt.duplicate else "stored")

    def _later(self, held: _Held, outage: Outage) -> None:
        """A dead letter does not wait for room in its stream: rubbish would keep what is good from coming in."""
        if held.publication.refusal is not None and isinstance(outage, StreamFull):
            self._drop(held, Dropped(held.publication.refusal.reason, f"{held.publication.refusal}; {outage}"))
            return
        if self._waiting_for is None:
            self._waiting_for = outage.system
            self._metrics.waiting(outage.system, True)
            log.warning("waiting", system=outage.system, error=str(outage), in_flight=self._count)
        self._retries.append(held)
        self._retry_due.set()

    def _catch_up(self) -> None:
        """What the broker kept while we could not take it was said in its time: no rates until nothing is left."""
        self._unlimited_until = time.monotonic() + CATCH_UP_S_MAX

    def _recovered(self, system: str, stream: str) -> None:
        self._waiting_for, self._retry_attempt = None, 0
        self._catch_up()
        self._metrics.waiting(system, False)
        log.info("recovered", system=system, stream=stream)

    def _refuse(self, held: _Held, refusal: Refusal) -> None:
        """JetStream cannot carry it: a dead letter, or nothing where it was one."""
        if held.publication.refusal is not None:
            self._drop(held, Dropped(held.publication.refusal.reason, f"{held.publication.refusal}; {refusal}"))
            return
        decision = self._admission.condemn(held.arrival, refusal)
        if isinstance(decision, Dropped):
            self._drop(held, decision)
        else:
            held.publication = decision
            self._publish(held)

    def _drop(self, held: _Held, dropped: Dropped) -> None:
        self._metrics.refused(dropped.reason, "refused")
        self._refusals.note(dropped.reason, dropped.error, held.arrival.topic)
        self._settle(held, "refused")

    def _settle(self, held: _Held, outcome: str) -> None:
        self._metrics.settled(outcome, time.monotonic() - held.received_at)
        self._count -= 1
        self._bytes -= len(held.arrival.payload)
        packet_id = held.arrival.packet_id
        if packet_id and self._by_packet_id.get(packet_id) is held:
            del self._by_packet_id[packet_id]
            if held.connection is not None and held.connection is self.connection:
                held.connection.acknowledge(packet_id)
            else:
                self._unacknowledged[packet_id] = held.arrival
        if self._is_paused and self._count < self._receive_max and self._bytes < BYTES_MAX // 2:
            self._is_paused = False
            if self.connection is not None:
                self.connection.resume()
        if not self._count:
            self._unlimited_until = 0.0
            self.empty.set()

    def _raise_floor(self, stream: str, sequence: int) -> None:
        if sequence > self._floors.get(stream, 0):
            self._floors[stream] = sequence

    def _fail(self, error: Exception) -> None:
        if not self._bug.done():
            self._bug.set_exception(error)
