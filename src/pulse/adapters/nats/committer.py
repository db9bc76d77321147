"""Group commit to JetStream: concurrent publishes leave as atomic batches, and each caller gets its own receipt.

Which messages travel together and what an answer means is decided in `pulse.domain.batching`; here are the wire, the
clock and the callers. A receipt is given only for what a PubAck names, so it is as durable as the stream's acks are.

    caller ─ submit ─► lane of its stream ─ pump, once per turn of the loop ─► frames of all requests, one write
      ▲                                                                             │
      └─────────────────── one reply for each request, on one inbox ◄───────────────┘

A request without an answer (timeout, connection lost, no responders) is sent again under the same message ids until
its callers' deadline; inside the stream's duplicate window that stores nothing twice. What fails then is an Outage
that does not say whether the message was stored: whoever asks again with the same id within the window finds out.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import msgspec
import structlog

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import IS_IT_RUNNING, SYSTEM
from pulse.adapters.nats.flights import NO_PUBACK, NO_STREAM, Flight, Flights
from pulse.adapters.nats.frames import Frame, FrameSubscription, subscribe, write
from pulse.adapters.nats.publication import Pending, Publication, Subjects, batch_frames, check_message_id, plain_frame
from pulse.domain.batching import Ack, Lane, Limits, Verdict, judge
from pulse.domain.errors import Outage, Overloaded, Reason, Refusal, StreamFull
from pulse.domain.receipt import Receipt, Waiting

log = structlog.get_logger()

DEFAULT_LIMITS = Limits()
TICK_S = 0.05
"""How often deadlines, lost answers and a new connection are looked for; no message waits for it on its way."""
NO_RESPONDERS = b"NATS/1.0 503"
"""How the headers of an answer begin that no stream gave. Source: NATS ADR-4, ADR-8 of nats-architecture-and-design."""


class PublishMetrics(Protocol):
    """What is counted."""

    def published(self, stream: str, outcome: str, count: int, seconds: float) -> None:
        """JetStream answered a request of `count` messages after so long; `outcome` is a Verdict, or `duplicate`."""


class GroupCommitter:
    """Publishes to JetStream; it works between `__aenter__` and `__aexit__`, or while `run` does.

    `streams` names the stream of each subject's first token; `limits` hold for each stream. `timeout_s` bounds one
    publish with all its retries, `attempt_timeout_s` the wait for one answer; `pending_max` and `pending_bytes_max`
    bound what has no answer yet.
    """

    name = "group commit"

    def __init__(
        self,
        client: PulseClient,
        *,
        streams: Mapping[str, str],
        limits: Limits = DEFAULT_LIMITS,
        metrics: PublishMetrics | None = None,
        pending_max: int = 20_000,
        pending_bytes_max: int = 64 * 1024 * 1024,
        timeout_s: float = 5.0,
        attempt_timeout_s: float = 2.0,
        drain_s_max: float = 4.0,
        retry_after_s: float = 1.0,
    ) -> None:
        self._client = client
        by_stream: dict[str, Lane[Publication]] = {stream: Lane(limits) for stream in streams.values()}
        self._subjects = Subjects({token: by_stream[stream] for token, stream in streams.items()})
        self._streams = {lane: stream for stream, lane in by_stream.items()}
        self._metrics = metrics
        self._pending = Pending(messages_max=pending_max, bytes_max=pending_bytes_max)
        self._timeout_s = timeout_s
        self._drain_s_max = drain_s_max
        self._outage = partial(Outage, SYSTEM, retry_after_s=retry_after_s)
        self._full = partial(StreamFull, SYSTEM, retry_after_s=retry_after_s)
        self._overloaded = partial(Overloaded, SYSTEM, retry_after_s=retry_after_s)

        self._flights = Flights(attempt_timeout_s=attempt_timeout_s)
        self._batch_prefix = secrets.token_urlsafe(6).encode()
        self._inbox = b""
        self._loop: asyncio.AbstractEventLoop
        """Kept: up to CPython 3.11 asking for the running loop is a system call, and a submit would ask twice."""
        self._subscription: FrameSubscription | None = None
        self._connection = 0
        self._accepting = False
        self._pump_is_due = False
        self._bug: Exception | None = None
        self._stop = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._decode = msgspec.json.Decoder(Ack).decode

    @property
    def pending(self) -> int:
        """How many publishes have no answer yet."""
        return self._pending.messages

    async def publish(self, subject: str, body: bytes, *, message_id: str) -> Receipt:
        """Store `body` under `subject` and return JetStream's word for it; see `submit`."""
        return await self.submit(subject, body, message_id=message_id)

    def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        """Like `publish`, without a coroutine: the future gets the receipt, or the error; see `send`."""
        if not self._accepting:
            raise self._away()
        future: asyncio.Future[Receipt] = self._loop.create_future()
        self.send(subject, body, message_id=message_id, waiting=future)
        return future

    def send(self, subject: str, body: bytes, *, message_id: str, waiting: Waiting) -> None:
        """Store `body` under `subject`, and tell `waiting` what became of it.

        Raises Refusal for a subject or id that NATS cannot carry and a message above the server's max_payload,
        Overloaded where too much is pending, Outage where NATS is known to be away. `waiting` gets an Outage where no
        answer came in time or the stream is full. A publish under a pending id shares its answer, as a duplicate.
        """
        if not self._accepting or not self._client.is_connected:
            raise self._away()
        if self._pending.is_full:
            raise self._overloaded("too many messages wait for JetStream")
        check_message_id(message_id)
        lane, encoded = self._subjects.find(subject)
        deadline = self._loop.time() + self._timeout_s
        message = Publication(encoded, body, message_id.encode(), deadline, waiting)
        if message.size > self._client.max_payload:
            raise _too_large()
        if self._pending.add(lane, message) and not self._pump_is_due:
            self._pump_soon()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain what is pending; what the drain's limit leaves gets an Outage."""
        await self._open()
        try:
            while not stop.is_set():
                self._tick()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await stop.wait()
            self._accepting = False
            await self._drain()
        finally:
            self._accepting = False
            for lane in self._streams:
                self._pending.fail(lane, list(lane.unsettled.values()), self._away)
            if self._subscription is not None and not (self._client.is_closed or self._client.is_draining):
                await self._subscription.unsubscribe()

    async def __aenter__(self) -> Self:
        await self._open()
        await self._tasks.__aenter__()
        self._tasks.create_task(self.run(self._stop), name=self.name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        cancelled = kind is asyncio.CancelledError  # any other error is the caller's own: it is not to come in a group
        await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))

    async def _open(self) -> None:
        if self._subscription is None:
            inbox = self._client.new_inbox()
            self._inbox = inbox.encode() + b"."
            self._subscription = await subscribe(self._client, f"{inbox}.*", self._on_replies)
            self._connection = self._client.stats["reconnects"]
            self._loop = asyncio.get_running_loop()
            self._accepting = True

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._drain_s_max):
                while self._pending.messages:
                    self._tick()
                    await asyncio.sleep(TICK_S)
        except TimeoutError:
            log.warning("stopped before JetStream had answered", messages=self._pending.messages)

    def _pump_soon(self) -> None:
        """Send at the end of this turn of the loop, so that all that is published in it travels together."""
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        if not self._client.is_connected:
            return
        frames: list[bytes] = []
        now, connection = self._loop.time(), self._client.stats["reconnects"]
        for lane in self._streams:
            while (request := lane.take()) is not None:
                token = self._flights.start(Flight(request, lane, now, connection))
                reply = b"%b%d" % (self._inbox, token)
                if len(request.messages) == 1:
                    frames.append(plain_frame(request.messages[0], reply))
                else:
                    frames += batch_frames(request.messages, b"%b%x" % (self._batch_prefix, token), reply)
        if frames:
            write(self._client, b"".join(frames), messages=len(frames))

    def _on_replies(self, replies: list[Frame]) -> None:
        """nats-py's read loop would end, and say nothing, with what is raised here: `_tick` raises it again."""
        try:
            for subject, _, headers, data in replies:
                flight = self._flights.land(int(subject[len(self._inbox) :]))
                if flight is not None:
                    self._on_reply(flight, headers, data)
        except Exception as error:  # noqa: BLE001
            self._bug = error

    def _on_reply(self, flight: Flight, headers: bytes, data: bytes) -> None:
        if flight.lane.leaves_early(flight.request):
            self._pump()
        now = self._loop.time()
        if headers.startswith(NO_RESPONDERS):
            self._flights.park(flight, NO_STREAM, now=now)
        else:
            try:
                ack = self._decode(data)
            except msgspec.DecodeError:
                self._flights.park(flight, NO_PUBACK, now=now)
            else:
                self._execute(flight, ack, now=now)
        self._pump_soon()

    def _execute(self, flight: Flight, ack: Ack, *, now: float) -> None:
        request, lane, messages = flight.request, flight.lane, flight.request.messages
        error = f"{ack.error.description} ({ack.error.err_code})" if ack.error is not None else ""
        verdict = judge(ack, len(messages))
        if self._metrics is not None:
            outcome = "duplicate" if ack.duplicate else verdict.name.lower()
            self._metrics.published(self._streams[lane], outcome, len(messages), now - flight.sent_at)
        match verdict:
            case Verdict.STORED:
                self._pending.succeed(lane, messages, ack)
                self._flights.clear_trouble(lane)
            case Verdict.DIVIDE:
                lane.divide(request)
            case Verdict.ONE_BY_ONE:
                log.warning("the stream takes no batches", stream=self._streams[lane], error=error)
                self._flights.without_batches(lane, now=now)
                lane.divide(request, one_by_one=True)
            case Verdict.LATER:
                self._flights.park(flight, error, now=now)
            case Verdict.TOO_LARGE:
                self._pending.fail(lane, messages, _too_large)
            case Verdict.FULL:
                self._pending.fail(lane, messages, partial(self._full, f"stream {ack.stream} is full: {error}"))
            case Verdict.REFUSED:
                self._pending.fail(lane, messages, partial(self._outage, f"stream {ack.stream} refuses: {error}"))

    def _tick(self) -> None:
        if self._bug is not None:
            raise self._bug
        now = self._loop.time()
        self._give_up_overdue(now)
        if not self._client.is_connected:
            return
        if (connection := self._client.stats["reconnects"]) != self._connection:
            self._connection = connection
            self._refuse_oversized()
        self._flights.retry(now=now, connection=connection)
        self._pump()

    def _give_up_overdue(self, now: float) -> None:
        for lane in self._streams:
            overdue = []
            for message in lane.unsettled.values():
                if message.deadline > now:
                    break
                overdue.append(message)
            if overdue:
                denied = self._client.denied_since(time.monotonic() - 2 * self._timeout_s)
                why = denied or self._flights.trouble_of(lane)
                self._pending.fail(lane, overdue, partial(self._outage, f"JetStream did not answer in time: {why}"))

    def _refuse_oversized(self) -> None:
        """The server that we are with now may take less than the last one, and it hangs up on whoever sends more."""
        for lane in self._streams:
            oversized = [message for message in lane.unsettled.values() if message.size > self._client.max_payload]
            self._pending.fail(lane, oversized, _too_large)

    def _away(self) -> Outage:
        return self._outage("NATS is away", hint=IS_IT_RUNNING)


def _too_large() -> Refusal:
    return Refusal(Reason.TOO_LARGE, "the message is larger than NATS takes")
