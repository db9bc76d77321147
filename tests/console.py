"""The console in this process, over a real PostgreSQL and a real nats-server, as a browser without scripts uses it.

async with console(database, nats) as site:
    await site.sign_in(site.operator)
    page = await site.get("/devices")
    await site.post("/devices/add", {"tenant_id": "acme", …})       with the form token of that page
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
import msgspec
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry

from control_api import control_api
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.stream_status import StreamStatusReader
from pulse.adapters.passwords import Argon2Passwords
from pulse.adapters.postgres.console import AccountStore
from pulse.adapters.postgres.pool import Pool
from pulse.domain.query import QueryBounds
from pulse.runtime.health import Dependency
from pulse.runtime.settings import Settings
from pulse.services.control import Control
from pulse.services.pipeline import Pipeline
from pulse.topology.declared import load
from pulse.ui.application import MODULES
from pulse.wiring.cli import auditor_on
from pulse.wiring.console import console_on
from pulse.wiring.process import Process
from pulse.wiring.routes import AskedTrials, dry_runs_of
from pulse.wiring.ui import RegistryEdge, open_reach_on

PASSWORD = "correct horse battery"
TOKEN = re.compile(r'name="form_token" value="([^"]*)"')
ORIGIN = "http://pulse"
BROWSER = {"accept": "text/html"}
FILLED = {
    "tenant_id": "acme",
    "device_id": "boiler",
    "stream": "TELEMETRY",
    "route_id": "hook",
    "command_id": "00000000000000000000000000",
    "letter_id": "1",
}
"""What stands in the place of a parameter of a path; a page with another one needs a line here."""
ASKED = {"/devices/{tenant_id}/{device_id}/series": "?metric=t"}
"""What a page cannot do without."""


def addresses(method: str, *, tenant: str = "acme") -> list[str]:
    """Where the console listens for `method`, whatever modules it has; `tenant` in the place of a tenant."""
    filled = {**FILLED, "tenant_id": tenant}
    return [
        route.path.format(**filled) + ASKED.get(route.path, "")
        for module in MODULES
        for route in module.router.routes
        if isinstance(route, APIRoute) and method in (route.methods or ())
    ]


def pages() -> list[str]:
    """All that a browser asks for, but for the streams of events and what is for whoever is not signed in."""
    return [path for path in addresses("GET") if path != "/events" and not path.startswith("/sign-in")]


@dataclass(kw_only=True)
class Site:
    """One browser, and the keys by what they reach."""

    client: httpx.AsyncClient
    transport: httpx.ASGITransport
    pool: Pool
    nats: PulseClient
    pipeline: Pipeline
    systems: Mapping[str, Dependency]
    operator: str
    acme: str
    acme_reader: str
    other: str
    token: str = ""

    async def get(self, path: str, **options: Mapping[str, str]) -> httpx.Response:
        """A page; remembers its form token."""
        answer = await self.client.get(path, **options)  # type: ignore[arg-type]
        return self._remembered(answer)

    async def post(self, path: str, fields: Mapping[str, str], *, token: str | None = None) -> httpx.Response:
        """A form with the token of the last page."""
        form = {"form_token": self.token if token is None else token, **fields}
        return self._remembered(await self.client.post(path, data=form, headers={"origin": ORIGIN}))

    async def sign_in(self, key: str) -> httpx.Response:
        """With an API key."""
        await self.get("/sign-in")
        answer = await self.post("/sign-in", {"key": key})
        assert answer.status_code == 303, answer.text
        await self.get(answer.headers["location"])
        return answer

    def another(self) -> Site:
        """Another browser."""
        client = httpx.AsyncClient(transport=self.transport, base_url=ORIGIN, headers=BROWSER)
        return Site(**{**vars(self), "client": client, "token": ""})

    def _remembered(self, answer: httpx.Response) -> httpx.Response:
        found = TOKEN.search(answer.text)
        self.token = found[1] if found else self.token
        return answer


@asynccontextmanager
async def console(database: str, nats: NatsServer, **settings: object) -> AsyncIterator[Site]:
    """The pages; accounts are `ada` (operator) and `tim` (tenant acme), whose password is PASSWORD."""
    async with control_api(database, nats) as api:
        checks = [Dependency("nats"), Dependency("postgresql")]
        for check in checks:
            check.up()
        process = Process(
            settings=msgspec.convert({"nats_url": nats.url, "database_url": database, **settings}, Settings),
            nats=api.nats,
            pool=api.pool,
            metrics=CollectorRegistry(),
            probe=lambda _: None,
            stack=AsyncExitStack(),
            checks=list(checks),
        )
        declared = load(stream_replicas=1)
        open_reach = open_reach_on(api.pool, process.settings, api.nats)
        control = Control(
            open_reach=open_reach,
            edge=RegistryEdge(api.nats, api.pool),
            auditor=auditor_on(api.nats, api.pool),
            streams=StreamStatusReader(api.nats, declared),
            dry_runs=process.stack.enter_context(dry_runs_of(process.settings)),
            trials=AskedTrials(api.nats),
        )
        bounds = QueryBounds(range_s_max=366 * 86_400, rows_max=10_000, buckets_max=10_000)
        app, pipeline = console_on(process, control=control, open_reach=open_reach, query=bounds, declared=declared)
        hashed = Argon2Passwords().hash(PASSWORD)
        accounts = AccountStore(api.pool)
        await accounts.add("ada", password_hash=hashed, tenant_id=None, read_only=False)
        await accounts.add("tim", password_hash=hashed, tenant_id="acme", read_only=False)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=ORIGIN, headers=BROWSER) as client:
            yield Site(
                client=client,
                transport=transport,
                pool=api.pool,
                nats=api.nats,
                pipeline=pipeline,
                systems={check.name: check for check in checks},
                operator=api.operator,
                acme=api.acme,
                acme_reader=api.acme_reader,
                other=api.other,
            )
