"""A load that goes on at one rate whatever becomes of it: many devices, each reading sent once and never again."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from chaos.load import TENANT

TIMEOUT_S = 30.0
NO_ANSWER = 0


@dataclass(kw_only=True)
class SteadyLoad:
    """What was answered; `acknowledged` is reading to the sequence that its 202 named."""

    acknowledged: dict[str, int] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)


@asynccontextmanager
async def steady_load(base_url: str, tokens: Mapping[str, str], *, per_s: float) -> AsyncIterator[SteadyLoad]:
    """All devices of `tokens` together send `per_s` readings a second until the block ends."""
    made = SteadyLoad()
    stop = asyncio.Event()
    interval_s = len(tokens) / per_s
    connector = aiohttp.TCPConnector(limit=len(tokens))
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as devices:
        for number, (device_id, token) in enumerate(tokens.items()):
            url = f"{base_url}/ingest/v1/tenant/{TENANT}/device/{device_id}/telemetry"
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            sender = _Sender(session, url, headers, device_id, made)
            devices.create_task(sender.run(stop, interval_s=interval_s, first_in_s=number / per_s))
        try:
            yield made
        finally:
            stop.set()


@dataclass(frozen=True)
class _Sender:
    session: aiohttp.ClientSession
    url: str
    headers: dict[str, str]
    device_id: str
    made: SteadyLoad

    async def run(self, stop: asyncio.Event, *, interval_s: float, first_in_s: float) -> None:
        clock = asyncio.get_running_loop()
        due_s = clock.time() + first_in_s
        for number in itertools.count(1):
            if await _stopped(stop, due_s - clock.time()):
                return
            await self._send(f"{self.device_id}-{number}")
            due_s = max(due_s + interval_s, clock.time())

    async def _send(self, reading: str) -> None:
        body = b'{"metrics":{"reading":"%b"}}' % reading.encode()
        try:
            async with self.session.post(self.url, data=body, headers=self.headers) as answer:
                status, text = answer.status, await answer.text()
                if status == 202:
                    self.made.acknowledged[reading] = (await answer.json())["seq"]
        except (aiohttp.ClientError, TimeoutError) as error:
            status, text = NO_ANSWER, repr(error)
        self.made.statuses[status] += 1
        if status != 202:
            self.made.refused.append(f"{reading}: {status} {text}")


async def _stopped(stop: asyncio.Event, within_s: float) -> bool:
    try:
        await asyncio.wait_for(stop.wait(), max(within_s, 0))
    except TimeoutError:
        return False
    return True
