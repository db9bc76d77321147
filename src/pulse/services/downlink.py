"""The downlink: what is said to devices goes from JetStream's DOWN to the MQTT broker, over the bridge's connection.

    DOWN ─► pull ─► publish, QoS 1, in order ─► PUBACKs ─► commands: `commands-sent` into COMMANDS ─► ack
                         └── the connection is lost: what has no PUBACK is given back, and comes again

Who acks: `_until_acked`, after the broker's PUBACK, and for a command after JetStream has the word that it was sent. It
pulls only while there is a connection, so a broker that is away takes nothing out of DOWN. A device hears everything at
least once: a crash, or a lost PUBACK, says it again. What the broker refuses, or tells that nobody listens to, is not
tried again: a shadow's delta comes with the next get, a command is sent again once its device is heard of.

The order in which one device is told things is that of DOWN, as long as nothing fails and there is one bridge.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from pulse.domain.downward import COMMANDS, Downward, read_downward, sent_report
from pulse.domain.envelope import wrap
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.mqtt_access import Action, bridge_may
from pulse.domain.receipt import Receipt
from pulse.domain.settlement import Message
from pulse.domain.subjects import MessageType, subject_for
from pulse.services.refusal_log import RefusalLog
from pulse.services.waiting import KEEP_ALIVE_S, Batch, KeptAlive, Source, WaitMetrics, Waits

BATCHES_MAX = 1
"""That wait for their PUBACKs behind the one whose PUBACKs are waited for."""
NO_SUBSCRIBER = 0x10
"""Of a PUBACK (MQTT 5, 3.4.2.1): nobody listens, and nobody has a session that does. Not all brokers say so."""
REFUSED = 0x80
"""Reason codes from here on are refusals."""


class Line(Protocol):
    """A connection to the broker."""

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[int]:
        """Publish at QoS 1, in the order of the calls; the future gets the PUBACK's reason code, or an Outage.

        Raises Outage where the connection is over, Refusal for what the broker does not take.
        """


class Publisher(Protocol):
    """JetStream."""

    def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        """The future has a result once the message is on disk; raises, or has, Outage where that cannot be in time."""


class DownlinkMetrics(WaitMetrics, Protocol):
    """What is counted."""

    def settled(self, outcome: str, count: int) -> None:
        """So many were `delivered` to the broker, had `no_subscriber`, were `refused` by it or `too_large` for it, or
        are `foreign`: nothing that a device listens to."""


class _Part(NamedTuple):
    """Some messages of a batch."""

    created_ns: int
    messages: Sequence[Message]


class _Told(NamedTuple):
    """A message that is on its way to the broker: `confirmed` gets the outcome's reason code, or an error."""

    message: Message
    said: Downward | None
    confirmed: asyncio.Future[int]


class _Sending(NamedTuple):
    batch: Batch
    told: Sequence[_Told]


class Downlink:
    """The service; `open_source` opens a consumer of DOWN, which is a new one for each connection to the broker."""

    name = "downlink"

    def __init__(
        self,
        *,
        open_source: Callable[[], AbstractAsyncContextManager[Source]],
        publisher: Publisher,
        metrics: DownlinkMetrics,
        retry_delay_s_min: float,
        retry_delay_s_max: float,
        probe: Callable[[str], None],
        keep_alive_s: float = KEEP_ALIVE_S,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._open_source = open_source
        self._publisher = publisher
        self._metrics = metrics
        self._waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        self._probe = probe
        self._keep_alive_s = keep_alive_s
        self._clock_ns = clock_ns
        self._line: Line | None = None
        self._has_line = asyncio.Event()
        self._refusals = RefusalLog()
        self.in_flight = 0
        """Messages in hand: neither acked nor given back."""

    def opened(self, line: Line) -> None:
        """There is a connection."""
        self._line = line
        self._has_line.set()

    def lost(self) -> None:
        """There is none any more."""
        self._line = None
        self._has_line.clear()

    async def run(self, stop: asyncio.Event) -> None:
        """Tell the broker what comes until `stop`, then finish what is in flight."""
        attempt = 0
        while not stop.is_set():
            line = self._line
            if line is None:
                await _either(self._has_line, stop)
                continue
            try:
                async with self._open_source() as source:
                    await self._serve(line, source, stop)
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
            else:
                attempt = 0

    async def _serve(self, line: Line, source: Source, stop: asyncio.Event) -> None:
        """Until `line` is lost, or `stop`; an Outage of the source is waited out."""
        hand = KeptAlive(source, keep_alive_s=self._keep_alive_s)
        sending: asyncio.Queue[_Sending | None] = asyncio.Queue(maxsize=BATCHES_MAX)
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(hand.keep_alive(), name="downlink-keep-alive")
            settler = group.create_task(self._settle_all(sending, source, hand, stop), name="downlink-settler")
            attempt = 0
            while self._line is line and not stop.is_set():
                try:
                    batch = await source.fetch()
                except Outage as outage:
                    attempt += 1
                    await self._waits.out(outage, attempt, stop)
                    continue
                attempt = 0
                self._waits.over("nats")
                if batch:
                    hand.take(batch, batch.messages)
                    self._probe("downlink.fetched")
                    await sending.put(_Sending(batch, [self._tell(line, message) for message in batch.messages]))
            await sending.put(None)
            await settler
            keeper.cancel()

    def _tell(self, line: Line, message: Message) -> _Told:
        self.in_flight += 1
        try:
            said = _read(message)
        except Refusal as refusal:
            return _Told(message, None, _failed(refusal))
        try:
            return _Told(message, said, line.publish(said.full_topic, said.body))
        except (Outage, Refusal) as error:
            return _Told(message, said, _failed(error))

    async def _settle_all(
        self, sending: asyncio.Queue[_Sending | None], source: Source, hand: KeptAlive, stop: asyncio.Event
    ) -> None:
        while (each := await sending.get()) is not None:
            try:
                await self._settle(each, source, hand, stop)
            finally:
                self.in_flight -= len(each.told)
                hand.drop(each.batch)

    async def _settle(self, sending: _Sending, source: Source, hand: KeptAlive, stop: asyncio.Event) -> None:
        batch, told = sending
        codes = await asyncio.gather(*(each.confirmed for each in told), return_exceptions=True)
        self._probe("downlink.confirmed")
        outcomes = [self._outcome(each, code) for each, code in zip(told, codes, strict=True)]
        done = [each.message for each, outcome in zip(told, outcomes, strict=True) if outcome]
        left = [each.message for each, outcome in zip(told, outcomes, strict=True) if not outcome]
        sent = [each for each, outcome in zip(told, outcomes, strict=True) if outcome == "delivered"]
        commands = [each for each in sent if each.said is not None and each.said.topic == COMMANDS]
        if not await self._until_acked(_Part(batch.created_ns, done), commands, source, stop):
            left = [each.message for each in told]
        else:
            for outcome in filter(None, set(outcomes)):
                self._metrics.settled(outcome, outcomes.count(outcome))
        if left:
            await hand.give_back(_Part(batch.created_ns, left))

    def _outcome(self, told: _Told, code: int | BaseException) -> str | None:
        """What became of a message; None where it has to be said again."""
        match code:
            case Outage():
                return None
            case Refusal():
                outcome, why = "foreign" if told.said is None else "too_large", str(code)
            case BaseException():
                raise code
            case _ if code >= REFUSED:
                outcome, why = "refused", f"the broker refuses it with reason code 0x{code:02x}"
            case _:
                return "no_subscriber" if code == NO_SUBSCRIBER else "delivered"
        self._refusals.note(outcome, why, told.message.subject.encode("utf-8", "surrogateescape"))
        return outcome

    async def _until_acked(self, done: _Part, commands: Sequence[_Told], source: Source, stop: asyncio.Event) -> bool:
        """Report `commands` as sent, then ack `done`, outages waited out; False where `stop` came during one."""
        attempt = 0
        while done.messages:
            try:
                await asyncio.gather(*[self._report(done.created_ns, each) for each in commands])
                self._probe("downlink.reported")
                await source.ack(done)
            except Outage as outage:
                attempt += 1
                if stop.is_set():
                    return False
                await self._waits.out(outage, attempt, stop)
                continue
            self._probe("downlink.acked")
            self._waits.over()
            break
        return True

    async def _report(self, created_ns: int, told: _Told) -> None:
        """That a command was sent; the id is that of its message in DOWN, so that a second report of it is none."""
        assert told.said is not None
        tenant_id, device_id = told.said.tenant_id, told.said.device_id
        body = wrap(
            tenant_id=tenant_id,
            device_id=device_id,
            message_type=MessageType.COMMANDS_SENT,
            received_ms=self._clock_ns() // 1_000_000,
            source="mqtt",
            payload=sent_report(told.said),
        )
        subject = subject_for(MessageType.COMMANDS_SENT, tenant_id)
        await self._publisher.submit(subject, body, message_id=f"sent/{created_ns}/{told.message.sequence}")


def _read(message: Message) -> Downward:
    """What a device is told; Refusal where no device listens to it, or a command has no id."""
    said = read_downward(message.subject, message.body)
    if not bridge_may(Action.PUBLISH, said.full_topic):
        raise Refusal(Reason.INVALID_SUBJECT, f"no device listens to {said.topic}")
    if said.topic == COMMANDS:
        sent_report(said)
    return said


def _failed(error: Outage | Refusal) -> asyncio.Future[int]:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


async def _either(*events: asyncio.Event) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for each in waiting:
        each.cancel()
