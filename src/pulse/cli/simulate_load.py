"""The sending of `pulse simulate`: an open loop, each message at its time, whatever became of the one before.

Every sender takes the next number and waits for its moment. Where all senders are busy, what is due goes out late and
is counted so; where the time is up, what has not gone out is never sent, and that is counted too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pulse.adapters.postgres.simulation import RunReader
from pulse.cli.simulate_delivery import STOP_LOOK_S, Answer, Client, deliver
from pulse.domain.errors import Outage
from pulse.domain.simulation import Fleet, Message
from pulse.domain.tally import Latencies, Outcome, Tally

LATE_S = 0.1
"""A message that goes out more than this behind its time counts as late; so long the end is waited for, too."""
HEARTBEATS = 1
DUPLICATES = 2
PROBE_POLL_S = 0.02
PROBE_PAUSE_S = 0.05
PROBE_S_MAX = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be sent: `count` messages, `rate` a second, as sequence numbers from `seq_base` on.

    `connections` is how many are under way at the same time.
    """

    fleet: Fleet
    rate: float
    count: int
    connections: int
    heartbeats: float
    duplicates: float
    seq_base: int

    @property
    def seqs(self) -> tuple[int, int]:
        """All sequence numbers of the run: from, and below."""
        return self.seq_base, self.seq_base + self.count // self.fleet.size + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A message that was accepted, for the probe; `started_at` on the loop's clock."""

    device_id: str
    ts_ms: int
    seq: int
    started_at: float


class Load:
    """Sends `plan` through `client` and keeps the books in `tally`."""

    def __init__(self, *, client: Client, plan: Plan, tokens: Sequence[str], stop: asyncio.Event) -> None:
        self._client = client
        self._plan = plan
        self._tokens = tokens
        self._ids = plan.fleet.device_ids()
        self._stop = stop
        self._next = 0
        self._began_at = 0.0
        self._probe: asyncio.Future[Sent] | None = None
        self._measuring = True
        self.tally = Tally(devices=plan.fleet.size, count=plan.count)
        self.stored_after = Latencies()
        """From sending to a row that can be seen, of a sample."""

    async def run(self, reader: RunReader) -> float:
        """Send until all is sent, time is up or `stop` is set; returns how many seconds that took."""
        self._began_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            probe = group.create_task(self._measure(reader), name="probe")
            senders = [
                group.create_task(self._send_on(), name=f"sender {number}") for number in range(self._plan.connections)
            ]
            await asyncio.wait(senders)
            self._measuring = False
            probe.cancel()
        return time.monotonic() - self._began_at

    async def _send_on(self) -> None:
        plan = self._plan
        ends_at = self._began_at + plan.count / plan.rate + LATE_S
        while self._next < plan.count:
            message = self._next
            self._next += 1
            due_at = self._began_at + message / plan.rate
            now = await self._wait_until(due_at)
            if self._stop.is_set() or now > ends_at:
                return
            self.tally.late += now > due_at + LATE_S
            if plan.fleet.chosen(message, fraction=plan.duplicates, purpose=DUPLICATES):
                self.tally.sent_twice += 1
                made = self._make(message)
                await asyncio.gather(self._deliver(message, made, due_at), self._deliver(message, made, due_at))
            else:
                await self._deliver(message, self._make(message), due_at)

    async def _wait_until(self, due_at: float) -> float:
        """The time when it has come to `due_at`, or when `stop` is set."""
        while True:
            now = time.monotonic()
            if now >= due_at or self._stop.is_set():
                return now
            await asyncio.sleep(min(due_at - now, STOP_LOOK_S))

    def _make(self, number: int) -> tuple[Message, int]:
        """The message of that number, and the time that it carries."""
        fleet = self._plan.fleet
        count, device = divmod(number, fleet.size)
        seq = self._plan.seq_base + count
        ts_ms = time.time_ns() // 1_000_000
        if fleet.chosen(number, fraction=self._plan.heartbeats, purpose=HEARTBEATS):
            kind, body = "heartbeat", fleet.heartbeat(seq=seq, ts_ms=ts_ms)
        else:
            kind, body = "telemetry", fleet.telemetry(device, seq=seq, ts_ms=ts_ms)
        self.tally.sent += 1
        self.tally.settle(number, Outcome.UNCONFIRMED)
        return Message(self._ids[device], self._tokens[device], kind, body, str(seq)), ts_ms

    async def _deliver(self, number: int, made: tuple[Message, int], due_at: float) -> None:
        message, ts_ms = made
        tally = self.tally
        tries = 0

        def told(answer: Answer) -> None:
            nonlocal tries
            tries += 1
            tally.retried += tries > 1
            tally.answers[answer.name] += 1

        started_at = time.monotonic()
        answer = await deliver(self._client.send, message, told=told, stopped=self._stop.is_set)
        if not answer.accepted:
            tally.settle(number, Outcome.REFUSED if answer.final else Outcome.UNCONFIRMED)
            return
        tally.latencies.record(time.monotonic() - due_at)
        tally.recognised += answer.duplicate
        if message.kind == "heartbeat":
            tally.settle(number, Outcome.HEARTBEAT)
            return
        tally.settle(number, Outcome.ACCEPTED)
        if self._probe is not None and not self._probe.done():
            seq = self._plan.seq_base + number // self._plan.fleet.size
            self._probe.set_result(Sent(device_id=message.device_id, ts_ms=ts_ms, seq=seq, started_at=started_at))

    async def _measure(self, reader: RunReader) -> None:
        """Take one accepted message after the other and wait until its row can be seen."""
        while self._measuring:  # a database that is away when this is cancelled answers with its own error
            self._probe = asyncio.get_running_loop().create_future()
            sent = await self._probe
            ts = datetime.fromtimestamp(sent.ts_ms / 1000, UTC)
            try:
                while time.monotonic() - sent.started_at < PROBE_S_MAX:
                    if await reader.is_stored(sent.device_id, ts=ts, seq=sent.seq):
                        self.stored_after.record(time.monotonic() - sent.started_at)
                        break
                    await asyncio.sleep(PROBE_POLL_S)
            except Outage:
                # PostgreSQL is away: that is no measurement, and the drain will say so.
                await asyncio.sleep(1.0)
            await asyncio.sleep(PROBE_PAUSE_S)
