"""kill -9 of the rescue at each of its steps: what ran out of deliveries is stored once, or dead once (P6)."""

from __future__ import annotations

import random

import pytest

from chaos.system import SEEDS, System, eventually
from chaos.test_ingest_worker_killed import steps_of
from dead_letter_bench import bench, envelope, topology

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400), pytest.mark.parametrize("seed", SEEDS)]

GOOD, POISON, JOBS = 20, 3, 3
OF_JOBS = ("rescue.before_commit", "rescue.committed")
"""Steps that only a message meets which nobody but its worker can process."""
ACK_WAIT_S = 8.0
"""Longer than a life of the rescue needs to begin: else each of them meets the message of the one before."""
SETTLE_S_MAX = 100.0


async def test_a_rescue_killed_at_every_step_loses_and_doubles_nothing(system: System, seed: int) -> None:
    chance = random.Random(seed)
    steps = [f"{step}:{chance.randint(1, 3)}" for step in steps_of("rescue") if step not in OF_JOBS]
    chance.shuffle(steps)
    # Last, as the jobs stand behind the telemetry: a life that gets there leaves nothing for the other steps.
    steps += [f"{step}:1" for step in OF_JOBS]
    print(f"seed {seed}: SIGKILL at {steps}")  # noqa: T201 - shown where it fails
    async with bench(system.nats.url, system.database_url) as made:
        await made.publish(*(envelope() for _ in range(GOOD)), *(b"poison" for _ in range(POISON)))
        await made.publish(*(b'{"route":7}' for _ in range(JOBS)), subject="routes.t1")
        await made.exhaust(count=GOOD + POISON)
        await made.exhaust(stream="ROUTES", consumer="route-delivery", count=JOBS)
        await made.apply(topology(ack_wait_s=ACK_WAIT_S))
        rescue = system.role("rescue")
        async with rescue.supervised(iter(steps)):
            await rescue.died(len(steps), limit_s=SETTLE_S_MAX)
            await eventually(made.nothing_to_rescue, "DEAD_LETTERS is empty", limit_s=SETTLE_S_MAX)
        assert await made.stored() == list(range(1, GOOD + 1))
        letters = await made.dead()
        audit = await made.audit()
    assert [(letter["stream"], letter["reason"]) for letter in sorted(letters, key=lambda each: each["position"])] == [
        *[("TELEMETRY", "invalid_envelope")] * POISON,
        *[("ROUTES", "max_deliveries")] * JOBS,
    ]
    assert (audit.stored, audit.dead, audit.in_flight, audit.expired) == (GOOD, POISON, 0, 0)
    assert set(rescue.deaths) == {"SIGKILL"}
