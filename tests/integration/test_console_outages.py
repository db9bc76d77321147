"""With NATS or PostgreSQL down, the console loads for whoever was signed in, and says what is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from chaos.load import TENANT
from chaos.system import System, eventually, freeze
from conftest import PostgresServerFactory
from console import BROWSER, PASSWORD, TOKEN, Site, console, pages
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.postgres.access import KeyStore
from pulse.adapters.postgres.pool import open_pool
from pulse.topology.declared import load

ANSWER_S_MAX = 14.0
"""Of a page while something is frozen: below the time limit of one statement, so that nobody has waited for that."""


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


async def test_with_everything_killed_every_page_loads_says_so_and_is_back_when_it_is(
    site: Site, postgres: PostgresServer, nats: NatsServer
) -> None:
    before = {path: (await site.get(path)).status_code for path in pages()}
    postgres.kill()
    nats.kill()
    site.systems["postgresql"].down("no connection")
    site.systems["nats"].down("the connection to NATS is lost")
    for path in pages():
        answer = await site.get(path)
        assert answer.status_code in {200, 503}, path
        if "<!doctype html>" in answer.text:
            assert answer.text.count("is away</b> since <time") == 2, path
        assert answer.status_code == 200 or "is away" in answer.text, path
    postgres.start()
    nats.start()

    async def as_before() -> bool:
        return {path: (await site.get(path)).status_code for path in pages()} == before

    await eventually(as_before, "every page is as it was")


@asynccontextmanager
async def served(system: System, database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """`pulse serve ui` as a process, and a browser in which an operator is signed in."""
    await system.prepare()
    async with open_pool(database_url, size_max=1, timeout_s=10, application_name="test") as pool:
        _, key = await KeyStore(pool).add(name="operator", tenant_id=None)
    port = ports.free_port()
    role = system.role("ui", PULSE_UI_PORT=str(port))
    await role.start()
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(
            base_url=url, headers=BROWSER, timeout=ANSWER_S_MAX, trust_env=False, limits=httpx.Limits()
        ) as client:
            found = TOKEN.search((await client.get("/sign-in")).text)
            assert found
            form = {"form_token": found[1], "key": key}
            assert (await client.post("/sign-in", data=form, headers={"origin": url})).status_code == 303
            yield client
    finally:
        role.kill()


async def all_of(client: httpx.AsyncClient, paths: Sequence[str]) -> dict[str, httpx.Response]:
    """Asked for at the same moment."""
    answers = await asyncio.gather(*(client.get(path) for path in paths))
    return dict(zip(paths, answers, strict=True))


@pytest.mark.parametrize("what", ["postgresql", "nats"])
async def test_with_a_frozen_server_no_page_hangs_and_all_come_back_by_themselves(
    postgres: PostgresServer, nats: NatsServer, tmp_path: Path, what: str
) -> None:
    system = System(nats=nats, database_url=postgres.url, folder=tmp_path, topology=load(stream_replicas=1), devices=1)
    paths = [path.replace("acme", TENANT) for path in pages()]
    server: PostgresServer | NatsServer = postgres if what == "postgresql" else nats
    async with served(system, postgres.url) as client:
        before = {path: answer.status_code for path, answer in (await all_of(client, paths)).items()}
        assert before["/"] == before["/devices"] == before["/streams"] == 200
        assert server.pid is not None
        thaw = freeze(server.pid)
        try:
            for path, answer in (await all_of(client, paths)).items():
                assert answer.status_code in {before[path], 503}, path

            async def said() -> bool:
                return "is away</b> since <time" in (await client.get("/")).text

            await eventually(said, "home says what is away, and since when")
            for path, answer in (await all_of(client, paths)).items():
                assert answer.status_code in {before[path], 503}, path
                assert "is away" in answer.text or "<!doctype" not in answer.text, path
        finally:
            thaw()

        async def as_before() -> bool:
            return {path: answer.status_code for path, answer in (await all_of(client, paths)).items()} == before

        await eventually(as_before, "every page is as it was")
