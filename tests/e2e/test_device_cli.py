"""`pulse migrate`, `pulse tenant` and `pulse device` in processes of their own, on real servers."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from nats.aio.client import Client

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.registry import STREAM, RegistryBucket
from pulse.adapters.postgres.pool import open_connection
from pulse.domain.identity import Device, Tenant, admits
from pulse.domain.limits import Rate, TenantLimits
from pulse.domain.registry import Record, device_key, tenant_key

T = TypeVar("T")
PROCESS_S_MAX = 120


class Pulse:
    """The `pulse` command on one database and one nats-server."""

    def __init__(self, folder: Path, *, database_url: str, nats: NatsServer) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PULSE_")}
        self._environment = inherited | {"DATABASE_URL": database_url, "NATS_URL": nats.url, "COLUMNS": "160"}
        self._folder = folder
        self._database_url = database_url
        self.nats = nats

    def __call__(self, *arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run it to its end; fails where its exit code is another than `exit_code`."""
        done = subprocess.run(
            [sys.executable, "-m", "pulse", *arguments],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PROCESS_S_MAX,
            check=False,
        )
        assert done.returncode == exit_code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str) -> Any:
        """What it prints with --json."""
        return json.loads(self(*arguments, "--json").stdout)

    def edge(self, *keys: str) -> Mapping[str, Record | None]:
        """What the registry at the edge holds under `keys`."""
        return self.on_nats(lambda client: RegistryBucket(client).read(keys))

    def logged(self) -> list[tuple[str, str, str, str, Any]]:
        """The log of changes: actor, action, tenant, target, details."""

        async def run() -> list[tuple[str, str, str, str, Any]]:
            async with open_connection(self._database_url, timeout_s=10, application_name="test") as database:
                rows = await database.fetch(
                    "SELECT actor, action, tenant_id, target, details, key_id FROM audit_log ORDER BY id"
                )
            assert all(row["key_id"] is None for row in rows)
            return [(row[0], row[1], row[2], row[3], json.loads(row[4])) for row in rows]

        return asyncio.run(run())

    def on_nats(self, act: Callable[[Client], Awaitable[T]]) -> T:
        """What `act` returns, with a connection of its own."""

        async def run() -> T:
            async with connection(self.nats.url, name="test", wait_s=10) as client:
                return await act(client)

        return asyncio.run(run())


@pytest.fixture
def pulse(tmp_path: Path, database: str, nats: NatsServer) -> Pulse:
    """Migrated, with tenant acme and the registry's bucket."""
    command = Pulse(tmp_path, database_url=database, nats=nats)
    config = msgspec.json.decode((files("pulse.topology") / "streams" / f"{STREAM}.json").read_bytes())
    command.on_nats(
        lambda client: client.request(f"$JS.API.STREAM.CREATE.{STREAM}", msgspec.json.encode(config), timeout=30)
    )
    command("migrate")
    command("tenant", "add", "acme")
    return command


def device_at_edge(pulse: Pulse, device_id: str) -> Device:
    key = device_key("acme", device_id)
    record = pulse.edge(key)[key]
    assert isinstance(record, Device)
    return record


def admitted(pulse: Pulse, device_id: str, token: str) -> bool:
    return admits(device_at_edge(pulse, device_id), token, time.time_ns() // 1_000_000)


def test_migrate_says_what_it_would_apply_applies_it_and_has_nothing_left(
    tmp_path: Path, database: str, nats: NatsServer
) -> None:
    pulse = Pulse(tmp_path, database_url=database, nats=nats)
    would = pulse.json("migrate", "--dry-run")
    assert would["pending"][0] == {"number": 1, "name": "identity"}
    first = pulse("migrate")
    assert "0001_identity applied" in first.stdout
    assert "applying 0001_identity" in first.stderr
    again = pulse.json("migrate")
    assert (again["schema"], again["dry_run"], again["applied"]) == (would["schema"], False, [])
    assert "up to date" in pulse("migrate").stdout


def test_a_device_that_is_added_is_admitted_at_the_edge_with_the_token_that_was_shown(pulse: Pulse) -> None:
    added = pulse.json("device", "add", "acme", "boiler", "--name", "Boiler [1]", "--attribute", "site=north")
    assert added["projected"] is True
    token = added["devices"][0]["token"]
    assert pulse.edge(tenant_key("acme")) == {"tenant.acme": Tenant("acme", enabled=True)}
    assert admitted(pulse, "boiler", token)
    shown = pulse("device", "show", "acme", "boiler").stdout
    assert "Boiler [1]" in shown
    assert "north" in shown
    assert token not in shown

    spoken = pulse("device", "add", "acme", "kettle").stdout
    assert "curl -X POST http://127.0.0.1:8080/ingest/v1/tenant/acme/device/kettle/telemetry" in spoken
    assert '{"metrics":{"temp":21.5}}' in spoken
    token = next(line.strip() for line in spoken.splitlines() if line.strip().startswith("pulse_"))
    assert admitted(pulse, "kettle", token)
    listed = pulse.json("device", "list", "--tenant", "acme")["devices"]
    assert [device["device_id"] for device in listed] == ["boiler", "kettle"]
    assert "kettle" in pulse("device", "list").stdout


def test_rotation_disabling_and_enabling_reach_the_edge(pulse: Pulse) -> None:
    old = pulse.json("device", "add", "acme", "boiler")["devices"][0]["token"]
    new = pulse.json("device", "rotate", "acme", "boiler")["token"]
    assert (admitted(pulse, "boiler", old), admitted(pulse, "boiler", new)) == (True, True)
    last = pulse.json("device", "rotate", "acme", "boiler", "--overlap", "0")["token"]
    assert [admitted(pulse, "boiler", token) for token in (old, new, last)] == [False, False, True]
    assert "disabled" in pulse("device", "disable", "acme", "boiler").stdout
    assert not admitted(pulse, "boiler", last)
    pulse("device", "enable", "acme", "boiler")
    assert admitted(pulse, "boiler", last)
    pulse("tenant", "disable", "acme")
    assert pulse.edge(tenant_key("acme")) == {"tenant.acme": Tenant("acme", enabled=False)}
    assert pulse.json("tenant", "show", "acme")["tenant"]["enabled"] is False
    assert [tenant["tenant_id"] for tenant in pulse.json("tenant", "list", "--status", "disabled")["tenants"]] == [
        "acme"
    ]


def test_a_tenants_limits_are_given_shown_and_taken_away(pulse: Pulse) -> None:
    said = pulse("tenant", "limit", "acme", "--messages", "500/2000", "--device-messages", "0/1").stdout
    assert "500 messages a second, 2000 at once; each of its devices: no limit" in said
    limits = TenantLimits(messages=Rate(500, 2000), device_messages=Rate(0, 1))
    assert pulse.edge(tenant_key("acme")) == {"tenant.acme": Tenant("acme", True, limits)}
    assert "500 messages a second" in pulse("tenant", "show", "acme").stdout
    for wrong in ("500", "5/0", "0.0001/1", "-1/5", "1/99999999999"):
        assert "--messages" in pulse("tenant", "limit", "acme", "--messages", wrong, exit_code=2).stderr
    assert pulse.json("tenant", "limit", "acme")["projected"] is True
    assert pulse.edge(tenant_key("acme")) == {"tenant.acme": Tenant("acme", True)}


def test_every_change_is_in_the_log_with_who_made_it(pulse: Pulse) -> None:
    pulse("tenant", "limit", "acme", "--messages", "500/2000")
    pulse("tenant", "disable", "acme")
    pulse("device", "add", "acme", "boiler")
    pulse("device", "add", "acme", "--count", "3")
    pulse("device", "rotate", "acme", "boiler", "--overlap", "5")
    pulse("device", "enable", "acme", "boiler")
    pulse("device", "enable", "acme", "nobody", exit_code=1)
    pulse("key", "add", "reader", "--tenant", "acme")
    rows = pulse.logged()
    assert {actor for actor, *_ in rows} == {pwd.getpwuid(os.getuid()).pw_name}
    assert [row[1:] for row in rows] == [
        ("tenant.create", "acme", "acme", {"name": ""}),
        ("tenant.limit", "acme", "acme", {"messages": {"per_s": 500.0, "burst": 2000}, "device_messages": None}),
        ("tenant.disable", "acme", "acme", {}),
        ("device.create", "acme", "boiler", {}),
        ("device.create", "acme", "device-1", {"count": 3}),
        ("device.rotate", "acme", "boiler", {"overlap_s": 5}),
        ("device.enable", "acme", "boiler", {}),
        ("key.create", "acme", "reader", {"read_only": False, "expires_at": None}),
    ]


def test_many_devices_are_made_at_once_with_a_token_on_each_line(pulse: Pulse) -> None:
    lines = pulse("device", "add", "acme", "--count", "120", "--prefix", "meter-").stdout.splitlines()
    tokens = dict(line.split("\t") for line in lines)
    assert list(tokens) == [f"meter-{number:03}" for number in range(1, 121)]
    assert admitted(pulse, "meter-077", tokens["meter-077"])


def test_while_nats_is_away_a_change_is_saved_and_the_warning_says_what_is_left(pulse: Pulse) -> None:
    pulse.nats.kill()
    done = pulse("device", "add", "acme", "boiler")
    assert "warning: this is saved, but the edge has not been told" in done.stderr
    assert pulse.json("device", "disable", "acme", "boiler")["projected"] is False
    assert pulse.json("device", "show", "acme", "boiler")["device"]["enabled"] is False


def test_what_cannot_be_done_is_one_line_that_says_what_to_do(pulse: Pulse) -> None:
    away, malformed = "database_url=postgresql://pulse@127.0.0.1:1/x", "database_url=postgresql://host:port/x"
    for arguments, exit_code, said in (
        ("device add nobody boiler", 1, "pulse tenant add nobody"),
        ("device add acme boi.ler", 1, "device_id must be 1 to 64"),
        ("device show acme boiler", 1, "has no device 'boiler'"),
        ("tenant add acme", 1, "is there already"),
        ("device add acme", 2, "--count"),
        ("device add acme boiler --attribute x", 2, "NAME=VALUE"),
        (f"--set {away} tenant list", 1, "PostgreSQL is away"),
        (f"--set {malformed} migrate", 2, "not the URL of a PostgreSQL database"),
    ):
        stderr = pulse(*arguments.split(), exit_code=exit_code).stderr
        assert said in stderr
        assert "Traceback" not in stderr
