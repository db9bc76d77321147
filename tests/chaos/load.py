"""A bounded load of devices that never give up a reading: retried under the same key until the gateway answers 202."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

TENANT = "t1"
DEVICES = 16
PAUSE_S_MAX = 0.02
"""Between two readings of a device; about 1,000 readings a second in all."""
TRY_TIMEOUT_S = 12.0
RETRY_S = 0.05
GIVE_UP_S = 40.0
"""A reading that is not accepted for so long fails the test."""
READINGS_MAX = 60_000
RETRIED = frozenset({408, 429, 502, 503, 504})


@dataclass(kw_only=True)
class Load:
    """What was sent and what was answered; `acknowledged` is reading to the sequence that its 202 named.

    `device_of` says which device each of them is from.
    """

    seed: int
    acknowledged: dict[str, int] = field(default_factory=dict)
    device_of: dict[str, str] = field(default_factory=dict)
    tries: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def retries(self) -> int:
        return self.tries - len(self.acknowledged)


def telemetry(reading: str) -> bytes:
    """The body of a reading."""
    return b'{"metrics":{"reading":"%b"}}' % reading.encode()


@asynccontextmanager
async def load(
    base_url: str,
    tokens: dict[str, str],
    *,
    seed: int,
    name: str = "n",
    pause_s_max: float = PAUSE_S_MAX,
    kind: str = "telemetry",
    body_of: Callable[[str], bytes] = telemetry,
) -> AsyncIterator[Load]:
    """Devices send readings `<name>-1`, `<name>-2`, … until the block ends; then each is seen through to its 202."""
    made = Load(seed=seed)
    stop = asyncio.Event()
    numbers = itertools.count(1)
    chance = random.Random(seed)
    timeout = aiohttp.ClientTimeout(total=TRY_TIMEOUT_S)
    # A connection a try: one that the gateway's death has cut must not fail the next reading.
    connector = aiohttp.TCPConnector(limit=2 * DEVICES)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as devices:
        for device_id, token in itertools.islice(tokens.items(), DEVICES):
            url = f"{base_url}/ingest/v1/tenant/{TENANT}/device/{device_id}/{kind}"
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            device = _Device(session, url, headers, made, pause_s_max, device_id, body_of)
            devices.create_task(device.run(numbers, name, stop, random.Random(chance.random())))
        try:
            yield made
        finally:
            stop.set()


@dataclass(frozen=True)
class _Device:
    session: aiohttp.ClientSession
    url: str
    headers: dict[str, str]
    made: Load
    pause_s_max: float
    device_id: str
    body_of: Callable[[str], bytes]

    async def run(self, numbers: itertools.count[int], name: str, stop: asyncio.Event, chance: random.Random) -> None:
        while not stop.is_set():
            number = next(numbers)
            assert number <= READINGS_MAX, "the load must be bounded"
            reading = f"{name}-{number}"
            async with asyncio.timeout(GIVE_UP_S):
                while not await self._accepted(reading):  # noqa: ASYNC110 - a retry, not a wait
                    await asyncio.sleep(RETRY_S)
            await asyncio.sleep(chance.uniform(0, self.pause_s_max))

    async def _accepted(self, reading: str) -> bool:
        self.made.tries += 1
        body = self.body_of(reading)
        headers = {**self.headers, "Idempotency-Key": reading}
        try:
            async with self.session.post(self.url, data=body, headers=headers) as answer:
                if answer.status == 202:
                    self.made.acknowledged[reading] = (await answer.json())["seq"]
                    self.made.device_of[reading] = self.device_id
                    return True
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            return False
        assert answer.status in RETRIED, f"{reading}: {answer.status} {text}"
        self.made.refused.append(f"{answer.status} {text}")
        return False
