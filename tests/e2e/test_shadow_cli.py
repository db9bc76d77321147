"""`pulse shadow` in processes of its own, on a real PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pulse.adapters.postgres.pool import transaction
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.domain.shadow import Sections, Shadow, ShadowBounds, ShadowKey, Update
from pulse.domain.shadow_requests import Changed, change
from pulse_command import Command, command

LAMP = ("acme", "lamp")


@pytest.fixture
async def pulse(database: str, tmp_path: Path) -> AsyncIterator[Command]:
    async with command(database, tmp_path, "lamp") as made:
        yield made


async def report(pulse: Command, reported: dict[str, object]) -> None:
    key = ShadowKey("acme", "lamp")
    bounds = ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8)

    def decide(shadow: Shadow) -> Changed:
        return change(key, shadow, Update(Sections(reported=reported)), at_ms=5000, who="device", bounds=bounds)

    await ShadowStore(pulse.pool, names_max=16).change(key, decide)


async def test_what_is_desired_is_patched_from_an_argument_a_file_and_stdin(pulse: Command) -> None:
    said = await pulse("shadow", "patch", *LAMP, '{"power": "on", "light": {"red": 1}}')
    assert said == "The shadow of acme/lamp is at version 1; left to do: power, light.red.\n"
    (pulse.folder / "patch.json").write_text('{"light": {"blue": 2}}')
    patched = await pulse.json("shadow", "patch", *LAMP, "@patch.json", "--version", "1")
    assert patched["state"]["desired"] == {"power": "on", "light": {"red": 1, "blue": 2}}
    await report(pulse, {"power": "on", "light": {"red": 1}})
    said = await pulse("shadow", "patch", *LAMP, "-", stdin=b'{"light": {"blue": null}}')
    assert said == "The shadow of acme/lamp is at version 4; the device has it all.\n"
    async with transaction(pulse.pool) as database:
        assert await database.fetchval("SELECT count(*) FROM outbox WHERE topic = 'shadow/update/delta'") == 3
    emptied = await pulse.json("shadow", "patch", *LAMP, "null")
    assert (emptied["version"], emptied["state"]["desired"]) == (5, {})
    logged = await pulse.logged()
    assert [(action, target) for action, target, _ in logged] == [("shadow.change", "lamp")] * 4
    assert logged[0][2] == {"name": "", "desired": {"power": "on", "light": {"red": 1}}}


async def test_a_shadow_is_shown_with_what_is_left_to_do_and_nothing_in_it_reaches_the_terminal(
    pulse: Command,
) -> None:
    await pulse("shadow", "patch", *LAMP, '{"power": "on", "mode": "a"}')
    await report(pulse, {"power": "off", "mode": "a", "title": "\x9b31m\u202e[bold]"})
    lines = (await pulse("shadow", "get", *LAMP)).splitlines()
    assert lines[0].startswith("version 2, changed ")
    assert [line.split() for line in lines[1:]] == [
        ["attribute", "desired", "reported"],
        ["mode", '"a"', '"a"'],
        ["power", '"on"', '"off"', "to", "do"],
        ["title", "–", r'"\x9b31m\u202e[bold]"'],
    ]
    document = await pulse.json("shadow", "get", *LAMP)
    assert (document["version"], document["state"]["delta"]) == (2, {"power": "on"})


async def test_the_names_and_the_last_changes_are_listed_and_a_shadow_is_deleted(pulse: Command) -> None:
    assert "has no shadow" in await pulse("shadow", "names", *LAMP)
    await pulse("shadow", "patch", *LAMP, "{}")
    await report(pulse, {"power": "on"})
    await pulse("shadow", "patch", *LAMP, '{"rate": 5}', "--name", "config")
    assert await pulse("shadow", "names", *LAMP) == "(unnamed)\nconfig\n"
    assert await pulse.json("shadow", "delete", *LAMP, "--version", "2") == {"deleted": True, "version": 3}
    assert await pulse.json("shadow", "names", *LAMP) == {"names": ["config"]}
    changes = (await pulse.json("shadow", "changes", *LAMP))["changes"]
    assert [(each["version"], each["patch"]) for each in changes] == [
        (3, None), (2, {"reported": {"power": "on"}}), (1, {"desired": {}}),
    ]  # fmt: skip
    assert changes[1]["who"] == "device"
    shown = (await pulse("shadow", "changes", *LAMP)).splitlines()
    assert shown[1].startswith("3 ")
    assert shown[1].split()[-1] == "deleted"
    assert '{"reported":{"power":"on"}}' in shown[2]


async def test_what_cannot_be_done_is_one_line_that_says_what_to_do(pulse: Command) -> None:
    await pulse("shadow", "patch", *LAMP, '{"power": "on"}', "--name", "main")
    long = json.dumps({"power": "x" * 9000})
    for arguments, exit_code, said in (
        (("get", "acme", "nobody"), 1, "pulse device list --tenant acme"),
        (("get", *LAMP), 1, "`pulse shadow names acme lamp` lists those it has"),
        (("patch", *LAMP, "{}", "--name", "main", "--version", "7"), 1,
         "the shadow is at version 1 (`pulse shadow get acme lamp --name main` shows it as it is now)"),
        (("delete", *LAMP, "--name", "main", "--version", "0"), 1, "the shadow is at version 1"),
        (("delete", *LAMP), 1, "there is no such shadow"),
        (("patch", *LAMP, long), 1, "desired: would have 9012 bytes, of 8192 that it may have; shadow_bytes_max"),
        (("patch", *LAMP, '{"a":' * 9 + "1" + "}" * 9), 1, "shadow_depth_max"),
        (("patch", *LAMP, '{"a": }'), 2, "malformed"),
        (("patch", *LAMP, "[1]"), 2, "must be a JSON object, or null"),
        (("patch", *LAMP, '{"a":1,"a":2}'), 2, "twice"),
        (("patch", *LAMP, '{"a":{"b":"\\u0000"}}'), 2, "desired.a.b: U+0000 cannot be stored"),
        (("patch", *LAMP, "@missing.json"), 2, "missing.json: No such file"),
        (("patch", *LAMP, "{}", "--version", "-1"), 2, "--version"),
        (("get", *LAMP, "--name", "a/b"), 2, "--name must be 1 to 64"),
    ):  # fmt: skip
        assert said in await pulse("shadow", *arguments, exit_code=exit_code), arguments
    document = await pulse.json("shadow", "get", *LAMP, "--name", "main")
    assert (document["version"], document["state"]["desired"]) == (1, {"power": "on"})
    assert len(await pulse.logged()) == 1


async def test_while_postgresql_is_away_it_is_said_in_one_line(tmp_path: Path, pulse: Command) -> None:
    pulse.environment["DATABASE_URL"] = "postgresql://pulse@127.0.0.1:1/pulse"
    assert "PostgreSQL is away" in await pulse("shadow", "get", *LAMP, exit_code=1)
