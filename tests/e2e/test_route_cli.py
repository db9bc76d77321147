"""`pulse route` in processes of its own, on a real PostgreSQL and a real nats-server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.postgres.pool import transaction
from pulse.domain.webhook import read_secret
from pulse.topology.declared import load
from pulse_command import Command, command

TO = ("--webhook", "https://hooks.test/pulse")
ROWS = """
    INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position)
    SELECT now() - make_interval(secs => n), 'acme', 'lamp', jsonb_build_object('temp', n::float8), n
    FROM generate_series(1, 50) AS n
"""


@pytest.fixture
async def pulse(database: str, nats: NatsServer, tmp_path: Path) -> AsyncIterator[Command]:
    async with connection(nats.url, name="test", wait_s=10) as client:
        declared, provisioner = load(stream_replicas=1), Provisioner(client)
        await provisioner.apply(declared, await provisioner.plan(declared))
    async with command(database, tmp_path, "lamp") as made:
        made.environment.update(NATS_URL=nats.url, PULSE_SECRET_KEYS="k" * 32)
        yield made


async def store(pulse: Command) -> None:
    async with transaction(pulse.pool) as database:
        for ahead in (-1, 0):
            await database.execute("SELECT ensure_telemetry_day(current_date + $1::int)", ahead)
        await database.execute(ROWS)
        await database.execute(
            "INSERT INTO device_state (tenant_id, device_id, last_seen) VALUES ('acme', 'lamp', now())"
        )


async def test_a_route_is_made_of_options_and_of_json_shown_and_listed(pulse: Command) -> None:
    said = await pulse(
        "route", "add", "acme", *TO, "--id", "hot", "--name", "too hot", "--when", "metrics.temp > 30.0",
        "--type", "telemetry", "--prefix", "la", "--attribute", "site=north", "--header", "Authorization=hidden-value",
        "--template", '{"t": "${metrics.temp}"}',
    )  # fmt: skip
    first, second = said.splitlines()
    assert first == "Route acme/hot is made."
    read_secret(second.split()[3])
    shown = await pulse.json("route", "show", "acme", "hot")
    assert shown["match"] == {
        "message_types": ["telemetry"],
        "devices": {"ids": [], "prefix": "la", "attributes": {"site": "north"}},
        "expression": "metrics.temp > 30.0",
    }
    assert (shown["template"], shown["health"]["circuit"]) == ('{"t": "${metrics.temp}"}', "closed")
    assert shown["destination"]["header_names"] == ["Authorization"]
    people = await pulse("route", "show", "acme", "hot")
    assert "metrics.temp > 30.0" in people
    assert "hidden-value" not in people + json.dumps(shown)
    draft = {"destination": {"kind": "mqtt", "topic": "alerts/${device.id}"}, "match": {"message_types": ["heartbeat"]}}
    (pulse.folder / "route.json").write_text(json.dumps(draft))
    made = await pulse.json("route", "add", "acme", "@route.json", "--id", "cold", "--disabled")
    assert (made["secret"], made["route"]["enabled"], made["projected"]) == (None, False, True)
    await pulse("route", "add", "acme", "-", "--id", "third", stdin=json.dumps(draft).encode())
    assert [line.split()[0] for line in (await pulse("route", "list", "acme")).splitlines()[1:]] == [
        "cold",
        "hot",
        "third",
    ]
    listed = await pulse.json("route", "list", "acme", "--status", "disabled")
    assert [each["route_id"] for each in listed["routes"]] == ["cold"]
    logged = await pulse.logged()
    assert [(action, target) for action, target, _ in logged] == [
        ("route.create", "hot"), ("route.create", "cold"), ("route.create", "third"),
    ]  # fmt: skip
    assert "hidden-value" not in json.dumps(logged)


async def test_a_route_is_patched_edited_disabled_rotated_and_deleted(pulse: Command) -> None:
    first = (await pulse.json("route", "add", "acme", *TO, "--id", "hot", "--header", "X-A=1"))["secret"]
    patched = await pulse.json("route", "edit", "acme", "hot", '{"match": {"expression": "metrics.temp > 1.0"}}')
    assert patched["route"]["revision"] == 2
    editor = pulse.folder / "editor"
    editor.write_text('#!/bin/sh\nsed -i s/1.0/2.5/ "$1"\n')
    editor.chmod(0o755)
    pulse.environment["EDITOR"] = "./editor"
    edited = (await pulse.json("route", "edit", "acme", "hot"))["route"]
    assert (edited["match"]["expression"], edited["destination"]["header_names"]) == ("metrics.temp > 2.5", ["X-A"])
    pulse.environment["EDITOR"] = "true"
    assert "was not changed" in await pulse("route", "edit", "acme", "hot", exit_code=1)
    assert await pulse("route", "disable", "acme", "hot") == "Route acme/hot is disabled.\n"
    assert (await pulse.json("route", "enable", "acme", "hot"))["route"]["enabled"] is True
    rotated = await pulse.json("route", "rotate", "acme", "hot", "--overlap-s", "60")
    assert rotated["secret"] not in (None, first)
    assert rotated["route"]["signing"]["previous_until"] is not None
    assert await pulse("route", "attempts", "acme", "hot") == "Nothing was sent for this route yet.\n"
    late = await pulse("route", "delete", "acme", "hot", "--revision", "2", exit_code=1)
    assert "`pulse route show acme hot` shows it as it is now" in late
    assert (await pulse.json("route", "delete", "acme", "hot"))["deleted"] is True
    assert await pulse("route", "list", "acme") == "There are no routes.\n"


async def test_a_dry_run_shows_what_would_be_sent(pulse: Command) -> None:
    await store(pulse)
    draft = (*TO, "--when", "metrics.temp > 40.0", "--template", '{"t": "${metrics.temp}"}')
    said = (await pulse("route", "dry-run", "acme", *draft)).splitlines()
    assert said[0] == "10 of the last 50 messages match."
    assert said[2].endswith(" → https://hooks.test/pulse")
    assert [json.loads(line) for line in said if line.startswith("  {")] == [{"t": float(n)} for n in range(41, 46)]
    ran = await pulse.json("route", "dry-run", "acme", *draft, "--messages", "20")
    assert (ran["examined"], ran["matched"]) == (20, 0)
    await pulse("route", "add", "acme", "--id", "hot", "--mqtt", "a/${device.id}", "--when", "metrics.volume > 1.0")
    said = (await pulse("route", "dry-run", "acme", "--id", "hot")).splitlines()
    assert said[1].endswith("which is no match:")
    assert "volume" in said[2]


async def test_what_cannot_be_done_is_one_line_that_says_what_to_do(pulse: Command) -> None:
    await pulse("route", "add", "acme", *TO, "--id", "hot")
    for arguments, exit_code, said in (
        (("add", "acme", *TO, "--when", "metrics.temp > && true"), 1, "metrics.temp > ⟨here⟩&& true"),
        (("dry-run", "acme", *TO, "--when", "nobody > 1"), 1, "undeclared reference to 'nobody'"),
        (("edit", "acme", "hot", '{"match":{"expression":"metrics.temp >"}}'), 1, "metrics.temp >⟨here⟩"),
        (("add", "acme", "--webhook", "http://127.0.0.1/x"), 1, "destination.url: 127.0.0.1 is not allowed"),
        (("add", "acme", *TO, "--template", "{"), 1, "template: a template is JSON"),
        (("add", "acme", *TO, "--id", "hot"), 1, "`pulse route list acme` lists those that are there"),
        (("add", "nobody", *TO), 1, "nobody"),
        (("show", "acme", "cold"), 1, "has no route 'cold'"),
        (("edit", "acme", "hot", '{"destination":{"url":"https://other.test/"},"name":1}'), 1, "name"),
        (("add", "acme"), 2, "--webhook URL"),
        (("add", "acme", *TO, "--mqtt", "a"), 2, "one destination"),
        (("add", "acme", "{"), 2, "cut off"),
        (("add", "acme", *TO, "--header", "nothing"), 2, "NAME=VALUE"),
        (("dry-run", "acme"), 2, "--id"),
    ):
        assert said in await pulse("route", *arguments, exit_code=exit_code), arguments
    assert len((await pulse.json("route", "list", "acme"))["routes"]) == 1
    del pulse.environment["PULSE_SECRET_KEYS"]
    assert "secret_keys" in await pulse("route", "add", "acme", *TO, exit_code=2)


async def test_a_change_that_the_edge_cannot_hear_of_now_is_saved(pulse: Command, nats: NatsServer) -> None:
    nats.kill()
    made = await pulse.json("route", "add", "acme", "--mqtt", "a", "--id", "hot")
    assert made["projected"] is False
