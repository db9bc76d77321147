"""Fixtures of the chaos tests.

system      nats-server, the session's PostgreSQL, topology with a short ack wait, devices
gateway     its gateway, running; the URL
postgres    a PostgreSQL that may be killed
mortal      a system on that PostgreSQL, with the ack wait of 30 s as shipped
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from chaos.system import System, declared
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.topology.declared import load

PostgresServerFactory = Callable[..., PostgresServer]


@pytest.fixture
async def system(nats: NatsServer, database: str, scratch: Path) -> System:
    """A system of which nothing runs yet but its servers; PostgreSQL is the session's and must be left alone."""
    made = System(nats=nats, database_url=database, folder=scratch, topology=declared())
    await made.prepare()
    return made


@pytest.fixture
async def gateway(system: System) -> AsyncIterator[str]:
    """A gateway that runs for the whole test; the URL."""
    async with system.role("gateway").supervised():
        yield system.gateway_url


@pytest.fixture
async def postgres(postgres_server_factory: PostgresServerFactory) -> PostgresServer:
    """A PostgreSQL of the test's own, which it may kill."""
    server = postgres_server_factory()
    await asyncio.to_thread(server.start)
    return server


@pytest.fixture
async def mortal(nats: NatsServer, postgres: PostgresServer, scratch: Path) -> System:
    """As `system`, but with a PostgreSQL that may be killed, and the ack wait as it is shipped."""
    made = System(nats=nats, database_url=postgres.url, folder=scratch, topology=load())
    await made.prepare()
    return made
