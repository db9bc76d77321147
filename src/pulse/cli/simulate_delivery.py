"""A message of a simulated device is sent until it is answered for good, as a well made device does.

What is not final is sent again under the same key, so that it is stored once: after what the answer asks for, or after
a backoff, for RETRY_S_MAX at most.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from pulse.domain.retry import delay_s
from pulse.domain.simulation import Message

RETRY_S_MAX = 60.0
"""Half of the window in which a retry is recognised by its key."""
RETRY_DELAY_S_MIN = 0.1
RETRY_DELAY_S_MAX = 5.0
STOP_LOOK_S = 0.2


class Answer(Protocol):
    """What one try came to."""

    @property
    def name(self) -> str:
        """What it is counted under."""

    @property
    def accepted(self) -> bool:
        """Whether whoever answered has the message."""

    @property
    def final(self) -> bool:
        """Whether trying again would change nothing."""

    @property
    def duplicate(self) -> bool:
        """Whether it says that the message was there before."""

    @property
    def retry_after_s(self) -> float:
        """How long it asks to wait at least."""


A = TypeVar("A", bound=Answer)


class Client(Protocol):
    """The devices' side of a protocol."""

    async def send(self, message: Message) -> Answer:
        """One try."""


async def deliver(
    send: Callable[[Message], Awaitable[A]],
    message: Message,
    *,
    told: Callable[[A], None],
    stopped: Callable[[], bool] = lambda: False,
) -> A:
    """The last answer: a final one, or what there was when time was up or `stopped` said so; `told` hears of all."""
    give_up_at = time.monotonic() + RETRY_S_MAX
    attempt = 0
    while True:
        attempt += 1
        answer = await send(message)
        told(answer)
        if answer.final:
            return answer
        backoff_s = delay_s(
            attempt,
            minimum_s=RETRY_DELAY_S_MIN,
            maximum_s=RETRY_DELAY_S_MAX,
            random=random.random(),  # noqa: S311
        )
        again_at = time.monotonic() + max(backoff_s, answer.retry_after_s)
        if again_at > give_up_at:
            return answer
        while (left_s := again_at - time.monotonic()) > 0:
            if stopped():
                return answer
            await asyncio.sleep(min(left_s, STOP_LOOK_S))
