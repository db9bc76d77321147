"""A device that speaks MQTT to `pulse up`: what it sends is stored once, and nobody else's is stored at all."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
from dataclasses import dataclass

import asyncpg
import pytest

from compose_server import program
from pulse_up import Instance, wait_for

INSTALL = "apt install mosquitto-clients"
NOT_AUTHORISED = 5
"""The return code of a CONNACK (MQTT 3.1.1, 3.2.2.3), with which mosquitto_pub ends."""
PUB_S_MAX = 60.0
STORED_S_MAX = 60.0


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device of a tenant of the test's own."""

    running: Instance
    tenant_id: str
    device_id: str
    token: str

    @property
    def user(self) -> str:
        return f"{self.tenant_id}/{self.device_id}"

    def topic(self, kind: str = "telemetry") -> str:
        return f"tenant/{self.tenant_id}/device/{self.device_id}/{kind}"

    def publish(
        self, number: int, *, user: str | None = None, token: str | None = None, topic: str | None = None
    ) -> int:
        """Send a reading at QoS 1 by mosquitto_pub; its exit code."""
        credentials = {"-u": self.user if user is None else user, "-P": self.token if token is None else token}
        given = [part for option, value in credentials.items() if value for part in (option, value)]
        message = ["-t", topic or self.topic(), "-m", json.dumps({"metrics": {"n": number}})]
        command = [
            program("mosquitto_pub", install=INSTALL),
            "-p",
            str(self.running.ports.mqtt),
            "-q",
            "1",
            "-i",
            self.user,
        ]
        return subprocess.run([*command, *given, *message], timeout=PUB_S_MAX, check=False).returncode


def make(running: Instance, tenant_id: str, device_id: str) -> Device:
    done = running.pulse("device", "add", tenant_id, device_id, "--json", check=True)
    return Device(
        running=running, tenant_id=tenant_id, device_id=device_id, token=json.loads(done.stdout)["devices"][0]["token"]
    )


@pytest.fixture
def device(running: Instance) -> Device:
    """One that the bridge has let in."""
    program("mosquitto_pub", install=INSTALL)
    tenant_id = f"mqtt-{secrets.token_hex(4)}"
    running.pulse("tenant", "add", tenant_id, check=True)
    made = make(running, tenant_id, "d-1")
    wait_for(lambda: made.publish(0, topic=made.topic("heartbeat")) == 0, "the device is let in")
    return made


async def stored(device: Device) -> list[tuple[str, int]]:
    """(device, n) of all rows of the tenant."""
    connection = await asyncpg.connect(device.running.database_url)
    try:
        found = await connection.fetch(
            "SELECT device_id, metrics FROM telemetry WHERE tenant_id = $1 ORDER BY position", device.tenant_id
        )
    finally:
        await connection.close()
    return [(row["device_id"], json.loads(row["metrics"])["n"]) for row in found]


async def until_stored(device: Device, wanted: list[tuple[str, int]]) -> None:
    """Return when these rows are there, and none else."""
    found: list[tuple[str, int]] = []
    async with asyncio.timeout(STORED_S_MAX):
        while len(found) < len(wanted):
            await asyncio.sleep(0.02)
            found = await stored(device)
    assert found == wanted


async def test_what_a_device_publishes_is_a_row(device: Device) -> None:
    assert [device.publish(number) for number in (1, 2)] == [0, 0]
    await until_stored(device, [("d-1", 1), ("d-1", 2)])


async def test_a_wrong_token_or_none_or_another_one_s_is_refused_and_nothing_stored(device: Device) -> None:
    other = make(device.running, device.tenant_id, "d-2")
    for token in ("", "wrong", other.token):
        assert device.publish(1, token=token) == NOT_AUTHORISED
    assert device.publish(1, user="", token="") == NOT_AUTHORISED
    assert device.publish(1, user=other.user) == NOT_AUTHORISED
    assert device.publish(7) == 0
    await until_stored(device, [("d-1", 7)])


async def test_a_neighbour_s_topic_is_refused_and_nothing_stored(device: Device) -> None:
    """nats-server confirms such a message all the same (docs/GUARANTEES.md); it goes nowhere."""
    make(device.running, device.tenant_id, "d-2")
    device.publish(1, topic=device.topic().replace("d-1", "d-2"))
    device.publish(2, topic=device.topic().replace(device.tenant_id, "demo"))
    device.publish(3, topic=f"telemetry/{device.tenant_id}")
    assert device.publish(7) == 0
    await until_stored(device, [("d-1", 7)])


async def test_a_device_that_is_disabled_stays_out(device: Device) -> None:
    device.running.pulse("device", "disable", device.tenant_id, device.device_id, check=True)
    wait_for(lambda: device.publish(1) == NOT_AUTHORISED, "the device is kept out")


def test_the_command_that_it_prints_works_as_it_stands(running: Instance) -> None:
    program("mosquitto_pub", install=INSTALL)
    assert subprocess.run(running.mosquitto_pub, shell=True, timeout=PUB_S_MAX, check=False).returncode == 0  # noqa: S602


def test_no_other_process_is_told_how_devices_are_let_in(running: Instance) -> None:
    """Nor the bridge's password at the broker."""
    secrets_of_the_bridge = {"PULSE_MQTT_ISSUER_SECRET", "PULSE_MQTT_ACCESS_URL", "PULSE_MQTT_PASSWORD"}
    for role in ("bridge", "gateway", "ingest", "maintenance", "ui"):
        told = running.child(["serve", role]).environ()
        assert {name for name in secrets_of_the_bridge if told.get(name)} == (
            secrets_of_the_bridge if role == "bridge" else set()
        )
