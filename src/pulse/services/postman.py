"""The postman: what is in the outbox goes to JetStream's DOWN, and from there to devices.

Nothing is acked here: a message is deleted from the outbox after JetStream has it. A crash in between publishes it
again under the same message id, which JetStream takes for the same within its two-minute window; later, a device hears
it twice. So do two postmen of one kind no harm; one that finds that JetStream had a message already looks away for a
moment, for somebody else is at it.

What one device is told keeps its order: no message of a device is published before the one in front of it is on disk.
All at once would not do. A batch with a duplicate in it, as after a crash, is divided by the group commit, and what is
new in its second half is stored before what is new in its first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from pulse.domain.downward import Downward, downward_subject
from pulse.domain.errors import Outage, Refusal
from pulse.domain.receipt import Receipt
from pulse.services.refusal_log import RefusalLog
from pulse.services.waiting import WaitMetrics, Waits

AT_ONCE = 500
LOOK_EVERY_S = 0.2
"""How often to look without having been told: others write into the outbox, too."""


Waiting = tuple[int, float, Downward]
"""A message in the outbox: its id, for how many seconds it has waited, what it says."""


class Outbox(Protocol):
    """What is to be said to devices; every call raises Outage."""

    async def oldest(self, limit: int) -> Sequence[Waiting]:
        """What has waited longest: the id of each, for how many seconds it has waited, and what it says."""

    async def delete(self, ids: Sequence[int]) -> None:
        """These have been said."""


class Publisher(Protocol):
    """JetStream."""

    def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        """The future has a result once the message is on disk; raises, or has, Outage where that cannot be in time."""


class PostmanMetrics(WaitMetrics, Protocol):
    """What is counted."""

    def oldest(self, waited_s: float | None) -> None:
        """For so long the first message has waited by now; None where there is none."""

    def posted(self, count: int) -> None:
        """So many messages have left the outbox."""

    def refused(self) -> None:
        """One left it for nowhere: NATS cannot carry it."""


class Postman:
    """Empties the outbox, in the order in which it was filled; `kind` is in its name."""

    def __init__(
        self,
        *,
        kind: str,
        outbox: Outbox,
        publisher: Publisher,
        metrics: PostmanMetrics,
        retry_delay_s_min: float,
        retry_delay_s_max: float,
        probe: Callable[[str], None],
    ) -> None:
        self.name = f"postman of {kind}"
        self._outbox = outbox
        self._publisher = publisher
        self._metrics = metrics
        self._waits = Waits(metrics, delay_s_min=retry_delay_s_min, delay_s_max=retry_delay_s_max)
        self._probe = probe
        self._told = asyncio.Event()
        self._refusals = RefusalLog()

    def tell(self) -> None:
        """There is something in the outbox."""
        self._told.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Post until `stop`."""
        attempt = 0
        while not stop.is_set():
            self._told.clear()
            try:
                is_more = await self._post()
            except Outage as outage:
                attempt += 1
                await self._waits.out(outage, attempt, stop)
                continue
            attempt = 0
            self._waits.over()
            if not is_more:
                await self._until_told(stop)

    async def _post(self) -> bool:
        """Post a page; whether there is more, and nobody else who posts it."""
        page = await self._outbox.oldest(AT_ONCE)
        self._metrics.oldest(page[0][1] if page else None)
        if not page:
            return False
        receipts: list[Receipt | None] = []
        for letters in _rounds(page):
            futures = [self._publish(number, letter) for number, _, letter in letters]
            answers = await asyncio.gather(*futures, return_exceptions=True)
            receipts += [self._judge(letter, answer) for (*_, letter), answer in zip(letters, answers, strict=True)]
        self._probe("postman.published")
        await self._outbox.delete([number for number, *_ in page])
        posted = [receipt for receipt in receipts if receipt is not None]
        self._metrics.posted(len(posted))
        return len(page) == AT_ONCE and not any(receipt.duplicate for receipt in posted)

    def _publish(self, number: int, letter: Downward) -> asyncio.Future[Receipt]:
        try:
            return self._publisher.submit(downward_subject(letter), letter.body, message_id=f"o/{number}")
        except (Refusal, Outage) as error:
            failed: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    def _judge(self, letter: Downward, answer: Receipt | BaseException) -> Receipt | None:
        """None where JetStream never takes it: what is behind it must not wait for that."""
        if isinstance(answer, Refusal):
            self._metrics.refused()
            self._refusals.note(answer.reason, str(answer), letter.full_topic.encode())
            return None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def _until_told(self, stop: asyncio.Event) -> None:
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._told, stop)]
        await asyncio.wait(waiting, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()


def _rounds(page: Sequence[Waiting]) -> list[list[Waiting]]:
    """`page` in its order, cut so that no device has two messages in one part."""
    rounds: list[list[Waiting]] = []
    counts: dict[tuple[str, str], int] = {}
    for waiting in page:
        device = waiting[2].tenant_id, waiting[2].device_id
        count = counts.get(device, 0)
        if count == len(rounds):
            rounds.append([])
        rounds[count].append(waiting)
        counts[device] = count + 1
    return rounds
