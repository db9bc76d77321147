"""kill -9 of the ingest worker at each step between fetch and ack, under load: P1, P2 and P3 hold (P6)."""

from __future__ import annotations

import asyncio
import random

import pytest

from chaos.load import load
from chaos.system import SEEDS, System

pytestmark = pytest.mark.chaos

STEPS = (
    "ingest.fetched",
    "ingest.decoded",
    "ingest.ledger_written",
    "ingest.rows_copied",
    "ingest.before_commit",
    "ingest.committed",
    "ingest.acked",
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", STEPS)
async def test_a_worker_killed_at_a_step_loses_and_doubles_nothing(
    system: System, gateway: str, step: str, seed: int
) -> None:
    arrival = random.Random(f"{step} {seed}").randint(1, 6)
    print(f"seed {seed}: SIGKILL at arrival {arrival} of {step}")  # noqa: T201 - shown where it fails
    worker = system.role("ingest")
    async with worker.supervised(PULSE_CRASH_AT=f"{step}:{arrival}"), system.audited():
        async with load(gateway, system.tokens, seed=seed) as sent:
            await worker.died(1)
            await asyncio.sleep(0.5)
        await system.stored_exactly(sent)
    assert worker.deaths == ["SIGKILL"]
