"""The registry bucket as a feed of changes, for the edge."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing

import structlog
from nats.aio.client import Client

from pulse.adapters.nats.follow import Interrupted, Message, follow
from pulse.adapters.nats.registry import PREFIX, STREAM, is_deletion, key_of
from pulse.domain.errors import Outage
from pulse.domain.registry import Change, Complete, Put, Reading, Removed, decode_record
from pulse.domain.retry import delay_s

logger = structlog.get_logger()

RETRY_S_MIN, RETRY_S_MAX = 0.1, 5.0


class _Position:
    """How far a feed has come in the making of the stream of `created`."""

    def __init__(self) -> None:
        self.created = ""
        self.sequence = 0
        self.complete = False


class RegistryFeed:
    """Follows the bucket through outages; satisfies `services.registry.RegistryFeed`.

    After an interruption it reads on where it was; where the bucket was made anew, from scratch. `keys` (wildcards
    allowed) leaves out all others.
    """

    def __init__(self, client: Client, *, keys: str = ">", timeout_s: float = 5.0) -> None:
        self._client = client
        self._subject = PREFIX + keys
        self._timeout_s = timeout_s

    async def watch(self) -> AsyncGenerator[Change, None]:
        """The changes; an outage, or a bucket that is not there, is waited out."""
        position = _Position()
        attempt = 0
        while True:
            try:
                async with aclosing(self._read(position)) as changes:
                    async for change in changes:
                        if isinstance(change, Complete):
                            attempt = 0
                        yield change
            except (Interrupted, Outage) as reason:
                attempt += 1
                log = logger.warning if attempt == 1 else logger.debug
                log("registry feed was interrupted and reads again", reason=str(reason), attempt=attempt)
            pause_s = delay_s(
                attempt,
                minimum_s=RETRY_S_MIN,
                maximum_s=RETRY_S_MAX,
                random=random.random(),  # noqa: S311 - spreads retries, guards nothing
            )
            await asyncio.sleep(pause_s)

    async def _read(self, position: _Position) -> AsyncGenerator[Change, None]:
        """One reading, until it breaks off; moves `position`."""
        if not position.complete:
            position.sequence = 0
        async with follow(
            self._client,
            stream=STREAM,
            from_sequence=position.sequence + 1,
            subject=self._subject,
            timeout_s=self._timeout_s,
        ) as following:
            if position.complete and following.stream_created != position.created:
                position.complete = False
                raise Interrupted("the bucket was made anew")
            position.created = following.stream_created
            yield Reading(from_scratch=not position.complete)
            caught_up = following.pending == 0
            if caught_up:
                position.complete = True
                yield Complete()
            while True:
                messages = await following.read()
                for message in messages:
                    yield _change(message)
                    position.sequence = message.sequence
                if caught_up:
                    continue
                if not messages:
                    raise Interrupted("what was to come was purged")
                if messages[-1].pending == 0:
                    caught_up = position.complete = True
                    yield Complete()


def _change(message: Message) -> Change:
    key = key_of(message)
    if is_deletion(message.headers):
        return Removed(key)
    record = decode_record(key, message.data)
    if record is None:
        logger.warning("registry entry is not readable and counts as absent", key=key)
        return Removed(key)
    return Put(record)
