"""With NATS or PostgreSQL down, the console loads for whoever was signed in, and says what is away."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from conftest import PostgresServerFactory
from console import PASSWORD, Site, console
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer


@pytest.fixture
def postgres(postgres_server_factory: PostgresServerFactory) -> PostgresServer:
    """A server of the test's own."""
    server: PostgresServer = postgres_server_factory()
    server.start()
    return server


@pytest.fixture
async def site(postgres: PostgresServer, nats: NatsServer) -> AsyncIterator[Site]:
    """A browser with the operator signed in, and a first picture."""
    async with console(postgres.url, nats) as made:
        await made.sign_in(made.operator)
        await made.pipeline.look()
        yield made


async def test_without_postgresql_whoever_is_signed_in_sees_what_is_away_and_since_when(
    site: Site, postgres: PostgresServer
) -> None:
    postgres.kill()
    site.systems["postgresql"].down("no connection")
    await site.pipeline.look()
    home = await site.get("/")
    assert home.status_code == 200
    assert "PostgreSQL is away</b> since <time" in home.text
    assert "<h1>Pipeline</h1>" in home.text
    devices = await site.get("/devices")
    assert devices.status_code == 503
    assert "PostgreSQL is away" in devices.text
    assert int(devices.headers["retry-after"]) >= 1
    assert (await site.get("/streams")).status_code == 200
    assert (await site.get("/live")).status_code == 503


async def test_without_postgresql_the_page_for_signing_in_loads_and_says_why_nobody_can(
    site: Site, postgres: PostgresServer
) -> None:
    postgres.kill()
    site.systems["postgresql"].down("no connection")
    stranger = site.another()
    assert (await stranger.get("/sign-in")).status_code == 200
    answer = await stranger.post("/sign-in", {"account": "ada", "password": PASSWORD})
    assert answer.status_code == 503
    assert "postgresql is away" in answer.text


async def test_a_session_holds_through_an_outage_and_a_cookie_that_was_never_one_does_not(
    site: Site, postgres: PostgresServer
) -> None:
    postgres.kill()
    forger = site.another()
    forger.client.cookies.set("pulse", "x" * 43)
    assert (await forger.get("/")).status_code == 503
    assert (await site.get("/")).status_code == 200
    postgres.start()
    assert (await forger.get("/")).status_code == 303


async def test_without_nats_devices_load_and_streams_say_why_not(site: Site, nats: NatsServer) -> None:
    nats.kill()
    site.systems["nats"].down("the connection to NATS is lost")
    await site.pipeline.look()
    home = await site.get("/")
    assert home.status_code == 200
    assert "NATS is away</b> since <time" in home.text
    assert (await site.get("/devices")).status_code == 200
    assert (await site.get("/devices/acme/boiler")).status_code == 200
    streams = await site.get("/streams")
    assert streams.status_code == 503
    assert "NATS is away" in streams.text


async def test_a_change_that_the_edge_cannot_be_told_of_is_made_and_says_so(site: Site, nats: NatsServer) -> None:
    nats.kill()
    await site.get("/devices/add")
    made = await site.post("/devices/add", {"tenant_id": "acme", "device_id": "new"})
    assert made.status_code == 200
    assert "could not be told yet" in made.text
