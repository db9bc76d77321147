"""Long polls: devices that ask over HTTP for their commands, and wait where there are none.

    poll ─► has a place ─► ask ─► commands ─► `commands-sent` into COMMANDS ─► answer
                            ▲       none ─► wait ─┬─ time is up, or we stop: an empty answer
                            └──── woken ◄─────────┴─ a command of this device has passed through DOWN

A poll has its place before it asks, so no command falls between the asking and the waiting; and it asks again when it
is woken, so what it hands out is what the database says, once. A waking that is lost costs a device its wait, and
nothing else. The report precedes the answer: what a device says of a command comes after the word that it was sent.
Answers of the device that were rejected end its wait as well, and come beside the commands: services/rejections.py.

What is handed out again and again, to a device that asks in a loop and answers for nothing, is reported now and then:
each answer may hold a hundred commands, and a hundred reports of each would push what others say out of COMMANDS.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

import msgspec

from pulse.domain.downward import COMMANDS, report_of
from pulse.domain.envelope import wrap
from pulse.domain.errors import Overloaded
from pulse.domain.receipt import Receipt
from pulse.domain.subjects import MessageType, subject_for
from pulse.services.rejections import Device, Rejections

Told = Callable[[Device, bytes], None]
"""There may be a command for this device, or an answer of it is rejected: the document that says so."""
REPORTED_S = 30.0
"""How soon a command that is handed out once more is reported once more."""
REPORTED_MAX = 100_000
"""Commands that are remembered as reported; some 200 bytes each."""


class Asker(Protocol):
    """The roles that have a database."""

    async def ask(self, kind: str, tenant_id: str, device_id: str, body: bytes = b"") -> bytes:
        """What they know of `kind`, as JSON. Raises Refusal or Outage."""


class Publisher(Protocol):
    """JetStream."""

    def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        """The future has a result once the message is on disk; raises, or has, Outage where that cannot be in time."""


class Found(NamedTuple):
    """The answer's body, and for how long of the time there was nothing to do but wait."""

    body: bytes
    waited_s: float


class _Listed(msgspec.Struct, frozen=True, rename="camel"):
    command_id: str


class _List(msgspec.Struct, frozen=True):
    commands: list[_Listed]


_decode = msgspec.json.Decoder(_List).decode


class Polls:
    """A service too: while it runs, and only then, polls wait; within `watch` it is told of commands."""

    name = "polls"

    def __init__(
        self,
        *,
        asker: Asker,
        publisher: Publisher,
        watch: Callable[[Told], AbstractAsyncContextManager[None]],
        waiting_max: int,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._asker = asker
        self._publisher = publisher
        self._watch = watch
        self._waiting_max = waiting_max
        self._clock_ns = clock_ns
        self._places: dict[Device, set[asyncio.Event]] = {}
        self._count = 0
        self._are_kept = False
        self._process_id = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._reported: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._rejections = Rejections()

    @property
    def count(self) -> int:
        """How many polls have a place."""
        return self._count

    def wake(self, device: Device, rejection: bytes = b"") -> None:
        """There may be a command for this device, or it is to hear of a `rejection`."""
        if rejection:
            self._rejections.put(device, rejection)
        for place in self._places.get(device, ()):
            place.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Keep polls waiting until `stop`, which ends all waits."""
        async with self._watch(self.wake):
            self._are_kept = True
            await stop.wait()
            self._are_kept = False
            for device in self._places:
                self.wake(device)

    async def commands(self, tenant_id: str, device_id: str, *, wait_s: float) -> Found:
        """What the device is to do, once there is something or `wait_s` is over; reported as sent.

        Raises Overloaded where too many wait already, Outage where who knows of commands, or JetStream, is away.
        """
        if self._count >= self._waiting_max:
            raise Overloaded("commands", "as many devices wait as gateway_polls_max allows")
        device, place = (tenant_id, device_id), asyncio.Event()
        self._places.setdefault(device, set()).add(place)
        self._count += 1
        try:
            return await self._until_found(device, place, wait_s)
        finally:
            self._count -= 1
            places = self._places[device]
            places.discard(place)
            if not places:
                del self._places[device]

    async def _until_found(self, device: Device, place: asyncio.Event, wait_s: float) -> Found:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        waited_s = 0.0
        while True:
            place.clear()
            body = await self._asker.ask(COMMANDS, *device)
            found = _decode(body).commands
            if found:
                await self._report_all(device, [each.command_id for each in found])
            began = loop.time()
            rejected = self._rejections.take(device)
            if rejected:
                return Found(b'%b,"rejected":[%b]}' % (body.removesuffix(b"}"), b",".join(rejected)), waited_s)
            if found or began >= deadline or not self._are_kept:
                return Found(body, waited_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await place.wait()
            waited_s += loop.time() - began
            if not place.is_set() or not self._are_kept:
                return Found(body, waited_s)

    async def _report_all(self, device: Device, command_ids: Sequence[str]) -> None:
        """Report what was not reported a moment ago."""
        now = time.monotonic()
        while self._reported and next(iter(self._reported.values())) <= now - REPORTED_S:
            self._reported.popitem(last=False)
        new = [each for each in command_ids if (*device, each) not in self._reported]
        await asyncio.gather(*[self._report(*device, each) for each in new])
        for each in new:
            self._reported[(*device, each)] = now
        while len(self._reported) > REPORTED_MAX:
            self._reported.popitem(last=False)

    async def _report(self, tenant_id: str, device_id: str, command_id: str) -> None:
        body = wrap(
            tenant_id=tenant_id,
            device_id=device_id,
            message_type=MessageType.COMMANDS_SENT,
            received_ms=self._clock_ns() // 1_000_000,
            source="http",
            payload=report_of(command_id),
        )
        message_id = f"sent/{self._process_id}-{next(self._numbers):x}"
        subject = subject_for(MessageType.COMMANDS_SENT, tenant_id)
        await self._publisher.submit(subject, body, message_id=message_id)
