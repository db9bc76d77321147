"""Pulse as real processes that a test may kill: nats-server, PostgreSQL, gateways and ingest workers; and the oracle.

The oracle is always the same: each reading that was answered 202 is stored exactly once, at the position that its
answer named, nothing else is stored, and the audit never counted a message twice in between.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import msgspec
import psutil  # type: ignore[import-untyped]

from chaos.load import DEVICES, TENANT
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.process import ManagedProcess
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import open_connection, open_pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.domain.audit import StreamAudit
from pulse.domain.errors import Outage
from pulse.domain.identity import NewDevice
from pulse.domain.ledger import SEQUENCE_BITS, SEQUENCE_MAX
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.registry import device_key, tenant_key
from pulse.runtime.settings import Settings
from pulse.topology.declared import Declared
from pulse.topology.declared import load as load_declared
from pulse.wiring.cli import open_auditor
from pulse.wiring.streams import INGEST_WORKERS, TELEMETRY

SOURCE = Path(__file__).resolve().parents[2] / "src"
ROUNDS = int(os.environ.get("PULSE_CHAOS_ROUNDS", "1"))
SEED = int(os.environ.get("PULSE_CHAOS_SEED", "1"))
SEEDS = range(SEED, SEED + ROUNDS)
"""One round by default; `PULSE_CHAOS_ROUNDS=20 PULSE_CHAOS_SEED=7` for a long run from another seed."""
ACK_WAIT_S = 2.0
"""In place of the declared 30 s, so that a redelivery does not take the whole test."""
DRAIN_S_MAX = 75.0
"""Of which an ack wait as shipped takes 30 s."""
READY_S_MAX = 60.0
AUDIT_PAUSE_S_MAX = 0.2
TIMEOUT_S = 30.0
PORT_TRIES = 3
"""Others look for a free port at the same moment."""
EXIT_CONFIGURATION = 2
LOG_CHARACTERS_SHOWN = 12_000


def declared(*, ack_wait_s: float = ACK_WAIT_S) -> Declared:
    """The topology as it is shipped, but for the ack wait."""
    shipped = load_declared()
    consumers = tuple(
        msgspec.structs.replace(each.config, ack_wait=int(ack_wait_s * 1e9)) for each in shipped.consumers
    )
    return Declared(
        streams=shipped.streams,
        consumers=tuple(
            type(each)(stream=each.stream, config=config)
            for each, config in zip(shipped.consumers, consumers, strict=True)
        ),
    )


async def eventually(holds: Callable[[], Awaitable[bool]], what: str, *, limit_s: float = DRAIN_S_MAX) -> None:
    """Return once `holds` says so; fail, saying `what`, after `limit_s`."""
    try:
        async with asyncio.timeout(limit_s):
            while not await holds():  # noqa: ASYNC110 - what is waited for is in other processes
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {limit_s} s: {what}") from None


class Role:
    """One `pulse serve ROLE`; `supervised` starts it again whenever it dies, as `pulse up` would."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.deaths: list[str] = []
        self.health_url = ""
        self._folder = folder
        self._environment = dict(environment)
        self._process: ManagedProcess | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """What all its lives have logged."""
        path = self._folder / f"{self.name}.log"
        return path.read_text("utf-8") if path.exists() else ""

    async def waiting_for(self) -> dict[str, str]:
        """What `/readyz` says that it waits for, by check; empty where it is ready."""
        checks = await asyncio.to_thread(_readiness, self.health_url)
        return {name: check["waiting_for"] for name, check in checks.items() if not check["ok"]}

    async def start(self, **variables: str) -> None:
        """Start it and return when it is ready; it may also have died by then, which is told in `deaths` later."""
        for tries_left in reversed(range(PORT_TRIES)):
            process = self._process = self._with_port_of_its_own(variables)
            try:
                await asyncio.to_thread(process.start)
            except Outage:
                taken = process.returncode == EXIT_CONFIGURATION and tries_left
                if process.returncode != -signal.SIGKILL and not taken:
                    raise
                if taken:
                    continue
            return

    def _with_port_of_its_own(self, variables: Mapping[str, str]) -> ManagedProcess:
        health_port = ports.free_port()
        self.health_url = f"http://127.0.0.1:{health_port}"
        url = f"{self.health_url}/readyz"
        return ManagedProcess(
            self.name,
            [sys.executable, "-m", "pulse", "serve", self.name.partition("-")[0]],
            log_path=self._folder / f"{self.name}.log",
            ready=lambda: _answers(url),
            ready_s_max=READY_S_MAX,
            environment={**self._environment, "PULSE_HEALTH_PORT": str(health_port), **variables},
            working_directory=self._folder,
        )

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()

    async def stop(self, limit_s: float = 30.0) -> int | None:
        """SIGTERM; returns its exit code."""
        assert self._process is not None
        await asyncio.to_thread(self._process.stop, limit_s)
        return self._process.returncode

    async def died(self, times: int, *, limit_s: float = DRAIN_S_MAX) -> None:
        """Return once it has died so often under supervision."""

        async def enough() -> bool:
            return len(self.deaths) >= times

        await eventually(enough, f"{self.name} died {times} times", limit_s=limit_s)

    @asynccontextmanager
    async def supervised(self, crash_at: Iterator[str] | None = None) -> AsyncIterator[Role]:
        """Run it, each life armed with the next of `crash_at`; at the end it is killed; `deaths` tells."""
        crash_at = crash_at or iter(())
        await self.start(PULSE_CRASH_AT=next(crash_at, ""))
        keeper = asyncio.create_task(self._keep(crash_at), name=f"keeper of {self.name}")
        try:
            yield self
        finally:
            keeper.cancel()
            await asyncio.wait([keeper])
            self.kill()
            if self.deaths or "PYTEST_CURRENT_TEST" in os.environ:  # a benchmark has nothing to say of one that lived
                said = [line for line in self.output.splitlines(keepends=True) if '"settings"' not in line]
                sys.stdout.write(f"\n--- {self.name} died of {self.deaths}; said last:\n")
                sys.stdout.write("".join(said)[-LOG_CHARACTERS_SHOWN:])
            if not keeper.cancelled():
                keeper.result()

    async def _keep(self, crash_at: Iterator[str]) -> None:
        while True:
            assert self._process is not None
            if self._process.alive:
                await asyncio.sleep(0.02)
                continue
            self.deaths.append(self._process.describe_exit())
            await self.start(PULSE_CRASH_AT=next(crash_at, ""))


def _readiness(health_url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{health_url}/readyz", timeout=TIMEOUT_S) as answer:  # noqa: S310 - our own http URL
            body = answer.read()
    except urllib.error.HTTPError as error:
        body = error.read()
    checks: dict[str, Any] = msgspec.json.decode(body)["checks"]
    return checks


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:  # noqa: S310 - our own http URL
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class Acknowledged(Protocol):
    """A load: reading to the sequence that its 202 named."""

    @property
    def acknowledged(self) -> Mapping[str, int]: ...


class _Slow:
    """Makes the auditor dawdle before each reading: the order of its readings must keep it right, not its speed."""

    def __init__(self, reader: object) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Callable[..., Awaitable[object]]:
        read = getattr(self._reader, name)

        async def late(*arguments: object) -> object:
            await asyncio.sleep(random.uniform(0, AUDIT_PAUSE_S_MAX))
            return await read(*arguments)

        return late


@dataclass(kw_only=True)
class System:
    """All of it; `tokens` are those of the devices of tenant `t1`, `audits` what the auditor saw of `stream`."""

    nats: NatsServer
    database_url: str
    folder: Path
    topology: Declared
    devices: int = DEVICES
    stream: str = TELEMETRY
    gateway_port: int = field(default_factory=ports.free_port)
    tokens: dict[str, str] = field(default_factory=dict)
    audits: list[StreamAudit] = field(default_factory=list)

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self.gateway_port}"

    @property
    def settings(self) -> Settings:
        return Settings(nats_url=self.nats.url, database_url=self.database_url)

    def role(self, name: str, **variables: str) -> Role:
        """A role (`ingest`, or `ingest-2` for another one of it) that does not run yet."""
        kept = {key: value for key, value in os.environ.items() if key in {"PATH", "HOME", "LANG", "VIRTUAL_ENV"}}
        environment = {
            **kept,
            "PYTHONPATH": str(SOURCE),
            "NATS_URL": self.nats.url,
            "DATABASE_URL": self.database_url,
            "PULSE_GATEWAY_PORT": str(self.gateway_port),
            "PULSE_RETRY_DELAY_S_MAX": "0.5",
            "PULSE_LOG_FORMAT": "json",
            **variables,
        }
        return Role(name, self.folder, environment)

    async def prepare(self) -> None:
        """Schema, streams and devices."""
        async with open_connection(self.database_url, timeout_s=TIMEOUT_S, application_name="test") as database:
            await migrate(database, available())
        await self.apply_topology()
        async with (
            connection(self.nats.url, name="test") as client,
            open_pool(self.database_url, size_max=1, timeout_s=TIMEOUT_S, application_name="test") as pool,
        ):
            store = IdentityStore(pool, presence_after=PRESENCE_AFTER)
            await store.add_tenant(TENANT)
            devices = [NewDevice(device_id=f"d{number}") for number in range(self.devices)]
            self.tokens = await store.add_devices(TENANT, devices)
            keys = [tenant_key(TENANT), *(device_key(TENANT, device_id) for device_id in self.tokens)]
            await RegistryBucket(client).project(keys, RegistryTruth(pool).load)

    async def apply_topology(self) -> None:
        async with connection(self.nats.url, name="test") as client:
            provisioner = Provisioner(client)
            await provisioner.apply(self.topology, await provisioner.plan(self.topology))

    async def audit(self) -> list[StreamAudit]:
        """One equation a making of the stream. Raises Outage."""
        async with open_auditor(self.settings) as auditor:
            return await auditor.audit(self.stream)

    @asynccontextmanager
    async def audited(self) -> AsyncIterator[None]:
        """Audit all the while: at no moment may the equation fail, or anything count as expired."""
        stop = asyncio.Event()
        task = asyncio.create_task(self._audit_until(stop), name="auditor")

        async def has_audited() -> bool:
            return bool(self.audits) or task.done()

        try:
            yield
            await eventually(has_audited, "the auditor gets a word in")
        finally:
            stop.set()
            await task

    async def _audit_until(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                async with open_auditor(self.settings) as auditor:
                    auditor._ledger = _Slow(auditor._ledger)  # type: ignore[assignment]
                    auditor._streams = _Slow(auditor._streams)  # type: ignore[assignment]
                    while not stop.is_set():
                        for each in await auditor.audit(self.stream):
                            assert each.balanced, each
                            assert each.expired == 0, each
                            assert each.stored + each.dead <= each.accepted, each
                            self.audits.append(each)
            except Outage:
                await asyncio.sleep(AUDIT_PAUSE_S_MAX)

    async def drained(self, *, accepted: int) -> None:
        """Return once the last making of the stream has accepted so many, and all of them are settled."""
        last: list[StreamAudit] = []

        async def settled() -> bool:
            try:
                last[:] = await self.audit()
            except Outage:
                return False
            return last[-1].accepted == accepted and last[-1].in_flight == 0

        try:
            await eventually(settled, "all is settled")
        except AssertionError as error:
            raise AssertionError(f"{error}: {last}; {accepted} were accepted") from error

    async def fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Ask PostgreSQL."""
        async with open_connection(self.database_url, timeout_s=TIMEOUT_S, application_name="test") as database:
            return list(await database.fetch(statement, *arguments))

    async def dead_letters(self) -> list[asyncpg.Record]:
        return await self.fetch("SELECT * FROM dead_letters ORDER BY position")

    async def deliveries(self) -> tuple[int, int]:
        """How many messages the consumer has delivered, and in how many deliveries."""
        from pulse.adapters.nats.jetstream import ConsumerAnswer, request

        async with connection(self.nats.url, name="test") as client:
            answer = await request(
                client, f"CONSUMER.INFO.{TELEMETRY}.{INGEST_WORKERS}", {}, ConsumerAnswer, doing="ask"
            )
        return answer.delivered.stream_seq, answer.delivered.consumer_seq

    async def redeliveries(self, stream: str, consumer: str) -> int:
        """How many deliveries were not a message's first."""
        from pulse.adapters.nats.jetstream import ConsumerAnswer, request

        async with connection(self.nats.url, name="test") as client:
            answer = await request(client, f"CONSUMER.INFO.{stream}.{consumer}", {}, ConsumerAnswer, doing="ask")
        return answer.delivered.consumer_seq - answer.delivered.stream_seq

    async def stored_exactly(self, *loads: Acknowledged, dead: int = 0) -> None:
        """The oracle."""
        wanted = {reading: seq for each in loads for reading, seq in each.acknowledged.items()}
        await self.drained(accepted=len(wanted) + dead)
        rows = await self.fetch("SELECT metrics->>'reading' AS reading, position FROM telemetry")
        counts = Counter(row["reading"] for row in rows)
        lost = sorted(wanted.keys() - counts.keys())
        doubled = sorted(reading for reading, count in counts.items() if count > 1)
        assert not lost, f"{len(lost)} readings that were answered 202 are not stored: {lost[:10]}"
        assert not doubled, f"{len(doubled)} readings are stored more than once: {doubled[:10]}"
        assert counts.keys() == wanted.keys(), "something is stored that was never answered 202"
        moved = [row["reading"] for row in rows if row["position"] & SEQUENCE_MAX != wanted[row["reading"]]]
        assert not moved, f"not at the position that the answer named: {moved[:10]}"
        (final,) = await self.audit()
        assert (final.stored, final.dead, final.in_flight, final.expired) == (len(wanted), dead, 0, 0), final
        async with open_auditor(self.settings) as auditor:
            assert (await auditor.check_rows(final.epoch)).agrees
        assert len(await self.dead_letters()) == dead

    async def epochs(self) -> list[int]:
        """Of all rows, in ascending order."""
        rows = await self.fetch("SELECT DISTINCT position >> $1 AS epoch FROM telemetry ORDER BY epoch", SEQUENCE_BITS)
        return [row["epoch"] for row in rows]


def freeze(pid: int) -> Callable[[], None]:
    """SIGSTOP to a process and all its descendants; returns what thaws them."""
    parent = psutil.Process(pid)
    parent.suspend()
    frozen = [parent, *parent.children(recursive=True)]
    for each in frozen:
        each.suspend()

    def thaw() -> None:
        for each in frozen:
            each.resume()

    return thaw
