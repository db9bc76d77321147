"""kill -9 of workers at every step of writing device states: no device is left with what it said before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from chaos.load import load
from chaos.system import SEEDS, System, eventually
from chaos.test_ingest_worker_killed import steps_of

pytestmark = pytest.mark.chaos

PAUSE_S_MAX = 0.1
STEPS = [*steps_of("services/device_state.py") * 2, "ingest.committed", "ingest.acked"]

# A reading of the load says `reading` alone and no time, so its time is when the edge received it.
BEHIND = """
    SELECT newest.device_id, newest.reading, state.latest, state.last_seen, newest.ts
    FROM (
        SELECT DISTINCT ON (tenant_id, device_id) tenant_id, device_id, metrics->>'reading' AS reading, ts, position
        FROM telemetry ORDER BY tenant_id, device_id, ts DESC, position DESC
    ) AS newest
    LEFT JOIN device_state AS state USING (tenant_id, device_id)
    WHERE state.latest->'reading'->>0 IS DISTINCT FROM newest.reading
       OR (state.latest->'reading'->>2)::bigint IS DISTINCT FROM newest.position
       OR state.last_seen IS DISTINCT FROM newest.ts
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("workers", [1, 2])
async def test_devices_that_fall_silent_when_their_worker_dies_have_their_last_word_written(
    system: System, gateway: str, workers: int, seed: int
) -> None:
    chance = random.Random(f"{workers} {seed}")
    steps = [f"{step}:{chance.randint(2, 4)}" for step in STEPS]
    chance.shuffle(steps)
    print(f"seed {seed}, {workers} workers: SIGKILL at {steps}")  # noqa: T201 - shown where it fails
    crew = [system.role(f"ingest-{number}") for number in range(workers)]
    armed: Iterator[str] = iter(steps)

    async def deaths(count: int) -> bool:
        return sum(len(worker.deaths) for worker in crew) >= count

    async def nothing_is_behind() -> bool:
        return not await system.fetch(BEHIND)

    async with AsyncExitStack() as running:
        await running.enter_async_context(system.role("rescue").supervised())
        for worker in crew:
            await running.enter_async_context(worker.supervised(armed))
        for times in range(1, len(steps) + 1):
            # The load ends with the death: nobody says anything more that would mend what the dead one knew.
            async with load(gateway, system.tokens, seed=seed, name=f"n{times}", pause_s_max=PAUSE_S_MAX):
                await eventually(lambda times=times: deaths(times), f"death {times}")  # type: ignore[misc]
            await eventually(nothing_is_behind, f"all states are as the rows say after death {times}")
    assert {death for worker in crew for death in worker.deaths} == {"SIGKILL"}
    assert await system.fetch("SELECT FROM device_state")
