"""kill -9 of delivery workers and of nats-server amid jobs: each is delivered under its one webhook-id, or is dead."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from chaos.system import SEEDS, System, eventually
from deliveries import OK, SETTINGS, Destination, Request, add_routes, answer, are_gone, destinations, publish_jobs
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.streams import stream_state
from pulse.domain.route import message_id

JOBS = int(os.environ.get("PULSE_DELIVERY_JOBS", "2000"))
"""The suite's size; 10000 for the whole of it."""
ROUTES = 20
STEPS = (("delivery.fetched", 5), ("delivery.attempted", 60), ("delivery.concluded", 60), ("delivery.acked", 5))
"""Where a worker is killed, and the last time of so many at which it may be; each life of one meets as many."""


def first_time_away(destination: Destination, request: Request) -> bytes:
    """Every third job is refused the first time that it comes."""
    if int(request.webhook_id.partition(":")[0]) % 3:
        return OK
    seen = sum(1 for each in destination.requests if each.webhook_id == request.webhook_id)
    return answer(503) if seen == 1 else OK


@pytest.mark.timeout(300 + JOBS / 50)
@pytest.mark.parametrize("seed", SEEDS)
async def test_jobs_survive_kill_9_of_workers_and_of_nats_server(system: System, seed: int) -> None:
    chance = random.Random(seed)
    crashes = iter([f"{step}:{chance.randint(1, last)}" for step, last in STEPS])
    async with (
        destinations(*[first_time_away] * ROUTES) as made,
        connection(system.nats.url, name="test") as client,
    ):
        routes = [f"r{number}" for number in range(ROUTES)]
        await add_routes(system.database_url, dict(zip(routes, [each.url for each in made], strict=True)))
        jobs = [(1 + number, routes[number % ROUTES]) for number in range(JOBS)]
        part = JOBS // (len(STEPS) + 1)
        ids: list[str] = []
        async with (
            system.role("rescue").supervised(),
            system.role("delivery-1", **SETTINGS).supervised(crashes) as mortal,
        ):
            for number in range(len(STEPS)):
                ids += await publish_jobs(client, jobs[number * part :][:part])
                await mortal.died(number + 1)
            async with system.role("delivery-2", **SETTINGS).supervised() as other:
                begun = sum(len(each.requests) for each in made)
                publishing = asyncio.create_task(publish_jobs(client, jobs[len(STEPS) * part :]))
                await eventually(more_than(made, begun), "the last of the jobs are on their way")
                await asyncio.to_thread(system.nats.kill)
                await asyncio.to_thread(system.nats.restart)
                other.kill()
                ids += await publishing
                await eventually(lambda: are_gone(client), "each job has its end", limit_s=60 + JOBS / 50)
                await eventually(written_down(system), "what was given up is written down")
                assert len(other.deaths) == 1
            assert mortal.deaths == ["SIGKILL"] * len(STEPS)
        dead = {
            message_id(job["position"], job["route_id"])
            for job in [msgspec.json.decode(row["body"]) for row in await system.dead_letters()]
        }
    delivered = sum((each.delivered for each in made), Counter[str]())
    came = {each.webhook_id for destination in made for each in destination.requests}
    assert set(delivered) | dead == set(ids)
    assert came <= set(ids)  # nothing was ever sent under another id


def more_than(made: list[Destination], begun: int) -> Callable[[], Awaitable[bool]]:
    """Whether the destinations have had more than `begun` requests."""

    async def holds() -> bool:
        return sum(len(each.requests) for each in made) > begun

    return holds


def written_down(system: System) -> Callable[[], Awaitable[bool]]:
    """Whether nothing is left in DEAD_LETTERS."""

    async def holds() -> bool:
        async with connection(system.nats.url, name="test") as client:
            return not (await stream_state(client, "DEAD_LETTERS")).messages

    return holds
