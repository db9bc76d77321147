"""`pulse route test` with the role delivery running; and what a route republishes, which no bridge takes in again."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from brokers import NatsBroker
from chaos.load import TENANT
from chaos.system import System, eventually
from deliveries import KEY, OK, SETTINGS, Destination, Request, add_routes, answer, destinations
from mqtt_client import Device
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.streams import stream_state
from pulse.domain.route import Republish

COMMAND_S_MAX = 60


def well(_destination: Destination, _request: Request) -> bytes:
    return OK


def badly(_destination: Destination, _request: Request) -> bytes:
    return answer(503, body="not today")


async def tried(system: System, route_id: str, *options: str) -> tuple[int, str, str]:
    """`pulse route test`: its exit code, stdout, stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PULSE_")}
    environment |= {"NATS_URL": system.nats.url, "DATABASE_URL": system.database_url, "PULSE_SECRET_KEYS": KEY}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "pulse", "route", "test", TENANT, route_id, *options],
        env=environment,
        cwd=system.folder,
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


async def test_a_route_is_tested_as_it_delivers_and_says_what_the_destination_answers(system: System) -> None:
    async with destinations(well, badly) as [good, bad]:
        await add_routes(system.database_url, {"good": good.url, "bad": bad.url})
        code, _, said = await tried(system, "good")
        assert (code, "nobody answers" in said) == (1, True), "nobody delivers yet"
        async with system.role("delivery", **SETTINGS).supervised():
            code, out, _ = await tried(system, "good", "--json")
            found = json.loads(out)
            assert (code, found["delivered"], found["status"], found["excerpt"]) == (0, True, 200, "ok")
            [request] = good.requests
            assert request.headers["webhook-id"] == found["message_id"]
            assert request.headers["pulse-test"] == "true"
            assert "webhook-signature" in request.headers
            assert json.loads(request.body)["payload"]["test"] is True
            code, out, said = await tried(system, "bad")
            assert (code, "503" in out, "not today" in out) == (1, True, True)
            assert "did not take it" in said
            assert (await tried(system, "none"))[0] == 1
    async with connection(system.nats.url, name="test") as client:
        for stream in ("TELEMETRY", "ROUTES", "LATER", "DEAD_LETTERS"):
            assert (await stream_state(client, stream)).messages == 0, "nothing of a test is kept"


async def test_what_a_route_republishes_is_heard_at_its_topic_and_never_comes_back_as_a_message(
    system: System, scratch: Path
) -> None:
    """The bridge listens to what devices say, and no topic of a route is among that: there is no loop to count."""
    broker = NatsBroker(folder=scratch / "broker")
    broker.start()
    account = {
        "PULSE_MQTT_URL": broker.url,
        "PULSE_MQTT_USERNAME": broker.username,
        "PULSE_MQTT_PASSWORD": broker.password,
    }
    # The last levels of a topic may well look as if a device had said it.
    topics = ("telemetry", "device/d0/telemetry", f"tenant/{TENANT}/device/d0/telemetry")
    said = Device(port=broker.port, user=broker.username, token=broker.password, client_id="listener")
    try:
        async with (
            system.role("delivery", **SETTINGS, **account).supervised(),
            system.role("bridge", **account).supervised(),
            connection(system.nats.url, name="test") as client,
        ):
            assert await asyncio.to_thread(said.connect)
            assert said.subscribe("tenant/#")
            await add_routes(system.database_url, {f"r{n}": Republish(topic=topic) for n, topic in enumerate(topics)})
            for number in range(len(topics)):
                code, out, error = await tried(system, f"r{number}", "--json")
                assert code == 0, out + error
            wanted = {f"tenant/{TENANT}/route/{topic}" for topic in topics}
            await asyncio.to_thread(said.wait, lambda: {name for name, _ in said.heard.messages} >= wanted, "all of it")
            said.publish(f"tenant/{TENANT}/device/d0/telemetry", b'{"metrics":{"a":1},"seq":1}')

            async def is_stored() -> bool:
                return (await stream_state(client, "TELEMETRY")).messages > 0

            await eventually(is_stored, "what the device says behind it is taken in")
            assert (await stream_state(client, "TELEMETRY")).messages == 1
            assert (await stream_state(client, "DEAD_LETTERS")).messages == 0
    finally:
        said.end()
        broker.kill()
