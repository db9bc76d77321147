"""A nats-server with streams and devices, and the gateway on it: as a service of this process, or as the real command.

PostgreSQL is nowhere: accepting a message needs NATS alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp

from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.process import ManagedProcess
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.pool import open_pool
from pulse.domain.identity import Device, Tenant, TokenDigest, digest
from pulse.domain.registry import Record, record_key
from pulse.runtime.lifecycle import run_services
from pulse.runtime.metrics import process_registry
from pulse.runtime.settings import Settings
from pulse.topology.declared import load
from pulse.wiring.gateway import gateway_services
from pulse.wiring.process import Process

SOURCE = Path(__file__).resolve().parents[1] / "src"
TOKEN = "pulse_token"
NOWHERE = "postgresql://pulse@127.0.0.1:1/pulse"
LIMIT_S = 30.0
START_S_MAX = 60.0
"""A process imports much before it answers, and others may be doing the same."""


async def prepare(client: PulseClient, tenants: Sequence[str] = ("acme",), *, devices: int = 3) -> None:
    """Streams, and devices `d0`, `d1`, … of each tenant, all with one token, straight into the registry bucket."""
    provisioner = Provisioner(client)
    declared = load()
    await provisioner.apply(declared, await provisioner.plan(declared))
    records: list[Record] = [Tenant(tenant, enabled=True) for tenant in tenants]
    records += [
        Device(tenant, f"d{number}", enabled=True, tokens=(TokenDigest(digest(TOKEN)),))
        for tenant in tenants
        for number in range(devices)
    ]
    await project(client, records)


async def project(client: PulseClient, records: Sequence[Record]) -> None:
    """Make these the entries of the registry bucket under their keys."""
    by_key = {record_key(record): record for record in records}

    async def known(keys: Sequence[str]) -> Mapping[str, Record]:
        return {key: by_key[key] for key in keys}

    await RegistryBucket(client).project(list(by_key), known)


@asynccontextmanager
async def serving(client: PulseClient, settings: Settings) -> AsyncIterator[str]:
    """The services of the role `gateway`, wired as shipped, in this process; its URL."""
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(open_pool(NOWHERE, size_max=1, timeout_s=1.0, application_name="test"))
        process = Process(
            settings=settings,
            nats=client,
            pool=pool,
            metrics=process_registry(role="gateway"),
            probe=lambda _: None,
            stack=stack,
        )
        own = await gateway_services(process)
        async with asyncio.timeout(4 * LIMIT_S), asyncio.TaskGroup() as group:
            group.create_task(run_services([*process.shared, *own], stop=stop, drain_s_max=4.0))
            url = f"http://127.0.0.1:{settings.gateway_port}"
            await answers(f"{url}/readyz")
            yield url
            stop.set()


async def answers(url: str, *, status: int = 200) -> None:
    """Return once `url` is answered with `status`."""
    async with asyncio.timeout(START_S_MAX), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url) as answer:
                    if answer.status == status:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.01)


class GatewayProcess:
    """`pulse serve gateway` on `nats`, with these settings by name."""

    def __init__(self, nats: NatsServer, folder: Path, **settings: object) -> None:
        self.port, self.health_port = ports.free_port(), ports.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / "gateway.log"
        kept = {key: value for key, value in os.environ.items() if key in {"PATH", "HOME", "LANG", "VIRTUAL_ENV"}}
        given = {"gateway_port": self.port, "health_port": self.health_port, "log_format": "json"} | settings
        self.process = ManagedProcess(
            "gateway",
            [sys.executable, "-m", "pulse", "serve", "gateway"],
            log_path=self.log_path,
            ready=lambda: True,
            environment=kept
            | {"PYTHONPATH": str(SOURCE), "NATS_URL": nats.url, "DATABASE_URL": NOWHERE}
            | {f"PULSE_{name.upper()}": str(value) for name, value in given.items()},
            working_directory=folder,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[GatewayProcess]:
        """Ready at the beginning, gone at the end."""
        await asyncio.to_thread(self.process.start)
        try:
            await answers(f"{self.url}/readyz")
            yield self
        finally:
            await asyncio.to_thread(self.process.stop, 30.0)
            sys.stdout.write(f"\n--- the gateway said last:\n{self.log_path.read_text('utf-8')[-8000:]}\n")


@asynccontextmanager
async def prepared(
    nats: NatsServer, tenants: Sequence[str] = ("acme",), *, devices: int = 3
) -> AsyncIterator[PulseClient]:
    """A client of `nats`, where everything is prepared."""
    async with connection(nats.url, name="test") as client:
        await prepare(client, tenants, devices=devices)
        yield client
