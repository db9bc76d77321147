"""kill -9 of shadow workers at each step between fetch and ack, under load: no update is lost, none applied twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from chaos.load import load
from chaos.outages import stopped
from chaos.shadows import applied_exactly, body_of
from chaos.system import SEEDS, System, eventually
from chaos.test_ingest_worker_killed import DEATHS_S_MAX, PAUSE_S_MAX, steps_of
from pulse.adapters.embedded.postgres_server import PostgresServer

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("workers", [1, 2])
async def test_shadow_workers_killed_at_every_step_lose_and_double_nothing(
    system: System, gateway: str, workers: int, seed: int
) -> None:
    """The postman among them; a message that meets three deaths is the rescue's, with the same effect."""
    chance = random.Random(f"{workers} {seed}")
    steps = [f"{step}:{chance.randint(1, 4)}" for step in [*steps_of("shadow"), *steps_of("postman")]]
    assert len(steps) >= 8, steps
    chance.shuffle(steps)
    print(f"seed {seed}, {workers} workers: SIGKILL at {steps}")  # noqa: T201 - shown where it fails
    system.stream = "SHADOW"
    crew = [system.role(f"shadow-{number}") for number in range(workers)]
    rescue = system.role("rescue")
    armed: Iterator[str] = iter(steps)

    async def all_steps_were_met() -> bool:
        return sum(len(worker.deaths) for worker in crew) == len(steps)

    async with AsyncExitStack() as running:
        await running.enter_async_context(rescue.supervised())
        for worker in crew:
            await running.enter_async_context(worker.supervised(armed))
        await running.enter_async_context(system.audited())
        async with load(
            gateway, system.tokens, seed=seed, pause_s_max=PAUSE_S_MAX, kind="shadow", body_of=body_of
        ) as sent:
            await eventually(all_steps_were_met, f"each of {steps} has killed a worker", limit_s=DEATHS_S_MAX)
            await asyncio.sleep(0.3)
        await applied_exactly(system, sent)
    assert {death for worker in crew for death in worker.deaths} == {"SIGKILL"}
    assert rescue.deaths == []


async def test_postgresql_stopped_under_updates_costs_none_of_them_and_no_delivery(
    mortal: System, postgres: PostgresServer
) -> None:
    mortal.stream = "SHADOW"
    worker = mortal.role("shadow")
    async with mortal.role("gateway").supervised(), worker.supervised():
        async with load(
            mortal.gateway_url, mortal.tokens, seed=1, pause_s_max=PAUSE_S_MAX, kind="shadow", body_of=body_of
        ) as sent:
            async with stopped(postgres):
                before = len(sent.acknowledged)

                async def waits_while_updates_are_accepted() -> bool:
                    return "shadow" in await worker.waiting_for() and len(sent.acknowledged) > before + 50

                await eventually(waits_while_updates_are_accepted, "it waits, and says so, while updates are accepted")

            async def is_ready() -> bool:
                return not await worker.waiting_for()

            await eventually(is_ready, "the worker is ready again")
        await applied_exactly(mortal, sent)
    assert worker.deaths == []
    assert await mortal.redeliveries("SHADOW", "shadow-workers") == 0
