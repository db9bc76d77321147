"""Fixtures of the chaos tests.

    system    nats-server, PostgreSQL, topology, devices and a running gateway
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from chaos.system import System, declared
from pulse.adapters.embedded.nats_server import NatsServer


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
