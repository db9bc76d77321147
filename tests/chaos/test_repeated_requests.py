"""The same request five times, with one `Idempotency-Key`, also while nats-server restarts: one row in PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from chaos.load import DEVICES, RETRIED, TENANT
from chaos.system import SEEDS, System

pytestmark = [pytest.mark.chaos, pytest.mark.parametrize("seed", SEEDS)]

TIMES = 5
KEYS = 40
BATCHES = 4
ROWS = 10
RESTARTS = 2
PAUSE_S_MAX = 0.25
LIMIT_S = 40.0


@dataclass
class Repeated:
    """Requests that are sent again and again, accepted or not; `acknowledged` is reading to the sequence of its 202."""

    url: str
    tokens: dict[str, str]
    chance: random.Random
    acknowledged: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0

    async def single(self, session: aiohttp.ClientSession, number: int) -> None:
        """One reading, so often."""
        device_id, reading = f"d{number % DEVICES}", f"single-{number}"
        url = f"{self.url}/ingest/v1/tenant/{TENANT}/device/{device_id}/telemetry"
        for _ in range(TIMES):
            told = await self._accepted(session, url, device_id, reading, {"metrics": {"reading": reading}})
            self._acknowledge(reading, told["seq"], told["duplicate"])

    async def batch(self, session: aiohttp.ClientSession, number: int) -> None:
        """One batch, so often."""
        device_id = f"d{number}"
        readings = [f"batch-{number}-{row}" for row in range(ROWS)]
        rows = [{"payload": {"metrics": {"reading": reading}}} for reading in readings]
        body = {"tenant_id": TENANT, "device_id": device_id, "messages": rows}
        for _ in range(TIMES):
            told = await self._accepted(session, f"{self.url}/ingest/v1/batch", device_id, f"batch-{number}", body)
            for reading, result in zip(readings, told["results"], strict=True):
                self._acknowledge(reading, result["seq"], result["duplicate"])

    def _acknowledge(self, reading: str, seq: int, duplicate: bool) -> None:
        assert self.acknowledged.setdefault(reading, seq) == seq, f"{reading} was accepted twice"
        self.duplicates += duplicate

    async def _accepted(
        self, session: aiohttp.ClientSession, url: str, device_id: str, key: str, body: object
    ) -> dict[str, Any]:
        """The body of the first 202."""
        headers = {
            "Authorization": f"Bearer {self.tokens[device_id]}",
            "Content-Type": "application/json",
            "Idempotency-Key": key,
        }
        async with asyncio.timeout(LIMIT_S):
            while True:
                await asyncio.sleep(self.chance.uniform(0, PAUSE_S_MAX))
                async with session.post(url, data=json.dumps(body), headers=headers) as answer:
                    told = await answer.json(content_type=None)
                if answer.status == 202:
                    return dict(told)
                assert answer.status in RETRIED or (answer.status == 207 and told["results"]), (answer.status, told)


async def test_one_idempotency_key_is_one_row(system: System, gateway: str, seed: int) -> None:
    chance = random.Random(seed)
    sent = Repeated(gateway, system.tokens, random.Random(seed))
    async with system.role("ingest").supervised():
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            for number in range(KEYS):
                group.create_task(sent.single(session, number))
            for number in range(BATCHES):
                group.create_task(sent.batch(session, number))
            for _ in range(RESTARTS):
                await asyncio.sleep(chance.uniform(0.1, 0.5))
                system.nats.kill()
                await asyncio.to_thread(system.nats.start)
        readings = KEYS + BATCHES * ROWS
        assert len(sent.acknowledged) == readings
        assert sent.duplicates >= readings * (TIMES - 1), "a repetition must be told from a first time"
        await system.stored_exactly(sent)
