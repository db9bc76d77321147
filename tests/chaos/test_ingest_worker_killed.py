"""kill -9 of ingest workers at each step between fetch and ack, under load: P1, P2 and P3 hold (P6)."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from chaos.load import load
from chaos.system import SEEDS, SOURCE, System, eventually

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

DEATHS_S_MAX = 120.0
"""Ten starts of a process, one after the other, on a machine that does other things as well."""

PAUSE_S_MAX = 0.2
"""About 150 readings a second: seven starts of a worker take their time, and the load is bounded."""


LOOPED = ("ingest", "shadow", "commands")
"""Roles whose worker is a BatchLoop, which names its steps after them."""


def steps_of(role: str) -> list[str]:
    """Every step of `role` that the code names by a probe, wherever it does."""
    probe = re.compile(rf'_probe\("({role}\.[^"]+)"\)')
    steps = {step for path in SOURCE.rglob("*.py") for step in probe.findall(path.read_text("utf-8"))}
    if role in LOOPED:
        loop = (SOURCE / "pulse" / "services" / "batches.py").read_text("utf-8")
        steps |= {f"{role}.{step}" for step in re.findall(r'_probe\(f"\{self\._name\}\.([^"]+)"\)', loop)}
    return sorted(steps)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("workers", [1, 2, 4])
async def test_workers_killed_at_every_step_lose_and_double_nothing(
    system: System, gateway: str, workers: int, seed: int
) -> None:
    """Each start of a worker is armed with the next step; a message that meets three of them is the rescue's."""
    chance = random.Random(f"{workers} {seed}")
    steps = [f"{step}:{chance.randint(1, 4)}" for step in steps_of("ingest")]
    assert len(steps) >= 10, steps
    chance.shuffle(steps)
    print(f"seed {seed}, {workers} workers: SIGKILL at {steps}")  # noqa: T201 - shown where it fails
    crew = [system.role(f"ingest-{number}") for number in range(workers)]
    rescue = system.role("rescue")
    armed: Iterator[str] = iter(steps)

    async def all_steps_were_met() -> bool:
        return sum(len(worker.deaths) for worker in crew) == len(steps)

    async with AsyncExitStack() as running:
        await running.enter_async_context(rescue.supervised())
        for worker in crew:
            await running.enter_async_context(worker.supervised(armed))
        await running.enter_async_context(system.audited())
        async with load(gateway, system.tokens, seed=seed, pause_s_max=PAUSE_S_MAX) as sent:
            await eventually(all_steps_were_met, f"each of {steps} has killed a worker", limit_s=DEATHS_S_MAX)
            await asyncio.sleep(0.3)
        await system.stored_exactly(sent)
    assert {death for worker in crew for death in worker.deaths} == {"SIGKILL"}
    assert rescue.deaths == []
