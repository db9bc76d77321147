"""The stream LATER: jobs that wait, as schedules of JetStream.

JetStream takes schedules only into a stream that discards what is old to make room, and nothing here may be discarded.
So what it holds is looked at once a second: beyond `fill_max` of its limit nothing more is taken.
Source: ADR-51 of nats-architecture-and-design, "JetStream Message Scheduler".
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import msgspec
from nats.aio.client import Client

from pulse.adapters.nats.errors import SYSTEM, mapped
from pulse.domain.batching import Ack, Verdict, judge
from pulse.domain.errors import Outage, StreamFull
from pulse.domain.waiting_job import Later

PUBLISH_TIMEOUT_S = 5.0
LOOK_S = 1.0
FILL_MAX = 0.5
"""Of the limit: what several workers publish between two looks is far less than the other half."""
OVERHEAD_BYTES = 512
"""What a message takes beside its body, headers included, by a good measure."""


class Schedules:
    """Publishes schedules; `level` asks how many bytes the stream holds, `bytes_max` is what it may."""

    def __init__(self, client: Client, *, level: Callable[[], Awaitable[int]], bytes_max: int) -> None:
        self._client = client
        self._level = level
        self._bytes_max = int(bytes_max * FILL_MAX)
        self._bytes = 0
        self._looked_at = 0.0

    async def publish(self, job: Later) -> None:
        """Returns once it is on disk; raises Outage, and StreamFull where it has no room for jobs that wait."""
        now = time.monotonic()
        if now - self._looked_at > LOOK_S:
            self._looked_at = now  # first, so that one of many that come at once asks
            self._bytes = await self._level()
        if self._bytes > self._bytes_max:
            raise StreamFull(SYSTEM, "too many jobs wait already")
        self._bytes += len(job.body) + OVERHEAD_BYTES
        with mapped("cannot have a job wait"):
            reply = await self._client.request(
                job.subject, job.body, timeout=PUBLISH_TIMEOUT_S, headers=dict(job.headers)
            )
        ack = msgspec.json.decode(reply.data, type=Ack)
        verdict = judge(ack, 1)
        if verdict is Verdict.STORED:
            return
        said = ack.error.description if ack.error else "no reason given"
        if verdict is Verdict.FULL:
            raise StreamFull(SYSTEM, f"no room for jobs that wait: {said}")
        raise Outage(SYSTEM, f"stream LATER does not take a job: {said}")
