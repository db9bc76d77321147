"""kill -9 of the command worker and of nats-server while two hundred devices are told what to do.

Of 200 devices, half over MQTT and half over HTTP, 50 are away when they are told, 20 never answer, and 10 acknowledge
and never end. The oracle: each of 1000 commands ends as its device's manner has it, its device has heard of it, under
its one id, and nobody else has; and every message of COMMANDS is settled, none as a dead letter.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from chaos.commanded import Device, Manner, OverHttp, OverMqtt, end_of, open_session
from chaos.load import TENANT
from chaos.system import SEEDS, System, declared, eventually
from conftest import NatsServerFactory
from pulse.adapters.embedded import ports
from pulse.adapters.postgres.commands import CommandStore
from pulse.adapters.postgres.pool import open_pool
from pulse.domain.audit import StreamAudit
from pulse.domain.command import NewCommand
from pulse.wiring.cli import open_auditor

pytestmark = [pytest.mark.chaos, pytest.mark.parametrize("seed", SEEDS), pytest.mark.timeout(500)]

DEVICES = int(os.environ.get("PULSE_CHAOS_COMMANDED", "200"))
EACH = 5
HOUR_MS = 3_600_000
LIMIT_S = 120.0
USER, PASSWORD = "pulse", "commanded"
CRASHES = ("commands.ledger_written", "commands.before_commit", "commands.committed", "commands.acked")
"""Where the worker may die by itself, in addition."""


@dataclass(kw_only=True)
class Told(System):
    """A system whose devices may be told something over MQTT."""

    mqtt_port: int


@pytest.fixture
async def told(nats_server_factory: NatsServerFactory, database: str, scratch: Path) -> Told:
    """A system whose nats-server is the broker as well, as with `pulse up`."""
    mqtt_port = ports.free_port()
    conf = f'mqtt {{ listen: "127.0.0.1:{mqtt_port}", ack_wait: "2s" }}'
    server = nats_server_factory(user=USER, password=PASSWORD, extra_conf=conf)
    server.start()
    made = Told(
        nats=server,
        database_url=database,
        folder=scratch,
        topology=declared(),
        devices=DEVICES,
        mqtt_port=mqtt_port,
    )
    await made.prepare()
    return made


def people(tokens: Sequence[str], chance: random.Random) -> dict[str, list[Device]]:
    """The devices, over MQTT and over HTTP; 15 in a hundred of each half do not answer as they should."""
    made = [Device(device_id=device_id) for device_id in tokens]
    chance.shuffle(made)
    halves = {"mqtt": made[: len(made) // 2], "http": made[len(made) // 2 :]}
    for half in halves.values():
        others = max(3, 15 * len(half) // 100)
        for number, device in enumerate(half[:others]):
            device.manner = (Manner.NEVER_ENDS, Manner.NEVER_ANSWERS, Manner.NEVER_ANSWERS)[number % 3]
    return halves


async def tell(system: System, devices: Sequence[Device]) -> dict[str, str]:
    """Make the commands, two of each device in order; command to device."""
    made: dict[str, str] = {}
    async with open_pool(system.database_url, size_max=4, timeout_s=10, application_name="test") as pool:
        store = CommandStore(pool)
        for number, device in itertools.product(range(EACH), devices):
            asked = NewCommand(
                tenant_id=TENANT,
                device_id=device.device_id,
                name="move" if number % 2 else "blink",
                payload=msgspec.json.encode(device.device_id),
                ttl_ms=HOUR_MS,
                timeout_ms=HOUR_MS,
                ordered=bool(number % 2),
                idempotency_key=f"{device.device_id}/{number}",
            )
            command, _ = await store.create(asked, who="test", at_ms=time.time_ns() // 1_000_000)
            made[command.command_id] = device.device_id
    return made


async def let_time_pass(system: System, devices: Sequence[Device]) -> None:
    """The hour is over for what these have heard of, and do not end; the sweep of the role sees that."""
    heard = [command_id for device in devices if device.manner is not Manner.OBEYS for command_id in device.heard]
    acknowledging = [device.device_id for device in devices if device.manner is Manner.NEVER_ENDS]
    await system.fetch(
        "UPDATE commands SET due_ms = 1 WHERE command_id = ANY($1) AND due_ms > 1"
        " AND (state = 'acknowledged') = (device_id = ANY($2))",
        heard,
        acknowledging,
    )


async def have_ended(system: System, devices: Sequence[Device], count: int) -> None:
    last: list[object] = []

    async def ended() -> bool:
        await let_time_pass(system, devices)
        rows = await system.fetch("SELECT state, count(*) FROM commands GROUP BY 1")
        last[:] = [tuple(row) for row in rows]
        over = await system.fetch("SELECT count(*) FROM commands WHERE due_ms IS NULL")
        return bool(over[0]["count"] == count)

    try:
        await eventually(ended, "each command has ended", limit_s=LIMIT_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {last}") from error


async def all_is_settled(system: System) -> None:
    last: list[StreamAudit] = []

    async def settled() -> bool:
        async with open_auditor(system.settings) as auditor:
            last[:] = await auditor.audit("COMMANDS")
        return all(each.in_flight == 0 for each in last)

    await eventually(settled, "COMMANDS has been taken in")
    assert [(each.balanced, each.expired, each.dead) for each in last] == [(True, 0, 0)], last
    assert await system.dead_letters() == []


def expected(device: Device, command_id: str) -> str:
    if device.manner is Manner.OBEYS:
        return end_of(command_id)
    return "timed_out" if device.manner is Manner.NEVER_ENDS else "expired"


async def test_each_command_ends_as_it_should_though_worker_and_nats_server_are_killed(told: Told, seed: int) -> None:
    chance = random.Random(seed)
    halves = people(list(told.tokens), chance)
    devices = [*halves["mqtt"], *halves["http"]]
    away = {device.device_id for half in halves.values() for device in half[-len(half) // 4 :]}

    bridge = told.role(
        "bridge",
        PULSE_MQTT_URL=f"mqtt://127.0.0.1:{told.mqtt_port}",
        PULSE_MQTT_USERNAME=USER,
        PULSE_MQTT_PASSWORD=PASSWORD,
        PULSE_MQTT_CLIENT_ID="bridge-1",
    )
    worker = told.role("commands")
    crashes = itertools.chain([f"{chance.choice(CRASHES)}:{chance.randrange(2, 8)}"])

    async with AsyncExitStack() as stack:
        for role in (bridge, told.role("gateway"), told.role("maintenance")):
            await stack.enter_async_context(role.supervised())
        await stack.enter_async_context(worker.supervised(crashes))
        session = await stack.enter_async_context(open_session())
        over_mqtt = [
            OverMqtt(device, port=told.mqtt_port, username=USER, password=PASSWORD) for device in halves["mqtt"]
        ]
        over_http = [
            OverHttp(device, session, url=told.gateway_url, token=told.tokens[device.device_id])
            for device in halves["http"]
        ]
        group = await stack.enter_async_context(asyncio.TaskGroup())
        running = {each.device.device_id: group.create_task(each.run()) for each in over_mqtt}
        await asyncio.wait_for(asyncio.gather(*[each.subscribed.wait() for each in over_mqtt]), LIMIT_S)
        for device_id in away & running.keys():
            running.pop(device_id).cancel()
        running |= {
            each.device.device_id: group.create_task(each.run())
            for each in over_http
            if each.device.device_id not in away
        }
        telling = asyncio.create_task(tell(told, devices), name="who tells")
        await worker.died(1)
        told.nats.kill()
        await asyncio.to_thread(told.nats.start)
        worker.kill()
        made = await telling
        assert not any(device.heard for device in devices if device.device_id in away)
        late: list[OverMqtt | OverHttp] = [*over_mqtt, *over_http]
        running |= {
            each.device.device_id: group.create_task(each.run()) for each in late if each.device.device_id in away
        }
        await have_ended(told, devices, len(made))
        await all_is_settled(told)
        for task in running.values():
            task.cancel()
    await _check(told, devices, made)
    assert len(worker.deaths) >= 2


async def _check(system: System, devices: Sequence[Device], made: dict[str, str]) -> None:
    """The oracle."""
    assert len(made) == len(devices) * EACH
    by_id = {device.device_id: device for device in devices}
    states = {row["command_id"]: row["state"] for row in await system.fetch("SELECT * FROM commands")}
    assert set(states) == set(made)
    wrong = [
        (command_id, device_id, states[command_id])
        for command_id, device_id in made.items()
        if states[command_id] != expected(by_id[device_id], command_id)
    ]
    assert not wrong, wrong[:10]
    for device in devices:
        own = {command_id for command_id, device_id in made.items() if device_id == device.device_id}
        assert set(device.heard) == own, f"{device.device_id} ({device.manner}) heard of {device.heard}, not {own}"
        assert not device.strange, device.strange[:3]
    ends = await system.fetch(
        "SELECT command_id FROM command_moves WHERE state NOT IN ('queued', 'sent', 'acknowledged')"
    )
    assert Counter(row["command_id"] for row in ends) == Counter(dict.fromkeys(made, 1)), "one end each"
    assert await system.fetch("SELECT FROM outbox") == []
