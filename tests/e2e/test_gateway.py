"""The gateway as a process of its own, while nats-server is killed, restarted and away.

`PULSE_TEST_ROUNDS=100 PULSE_TEST_SEED=7` for a longer run from another seed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]
import pytest

from gateway_process import LIMIT_S, TOKEN, GatewayProcess, answers, prepared
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import connection

ROUNDS = int(os.environ.get("PULSE_TEST_ROUNDS", "20"))
SEED = int(os.environ.get("PULSE_TEST_SEED", "1"))
SENDERS = 48
AWAY_REQUESTS = 3000
AT_ONCE_S = 1.0
"""What waits for an answer of JetStream waits for longer, until it is given up."""
GROWTH_BYTES_MAX = 24 * 1024 * 1024
"""Of the gateway's memory over as many refused requests; one leaked KiB a request would be a fifth of it too much."""


class Load:
    """Devices that send as fast as they are answered; `accepted` is the number in each message by its sequence."""

    def __init__(self, url: str) -> None:
        self.accepted: dict[int, int] = {}
        self.statuses: Counter[int] = Counter()
        self._url = f"{url}/ingest/v1/tenant/acme/device/d0/telemetry"
        self._batch = f"{url}/ingest/v1/batch"
        self._numbers = itertools.count()
        self._stop = False

    async def run(self) -> None:
        connector = aiohttp.TCPConnector(limit=SENDERS)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
            for sender in range(SENDERS):
                group.create_task(self._batches(session) if sender % 8 == 0 else self._singles(session))

    def stop(self) -> None:
        self._stop = True

    async def accepts(self) -> None:
        """Return once one more message was accepted."""
        before = len(self.accepted)
        async with asyncio.timeout(LIMIT_S):
            while len(self.accepted) == before:  # noqa: ASYNC110 - what is waited for is another process
                await asyncio.sleep(0.005)

    async def _singles(self, session: aiohttp.ClientSession) -> None:
        while not self._stop:
            number = next(self._numbers)
            status, told = await post(session, self._url, {"metrics": {"number": number}})
            self._count(number, status, told)

    async def _batches(self, session: aiohttp.ClientSession) -> None:
        while not self._stop:
            numbers = [next(self._numbers) for _ in range(10)]
            rows = [{"payload": {"metrics": {"number": number}}} for number in numbers]
            status, told = await post(session, self._batch, {"tenant_id": "acme", "device_id": "d1", "messages": rows})
            for number, result in zip(numbers, told.get("results", [{}] * 10), strict=True):
                self._count(number, result.get("status", status), result)

    def _count(self, number: int, status: int, told: dict[str, Any]) -> None:
        self.statuses[status] += 1
        if status == 202:
            assert told["seq"] not in self.accepted
            self.accepted[told["seq"]] = number


async def post(session: aiohttp.ClientSession, url: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
    async with session.post(
        url,
        data=json.dumps(body),
        headers={"authorization": f"Bearer {TOKEN}", "content-type": "application/json", **headers},
    ) as answer:
        told: dict[str, Any] = await answer.json(content_type=None)
        if answer.status in {429, 503}:
            assert int(answer.headers["retry-after"]) >= 1
        return answer.status, told


async def numbers_in_stream(url: str) -> dict[int, int]:
    """The number in each message of the stream by its sequence."""
    async with connection(url, name="reader") as client:
        jetstream = client.jetstream()
        expected = (await jetstream.stream_info("TELEMETRY")).state.messages
        subscription = await jetstream.subscribe("telemetry.>", ordered_consumer=True)
        found: dict[int, int] = {}
        while len(found) < expected:
            message = await subscription.next_msg(timeout=LIMIT_S)
            found[message.metadata.sequence.stream] = json.loads(message.data)["payload"]["metrics"]["number"]
        return found


@pytest.fixture
async def gateway(nats: NatsServer, scratch: Path) -> AsyncIterator[GatewayProcess]:
    async with prepared(nats):
        pass
    unlimited = {"device_messages_per_s": 0, "tenant_messages_per_s": 0}
    async with GatewayProcess(nats, scratch, **unlimited).running() as running:
        yield running


async def restart(nats: NatsServer) -> None:
    await asyncio.to_thread(nats.start)


@pytest.mark.chaos
@pytest.mark.timeout(ROUNDS * 5 + 300)
async def test_what_was_answered_202_is_in_the_stream_however_often_nats_is_killed(
    nats: NatsServer, gateway: GatewayProcess
) -> None:
    """Under load, single messages and batches; every sequence that an answer named holds that answer's message."""
    moments = random.Random(SEED)
    load = Load(gateway.url)
    async with asyncio.timeout(ROUNDS * 5 + 2 * LIMIT_S), asyncio.TaskGroup() as group:
        group.create_task(load.run())
        try:
            for _ in range(ROUNDS):
                await load.accepts()
                await asyncio.sleep(moments.uniform(0, 0.2))
                nats.kill()
                await restart(nats)
            await load.accepts()
        finally:
            load.stop()
    stored = await numbers_in_stream(nats.url)
    lost = {seq: number for seq, number in load.accepted.items() if stored.get(seq) != number}
    assert not lost, f"seed {SEED}: {len(lost)} of {len(load.accepted)} were answered 202 and are not there: {lost}"
    assert len(set(stored.values())) == len(stored), "a message is in the stream twice"
    assert set(load.statuses) <= {202, 503}, load.statuses
    assert len(load.accepted) > ROUNDS * SENDERS


@pytest.mark.chaos
async def test_the_same_request_five_times_is_one_message_also_while_nats_restarts(
    nats: NatsServer, gateway: GatewayProcess
) -> None:
    url = f"{gateway.url}/ingest/v1/tenant/acme/device/d0/telemetry"
    batch = f"{gateway.url}/ingest/v1/batch"
    seqs: dict[int, set[int]] = {number: set() for number in range(30)}
    duplicates: Counter[int] = Counter()
    rows = [{"payload": {"metrics": {"number": 1000 + row}}} for row in range(10)]

    async def until_accepted(session: aiohttp.ClientSession, url: str, body: object, key: str) -> dict[str, Any]:
        async with asyncio.timeout(LIMIT_S):
            while True:
                status, told = await post(session, url, body, **{"idempotency-key": key})
                if status == 202:
                    return told
                assert status == 503 or told["results"], told
                await asyncio.sleep(0.02)

    async def send_five(session: aiohttp.ClientSession, number: int) -> None:
        for _ in range(5):
            told = await until_accepted(session, url, {"metrics": {"number": number}}, f"key-{number}")
            seqs[number].add(told["seq"])
            duplicates[number] += told["duplicate"]
            await asyncio.sleep(0.1)

    async def send_batch_five(session: aiohttp.ClientSession) -> None:
        body = {"tenant_id": "acme", "device_id": "d1", "messages": rows}
        answers_ = []
        for _ in range(5):
            told = await until_accepted(session, batch, body, "batch")
            answers_.append([result["seq"] for result in told["results"]])
            await asyncio.sleep(0.1)
        assert answers_ == [answers_[0]] * 5

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for number in seqs:
            group.create_task(send_five(session, number))
        group.create_task(send_batch_five(session))
        for _ in range(2):
            await asyncio.sleep(0.15)
            nats.kill()
            await restart(nats)
    assert {number: len(found) for number, found in seqs.items()} == dict.fromkeys(seqs, 1)
    stored = await numbers_in_stream(nats.url)
    assert sorted(stored.values()) == [*range(30), *range(1000, 1010)]
    assert all(duplicates[number] >= 4 for number in seqs)


@pytest.mark.chaos
async def test_while_nats_is_away_every_request_is_503_at_once_in_flat_memory_and_then_it_recovers(
    nats: NatsServer, gateway: GatewayProcess
) -> None:
    assert gateway.process.pid is not None
    process = psutil.Process(gateway.process.pid)
    url = f"{gateway.url}/ingest/v1/tenant/acme/device/d0/telemetry"
    body = {"metrics": {"number": 1, "text": "x" * 4000}}
    waits: list[float] = []

    async def send(session: aiohttp.ClientSession, count: int) -> set[int]:
        statuses = set()
        for _ in range(count):
            start = time.perf_counter()
            statuses.add((await post(session, url, body))[0])
            waits.append(time.perf_counter() - start)
        return statuses

    async def send_all(session: aiohttp.ClientSession) -> set[int]:
        return set().union(*await asyncio.gather(*(send(session, AWAY_REQUESTS // SENDERS) for _ in range(SENDERS))))

    async with aiohttp.ClientSession() as session:
        assert await send_all(session) == {202}
        nats.kill()
        await answers(f"{gateway.url}/readyz", status=503)
        assert await send_all(session) == {503}
        before = process.memory_info().rss
        waits.clear()
        assert await send(session, 50) == {503}
        assert statistics.median(waits) < AT_ONCE_S
        assert await send_all(session) == {503}
        assert process.memory_info().rss - before < GROWTH_BYTES_MAX
        await restart(nats)
        await answers(f"{gateway.url}/readyz")
        assert await send_all(session) == {202}
    assert gateway.process.alive
