"""The bridge between a broker and a nats-server with streams and devices: a service of this process, wired as shipped.

PostgreSQL is nowhere: accepting a message needs NATS alone.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from brokers import Broker
from gateway_process import NOWHERE
from pulse.adapters.embedded import ports
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.postgres.pool import open_pool
from pulse.domain.dead_letter import Condemned
from pulse.domain.envelope import Envelope, unwrap
from pulse.runtime.health import Check, readiness
from pulse.runtime.lifecycle import run_services
from pulse.runtime.metrics import process_registry
from pulse.runtime.settings import Settings
from pulse.wiring.bridge import bridge_services
from pulse.wiring.process import Process

LIMIT_S = 30.0
_SAMPLE = re.compile(r"^(pulse_bridge_\w+)(?:\{(.*)\})? ([0-9.e+-]+)$", re.MULTILINE)


def bridge_settings(broker: Broker, *, client_id: str = "bridge-1", **more: object) -> Settings:
    return msgspec.convert(
        {
            "mqtt_url": broker.url,
            "mqtt_username": broker.username,
            "mqtt_password": broker.password,
            "mqtt_client_id": client_id,
            "mqtt_version": broker.version,
            "retry_delay_s_min": 0.02,
            "retry_delay_s_max": 0.2,
            **more,
        },
        Settings,
    )


@dataclass(kw_only=True)
class Running:
    """A bridge that runs."""

    registry: CollectorRegistry
    checks: list[Check]
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def counts(self) -> dict[str, float]:
        """All of its metrics, as `name{labels}` without the common prefix."""
        text = generate_latest(self.registry).decode()
        return {
            name.removeprefix("pulse_bridge_") + (f"{{{labels}}}" if labels else ""): float(value)
            for name, labels, value in _SAMPLE.findall(text)
        }

    def outcomes(self) -> dict[str, int]:
        """How many messages became what, without those that are none."""
        found = {
            re.sub(r'.*"(\w+)".*', r"\1", name): int(value)
            for name, value in self.counts().items()
            if name.startswith("messages_total")
        }
        return {name: value for name, value in found.items() if value}

    def refusals(self) -> dict[str, int]:
        """How many were refused for what."""
        found: dict[str, int] = {}
        for name, value in self.counts().items():
            match = re.fullmatch(r'refused_total\{outcome="\w+",reason="(\w+)"\}', name)
            if match and value:
                found[match[1]] = found.get(match[1], 0) + int(value)
        return found

    @property
    def settled(self) -> int:
        """How many messages have found their end; every one that was received has, where nothing is in flight."""
        counts = self.counts()
        total = sum(self.outcomes().values())
        assert counts["received_total"] == total + counts["in_flight"]
        return total

    @property
    def ready(self) -> bool:
        return readiness(self.checks)[0]

    @property
    def told(self) -> str:
        """The body of `/readyz`."""
        return readiness(self.checks)[1].decode()


@asynccontextmanager
async def bridging(client: PulseClient, settings: Settings, *, wait: bool = True) -> AsyncIterator[Running]:
    """The services of the role `bridge`, connected to the broker at the beginning, drained at the end."""
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(open_pool(NOWHERE, size_max=1, timeout_s=1.0, application_name="test"))
        process = Process(
            settings=settings,
            nats=client,
            pool=pool,
            metrics=process_registry(role="bridge"),
            probe=lambda _: None,
            stack=stack,
        )
        own = await bridge_services(process)
        running = Running(registry=process.metrics, checks=process.checks)
        async with asyncio.timeout(4 * LIMIT_S), asyncio.TaskGroup() as group:
            group.create_task(run_services([*process.shared, *own], stop=running.stop, drain_s_max=4.0))
            if wait:
                await until(lambda: running.ready, "the bridge is ready")
            yield running
            running.stop.set()


async def until(holds: Callable[[], bool | Awaitable[bool]], what: str, *, limit_s: float = LIMIT_S) -> None:
    """Return once `holds`; fail, saying `what`, after `limit_s`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while True:
                found = holds()
                if found if isinstance(found, bool) else await found:
                    return
                await asyncio.sleep(0.02)
    raise AssertionError(f"not within {limit_s} s: {what}")


async def stored(client: PulseClient) -> list[Envelope]:
    """All messages of TELEMETRY, in their order."""
    return [unwrap(name, body) for name, body in await _all(client, "TELEMETRY")]


async def letters(client: PulseClient) -> list[Condemned]:
    """All letters in DEAD_LETTERS."""
    return [msgspec.json.decode(body, type=Condemned) for _, body in await _all(client, "DEAD_LETTERS")]


async def _all(client: PulseClient, stream: str) -> list[tuple[str, bytes]]:
    context = client.jetstream()
    state = (await context.stream_info(stream)).state
    found = []
    for sequence in range(state.first_seq, state.last_seq + 1):
        message = await context.get_msg(stream, sequence)
        found.append((message.subject or "", message.data or b""))
    return found


__all__ = ["Running", "bridge_settings", "bridging", "letters", "ports", "stored", "until"]
