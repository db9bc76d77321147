"""Where `pulse simulate` sends to, and the wait until the devices that it has just made are admitted there."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import msgspec
from rich.progress import Progress

from pulse.adapters.http.device import DeviceClient, open_device_client
from pulse.adapters.mqtt.broker import Account
from pulse.adapters.mqtt.device import DeviceFleet, open_device_fleet
from pulse.cli.context import progress_console
from pulse.cli.simulate_delivery import Client
from pulse.domain.errors import CheckFailed, ConfigurationError
from pulse.domain.simulation import COMMANDS, DELTA, Message, reply
from pulse.runtime.settings import Settings

ADMISSION_S_MAX = 30.0
ADMISSION_POLL_S = 0.05
ADMISSION_CHECKED_MAX = 50
"""Devices whose admission by a gateway is waited for: the last one, which it hears of last, and others between."""
REFUSED_PAYLOAD = 422
FILES_BESIDE = 128
"""What a run has open that is no connection of a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the run goes."""

    settings: Settings
    tenant_id: str
    protocol: str
    url: str | None
    """Of the gateway or broker; None is where the settings say."""
    commands: bool = False
    """Whether devices (with MQTT) take on what their shadows say, and do what they are told."""


Admit = Callable[[Sequence[str], Sequence[str]], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrance:
    """A protocol's entrance; `admit` takes ids and tokens, and returns once these devices may send.

    It raises CheckFailed where they may not within ADMISSION_S_MAX.
    """

    client: Client
    check: Callable[[], Awaitable[None]]
    """Raises Outage where nobody answers."""
    admit: Admit


async def _admit_at_gateway(client: DeviceClient, ids: Sequence[str], tokens: Sequence[str]) -> None:
    """Its word is the refusal of an empty payload, so nothing is stored."""
    step = max(1, len(ids) // ADMISSION_CHECKED_MAX)
    for number in (len(ids) - 1, *range(0, len(ids) - 1, step)):
        probe = Message(ids[number], tokens[number], "telemetry", b"{}", "admission")

        async def admitted(probe: Message = probe) -> bool:
            return (await client.send(probe)).status == REFUSED_PAYLOAD

        await _until(admitted, f"the gateway did not admit device {ids[number]}")


async def _admit_at_broker(fleet: DeviceFleet, ids: Sequence[str], tokens: Sequence[str]) -> None:
    """Connect them all: each has a connection of its own."""
    with Progress(console=progress_console, transient=True, disable=not progress_console.is_terminal) as progress:
        task = progress.add_task(f"connecting {len(ids):,} devices", total=len(ids))

        async def admit_one(device_id: str, token: str) -> None:
            await _until(lambda: fleet.let_in(device_id, token), f"the broker did not let in device {device_id}")
            progress.advance(task)

        await asyncio.gather(*(admit_one(*each) for each in zip(ids, tokens, strict=True)))


def _allow_connections(count: int) -> None:
    """Raise this process's soft limit on open files to so many connections, where it is lower."""
    wanted = count + FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigurationError(
            f"{count:,} devices need as many connections, and this system lets a process have {hard:,} open files",
            hint="choose fewer with --devices, or raise `ulimit -n`",
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _until(admitted: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + ADMISSION_S_MAX
    while not await admitted():
        if time.monotonic() > deadline:
            raise CheckFailed(
                f"{what} within {ADMISSION_S_MAX:.0f} s",
                hint="is it one of this system, and is the device enabled? `pulse device show` tells",
            )
        await asyncio.sleep(ADMISSION_POLL_S)


@asynccontextmanager
async def open_entrance(target: Target, *, devices: int, connections: int) -> AsyncIterator[Entrance]:
    """The entrance of `target`. Raises ConfigurationError for what is no URL of one."""
    settings = target.settings
    if target.protocol == "mqtt":
        _allow_connections(devices)
        account = msgspec.convert(settings, Account, from_attributes=True)
        account = msgspec.structs.replace(account, mqtt_url=target.url or account.mqtt_url, mqtt_cert_file="")
        listens_to = (COMMANDS, DELTA) if target.commands else ()
        async with open_device_fleet(account, tenant_id=target.tenant_id, listens_to=listens_to, reply=reply) as fleet:
            yield Entrance(client=fleet, check=fleet.check, admit=partial(_admit_at_broker, fleet))
        return
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.gateway_host, settings.gateway_host)  # noqa: S104
    url = target.url or f"http://{host}:{settings.gateway_port}"
    async with open_device_client(url, tenant_id=target.tenant_id, connections=connections) as client:
        yield Entrance(client=client, check=client.check, admit=partial(_admit_at_gateway, client))
