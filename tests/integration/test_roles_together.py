"""Any set of roles runs in one process: here all of them."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import aiohttp

from brokers import NatsBroker, publish
from chaos.load import TENANT
from chaos.system import System, declared, eventually
from gateway_process import SOURCE, answers
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.process import ManagedProcess
from pulse.runtime.roles import Role


async def test_all_roles_run_in_one_process(nats: NatsServer, database: str, scratch: Path) -> None:
    system = System(nats=nats, database_url=database, folder=scratch, topology=declared())
    await system.prepare()
    broker = NatsBroker(folder=scratch / "broker")
    await asyncio.to_thread(broker.start)
    health_port = ports.free_port()
    health = f"http://127.0.0.1:{health_port}"
    kept = {key: value for key, value in os.environ.items() if key in {"PATH", "HOME", "LANG", "VIRTUAL_ENV"}}
    process = ManagedProcess(
        "all",
        [sys.executable, "-m", "pulse", "serve", *Role],
        log_path=scratch / "all.log",
        ready=lambda: True,
        environment=kept
        | {"PYTHONPATH": str(SOURCE), "NATS_URL": nats.url, "DATABASE_URL": database, "PULSE_LOG_FORMAT": "json"}
        | {"PULSE_HEALTH_PORT": str(health_port), "PULSE_GATEWAY_PORT": str(ports.free_port())}
        | {"PULSE_UI_PORT": str(ports.free_port()), "PULSE_MQTT_HOOK_SECRET": "s" * 32}
        | {"PULSE_MQTT_URL": broker.url, "PULSE_MQTT_USERNAME": broker.username}
        | {"PULSE_MQTT_PASSWORD": broker.password},
        working_directory=scratch,
    )
    try:
        await asyncio.to_thread(process.start)
        await answers(f"{health}/readyz")
        topic = f"tenant/{TENANT}/device/d0/telemetry"
        await asyncio.to_thread(publish, broker, [(topic, b'{"metrics":{"t":1}}'), (topic, b'{"metrics":{"t":nan}}')])

        async def is_settled() -> bool:
            return len(await system.fetch("SELECT FROM telemetry")) == len(await system.dead_letters()) == 1

        await eventually(is_settled, "what a device said to the broker is a row, or a row of dead_letters")
        (letter,) = await system.dead_letters()
        assert (letter["stream"], letter["subject"], letter["reason"]) == (
            "TELEMETRY",
            f"telemetry.{TENANT}",
            "invalid_json",
        )
        assert (letter["tenant_id"], letter["device_id"]) == (TENANT, "d0")
        assert topic.encode() in letter["headers"]
        (audit,) = await system.audit()
        assert (audit.accepted, audit.stored, audit.dead, audit.expired, audit.balanced) == (1, 1, 0, 0, True)
        async with aiohttp.ClientSession() as session, session.get(f"{health}/metrics") as answer:
            assert "\npulse_registry_devices 16.0\n" in await answer.text()
        await asyncio.to_thread(process.stop, 30.0)
        assert process.returncode == 0, process.tail
        assert (scratch / "all.log").read_text("utf-8").count("registry is complete") == 1
    finally:
        await asyncio.to_thread(process.kill)
        broker.kill()
        sys.stdout.write((scratch / "all.log").read_text("utf-8")[-6000:])
