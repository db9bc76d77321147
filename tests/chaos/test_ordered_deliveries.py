"""kill -9 of workers amid jobs of an ordered route: of a device, none is sent before those ahead of it have their end.

The oracle looks at what the destination had: before the first request of a job, each job of the same device with a
lower position was answered well, or was refused as often as a dead letter of it takes. Repeats may come at any time.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from chaos.load import TENANT
from chaos.system import SEEDS, TIMEOUT_S, System, eventually
from deliveries import OK, SETTINGS, Destination, Request, add_routes, answer, destinations, envelope, job_of, letters
from pulse.adapters.nats.committer import GroupCommitter
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.pool import open_pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.domain.registry import route_key

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

MESSAGES = 180
DEVICES = 6
PARTS = 4
ATTEMPTS = 3
STEPS = (("ordered.taken", 3), ("delivery.attempted", 12), ("ordered.concluded", 12), ("ordered.settled", 3))
ORDERED = SETTINGS | {"PULSE_ROUTE_LINE_LEASE_S": "1", "PULSE_ROUTE_ATTEMPTS_MAX": str(ATTEMPTS)}


def flapping(destination: Destination, request: Request) -> bytes:
    """Every third message is refused at first, and every 41st for ever."""
    position = int(request.webhook_id.partition(":")[0])
    if not position % 41:
        return answer(503)
    seen = sum(1 for each in destination.requests if each.webhook_id == request.webhook_id)
    return answer(503) if not position % 3 and seen == 1 else OK


async def publish(system: System, first: int, count: int) -> None:
    """Have JetStream take so many messages, of one device after the other."""
    async with (
        connection(system.nats.url, name="test") as client,
        GroupCommitter(client, streams={"telemetry": "TELEMETRY"}, timeout_s=60.0) as committer,
    ):
        await asyncio.gather(
            *[
                committer.publish(
                    f"telemetry.{TENANT}",
                    envelope(number, device_id=f"d{number % DEVICES}"),
                    message_id=f"message-{number}",
                )
                for number in range(first, first + count)
            ]
        )


def overtaken(requests: list[Request], dead: set[str]) -> list[str]:
    """The ids of jobs that were sent first while one ahead of them had not had its end."""
    device_of = {each.webhook_id: msgspec.json.decode(each.body)["device_id"] for each in requests}
    lines: dict[str, list[str]] = {}
    for name in sorted(device_of, key=lambda name: int(name.partition(":")[0])):
        lines.setdefault(device_of[name], []).append(name)
    place = {name: (line, at) for line in lines.values() for at, name in enumerate(line)}
    refused: Counter[str] = Counter()
    ended: set[str] = set()
    seen: set[str] = set()
    wrong = []
    for request in requests:
        name = request.webhook_id
        line, at = place[name]
        if name not in seen and not set(line[:at]) <= ended:
            wrong.append(name)
        seen.add(name)
        if request.answered == 200:
            ended.add(name)
        else:
            refused[name] += 1
            if name in dead and refused[name] >= ATTEMPTS:
                ended.add(name)
    return wrong


@pytest.mark.parametrize("seed", SEEDS)
async def test_of_a_device_none_overtakes_another_when_workers_are_killed(system: System, seed: int) -> None:
    chance = random.Random(seed)
    crashes = [iter([f"{step}:{chance.randint(1, last)}" for step, last in STEPS]) for _ in range(2)]
    async with destinations(flapping) as [destination]:
        await add_routes(system.database_url, {"line": destination.url}, ordered=True)
        async with (
            connection(system.nats.url, name="test") as client,
            open_pool(system.database_url, size_max=1, timeout_s=TIMEOUT_S, application_name="test") as pool,
        ):
            await RegistryBucket(client).project([route_key(TENANT, "line")], RegistryTruth(pool).load)
        async with (
            system.role("ingest-1").supervised() as ingest,
            system.role("ingest-2").supervised(),
            system.role("delivery-1", **ORDERED).supervised(crashes[0]) as one,
            system.role("delivery-2", **ORDERED).supervised(crashes[1]) as other,
        ):
            part = MESSAGES // PARTS
            for number in range(PARTS):
                await publish(system, 1 + number * part, part)
                if number == PARTS // 2:
                    ingest.kill()
                await eventually(has_had(destination, (number + 1) * part // 3), "some of them were sent")
            await eventually(is_done(system, destination), "each job has its end", limit_s=150)
            assert one.deaths or other.deaths, "else nothing was tried"
        async with connection(system.nats.url, name="test") as client:
            dead = {job_of(letter) for letter in await letters(client)}
    delivered = {each.webhook_id for each in destination.requests if each.answered == 200}
    assert len(delivered | dead) == MESSAGES
    assert dead == {each.webhook_id for each in destination.requests} - delivered
    assert overtaken(destination.requests, dead) == []


def has_had(destination: Destination, count: int) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return len({each.webhook_id for each in destination.requests}) >= count

    return holds


def is_done(system: System, destination: Destination) -> Callable[[], Awaitable[bool]]:
    """Whether every message has come to the destination, and nothing stands in a line any more."""

    async def holds() -> bool:
        if len({each.webhook_id for each in destination.requests}) < MESSAGES:
            return False
        return not await system.fetch("SELECT FROM ordered_lines UNION ALL SELECT FROM ordered_jobs")

    return holds
