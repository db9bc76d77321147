"""Two hundred destinations of which many misbehave, as real servers, and the delivery role as a real process."""

from __future__ import annotations

import itertools
from collections import Counter

from chaos.system import System, eventually
from deliveries import (
    HOST,
    OK,
    SETTINGS,
    Destination,
    Request,
    add_routes,
    answer,
    are_gone,
    destinations,
    job_of,
    letters,
    publish_jobs,
)
from pulse.adapters.embedded import ports
from pulse.adapters.nats.connection import connection
from pulse.domain.errors import Reason
from pulse.domain.route import DestinationSpec, Webhook

HEALTHY, HANGING, REFUSING, FAILING_TWICE, BUSY = 130, 20, 20, 20, 10
JOBS_HEALTHY, JOBS_OTHERS = 5, 2
HANG_S = 4.0
"""Of which a job that hangs has three, in which the healthy ones have to be through."""
RETRY_AFTER_S = 2


def well(_destination: Destination, _request: Request) -> bytes:
    return OK


def hangs(_destination: Destination, _request: Request) -> None:
    return None


def fails_twice(destination: Destination, _request: Request) -> bytes:
    return answer(500) if len(destination.requests) <= 2 else OK


def busy(_destination: Destination, _request: Request) -> bytes:
    return answer(429, f"Retry-After: {RETRY_AFTER_S}")


async def test_destinations_that_misbehave_stall_nobody_and_each_job_has_its_end(mortal: System) -> None:
    behaviours = [well] * HEALTHY + [hangs] * HANGING + [fails_twice] * FAILING_TWICE + [busy] * BUSY
    async with destinations(*behaviours) as made, connection(mortal.nats.url, name="test") as client:
        names = [
            *[f"well-{number}" for number in range(HEALTHY)],
            *[f"hangs-{number}" for number in range(HANGING)],
            *[f"fails-{number}" for number in range(FAILING_TWICE)],
            *[f"busy-{number}" for number in range(BUSY)],
        ]
        by_name = dict(zip(names, made, strict=True))
        targets: dict[str, DestinationSpec | str] = {
            name: Webhook(url=each.url, timeout_s=HANG_S if name.startswith("hangs") else 15.0)
            for name, each in by_name.items()
        }
        targets |= {f"refuses-{number}": f"http://{HOST}:{ports.free_port()}/" for number in range(REFUSING)}
        await add_routes(mortal.database_url, targets)
        jobs = [
            (1 + position, name)
            for position in range(JOBS_HEALTHY)
            for name in targets
            if position < JOBS_OTHERS or name.startswith("well")
        ]
        async with mortal.role("delivery", **SETTINGS).supervised() as role:
            ids = await publish_jobs(client, jobs)

            async def healthy_have_all() -> bool:
                return all(len(by_name[name].delivered) == JOBS_HEALTHY for name in names if name.startswith("well"))

            await eventually(healthy_have_all, "the healthy destinations have all their jobs")
            # None of those that hang had its three attempts by then: nobody has waited for them.
            dead = [job_of(letter) for letter in await letters(client)]
            assert not [each for each in dead if each.partition(":")[2].startswith("hangs")]

            await eventually(lambda: are_gone(client), "each job has its end")
            assert role.deaths == []
        dead_as = {job_of(letter): letter.reason for letter in await letters(client)}
    delivered = sum((each.delivered for each in made), Counter[str]())
    assert set(delivered) | set(dead_as) == set(ids)
    assert not set(delivered) & set(dead_as)
    assert set(delivered.values()) == {1}
    kinds = {kind: {each for each in ids if f":{kind}-" in each} for kind in ("hangs", "refuses", "busy")}
    assert set(dead_as) == kinds["hangs"] | kinds["refuses"] | kinds["busy"]
    assert set(dead_as.values()) == {Reason.DELIVERY_ATTEMPTS}
    for name, destination in by_name.items():
        if name.startswith("busy"):
            assert_nobody_came_early(destination)


def assert_nobody_came_early(destination: Destination) -> None:
    """Each job came three times, and no sooner than the answer before allowed."""
    for webhook_id in {each.webhook_id for each in destination.requests}:
        times = [each.at for each in destination.requests if each.webhook_id == webhook_id]
        assert len(times) == 3
        # The worker counts from when it has the answer, we from when the request came: a little less may be seen.
        assert all(after - before > RETRY_AFTER_S - 0.05 for before, after in itertools.pairwise(times))
