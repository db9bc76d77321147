"""kill -9 of ingest workers around the making of jobs: each stored message is one job for the route that wants it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from chaos.load import TENANT, load
from chaos.system import SEEDS, TIMEOUT_S, System, eventually
from pulse.adapters.nats.browse import MessageBrowser
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.pool import open_pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.adapters.postgres.routes import RouteStore
from pulse.domain.browse import Start
from pulse.domain.ledger import SEQUENCE_MAX
from pulse.domain.registry import route_key
from pulse.domain.route import Match, Republish, Route, read_job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

PAUSE_S_MAX = 0.2
DEATHS_S_MAX = 120.0
STEPS = ("ingest.settled", "ingest.routed", "ingest.states_taken", "ingest.committed", "ingest.acked")
PAGE = 500


async def make_route(system: System) -> None:
    """One that wants all readings, and one that wants none."""
    async with (
        connection(system.nats.url, name="test") as client,
        open_pool(system.database_url, size_max=1, timeout_s=TIMEOUT_S, application_name="test") as pool,
    ):
        store = RouteStore(pool, seals=None)
        for route_id, expression in (("all", "has(metrics.reading)"), ("none", "metrics.reading == 'none'")):
            match = Match(expression=expression)
            await store.add(Route(tenant_id=TENANT, route_id=route_id, destination=Republish(topic="x"), match=match))
        keys = [route_key(TENANT, "all"), route_key(TENANT, "none")]
        await RegistryBucket(client).project(keys, RegistryTruth(pool).load)


async def jobs_of(system: System) -> Counter[tuple[str, int]]:
    """How many jobs stand in ROUTES, by route and the sequence of their message."""
    jobs: Counter[tuple[str, int]] = Counter()
    async with connection(system.nats.url, name="test") as client:
        browser = MessageBrowser(client)
        last, sequence = await browser.last_sequence("ROUTES"), 1
        while sequence <= last:
            page = await browser.read("ROUTES", Start(sequence=sequence), limit=PAGE)
            for each in page:
                job = read_job(each.subject, each.body)
                jobs[job.route_id, job.position & SEQUENCE_MAX] += 1
            sequence = page[-1].sequence + 1
    return jobs


@pytest.mark.parametrize("seed", SEEDS)
async def test_workers_killed_around_routing_lose_and_double_no_job(system: System, gateway: str, seed: int) -> None:
    chance = random.Random(f"routing {seed}")
    steps = [f"{step}:{chance.randint(1, 3)}" for step in STEPS]
    chance.shuffle(steps)
    print(f"seed {seed}: SIGKILL at {steps}")  # noqa: T201 - shown where it fails
    await make_route(system)
    crew = [system.role(f"ingest-{number}") for number in range(2)]
    armed: Iterator[str] = iter(steps)

    async def all_steps_were_met() -> bool:
        return sum(len(worker.deaths) for worker in crew) == len(steps)

    async with AsyncExitStack() as running:
        await running.enter_async_context(system.role("rescue").supervised())
        for worker in crew:
            await running.enter_async_context(worker.supervised(armed))
        async with load(gateway, system.tokens, seed=seed, pause_s_max=PAUSE_S_MAX) as sent:
            await eventually(all_steps_were_met, f"each of {steps} has killed a worker", limit_s=DEATHS_S_MAX)
        await system.stored_exactly(sent)
        jobs = await jobs_of(system)
    assert jobs == Counter({("all", sequence): 1 for sequence in sent.acknowledged.values()})
