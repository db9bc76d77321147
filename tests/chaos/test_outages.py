"""Outages are no failures (P5): whatever is wrong with PostgreSQL, every reading is accepted, none is dead.

Straight and through PgBouncer: no attempt but the first is spent on it, `/readyz` says what is waited for and why,
and the backlog drains by itself.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from chaos import outages
from chaos.load import DEVICES, load
from chaos.pgbouncer import PgBouncer, pgbouncer
from chaos.system import SEEDS, Role, System, eventually, freeze
from conftest import PostgresServerFactory
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.topology.declared import load as load_declared

pytestmark = [pytest.mark.chaos, pytest.mark.parametrize("seed", SEEDS)]

AWAY_S = 2.0
STOP_S_MAX = 20.0
"""Its drain of 4 s, 1 s to be cancelled, 2 s for the connections, and room for a busy machine; frozen is for ever."""
Outage = Callable[[PostgresServer], AbstractAsyncContextManager[None]]
OutageBehind = Callable[[PgBouncer], AbstractAsyncContextManager[None]]


async def by_readiness(worker: Role, says: str) -> bool:
    """`/readyz` of the worker names PostgreSQL and why, in words that match `says`."""
    said = await worker.waiting_for()
    return any("postgresql" in f"{check}: {why}" and re.search(says, why) for check, why in said.items())


async def by_log(worker: Role, says: str) -> bool:
    """The worker has logged why it waited; for what is over before anybody can ask."""
    return says in worker.output


async def endures(
    system: System,
    outage: AbstractAsyncContextManager[None],
    told: Callable[[Role, str], Awaitable[bool]] = by_readiness,
    /,
    *,
    says: str,
    seed: int,
    **variables: str,
) -> None:
    """Run gateway and worker through `outage`, of which the worker has to tell what it `says`."""
    worker = system.role("ingest", **{"PULSE_DATABASE_TIMEOUT_S": "1", **variables})

    async def waiting() -> bool:
        return await told(worker, says)

    async def ready() -> bool:
        return await worker.waiting_for() == {}

    async with system.role("gateway").supervised(), worker.supervised(), system.audited():
        async with load(system.gateway_url, system.tokens, seed=seed) as sent:
            await asyncio.sleep(0.5)
            async with outage:
                before = len(sent.acknowledged)
                await eventually(waiting, f"the worker says {says!r}", limit_s=45)
                await asyncio.sleep(AWAY_S)
                accepted = len(sent.acknowledged) - before
            await asyncio.sleep(0.3)
        await system.stored_exactly(sent)
        await eventually(ready, "the worker is ready again")
    assert accepted > DEVICES, "the gateway stood still with PostgreSQL"
    assert sent.retries == 0, sent.refused
    assert worker.deaths == []
    delivered, deliveries = await system.deliveries()
    assert delivered == deliveries, "an attempt was spent on an outage"


@pytest.mark.parametrize(
    ("outage", "says"),
    [
        (outages.stopped, "connection refused"),
        (outages.frozen, "no answer in time"),
        (outages.read_only, "read-only transaction"),
        (outages.no_connection_left, "remaining connection slots"),
        (outages.role_out_of_connections, "too many connections for role"),
    ],
)
async def test_while_postgresql_is_away_all_is_accepted_and_on_its_return_all_is_stored(
    mortal: System, postgres: PostgresServer, outage: Outage, says: str, seed: int
) -> None:
    await endures(mortal, outage(postgres), says=says, seed=seed)


async def test_a_deadlock_is_waited_out(mortal: System, postgres: PostgresServer, seed: int) -> None:
    says, deadlocked = "deadlock detected", outages.deadlocked(postgres)
    await endures(mortal, deadlocked, by_log, says=says, seed=seed, PULSE_DATABASE_TIMEOUT_S="10")


@pytest.fixture
def small_disk(scratch: Path) -> Iterator[Path]:
    """A file system of its own that a test may fill."""
    with outages.small_disk(scratch / "small disk") as folder:
        yield folder


@pytest.fixture
async def cramped_postgres(small_disk: Path, postgres_server_factory: PostgresServerFactory) -> PostgresServer:
    """A PostgreSQL on it."""
    server = postgres_server_factory(small_disk / "postgres", log_dir=small_disk.parent)
    await asyncio.to_thread(server.start)
    return server


@pytest.fixture
async def cramped(nats: NatsServer, cramped_postgres: PostgresServer, scratch: Path) -> System:
    """A system on that."""
    made = System(nats=nats, database_url=cramped_postgres.url, folder=scratch, topology=load_declared())
    await made.prepare()
    return made


@pytest.mark.parametrize(
    ("outage", "says"),
    [(outages.data_disk_full, "No space left on device"), (outages.log_disk_full, "connection refused")],
)
async def test_a_full_disk_is_waited_out(
    cramped: System, cramped_postgres: PostgresServer, outage: Outage, says: str, seed: int
) -> None:
    await endures(cramped, outage(cramped_postgres), says=says, seed=seed)


@pytest.fixture
async def bouncer(postgres: PostgresServer, scratch: Path) -> AsyncIterator[PgBouncer]:
    """A PgBouncer in front of it."""
    with pgbouncer(postgres, log_folder=scratch) as made:
        yield made


@pytest.mark.parametrize(
    ("outage", "says"),
    [
        (outages.bouncer_stopped, "connection refused"),
        (outages.postgres_stopped_behind, "server login has been failing"),
        (outages.pool_taken, "query_wait_timeout"),
        (outages.no_client_connection_left, "no more connections allowed"),
        (outages.login_failing, "server login has been failing|password authentication failed"),
    ],
)
async def test_behind_pgbouncer_too(
    mortal: System, bouncer: PgBouncer, outage: OutageBehind, says: str, seed: int
) -> None:
    through = {"DATABASE_URL": bouncer.url, "PULSE_DATABASE_TIMEOUT_S": "3"}
    await endures(mortal, outage(bouncer), says=says, seed=seed, **through)


async def test_a_worker_that_is_stopped_while_postgresql_is_frozen_ends_in_time(
    mortal: System, postgres: PostgresServer, seed: int
) -> None:
    worker = mortal.role("ingest")
    await worker.start()
    assert postgres.pid is not None
    async with mortal.role("gateway").supervised():
        async with load(mortal.gateway_url, mortal.tokens, seed=seed):
            await asyncio.sleep(0.3)
            thaw = freeze(postgres.pid)
            await asyncio.sleep(0.3)
        try:
            before = time.monotonic()
            exit_code = await worker.stop(limit_s=STOP_S_MAX * 2)
            took_s = time.monotonic() - before
        finally:
            thaw()
            worker.kill()
    assert exit_code in (0, -signal.SIGKILL), "drained, or cut off by itself"
    assert took_s < STOP_S_MAX, "whoever stops it would have killed it"
