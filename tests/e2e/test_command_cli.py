"""`pulse command` in processes of its own, on a real PostgreSQL; what devices answer is entered as the worker does."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pulse.adapters.postgres.command_fleets import FleetLots
from pulse.adapters.postgres.command_rows import Moved, lock_commands, write_moved
from pulse.adapters.postgres.pool import transaction
from pulse.domain.command import DEVICE, Event, Word, moved
from pulse_command import Command, command, ended

LIMIT_S = 30


@pytest.fixture
async def pulse(database: str, tmp_path: Path) -> AsyncIterator[Command]:
    async with command(database, tmp_path, "lamp", "kettle", "kettle-2") as made:
        yield made


async def say(pulse: Command, command_id: str, event: Event, **what: object) -> None:
    """A device's word on a command, taken in."""
    at_ms = time.time_ns() // 1_000_000
    async with transaction(pulse.pool) as connection:
        key = ("acme", command_id)
        before = (await lock_commands(connection, [key]))[key]
        word = Word(event, at_ms, DEVICE, **what)  # type: ignore[arg-type]
        after = moved(before, word)
        assert after is not None
        await write_moved(connection, [Moved(before, after, [(after.state, word)])], at_ms=at_ms)


async def line_of(process: subprocess.Popen[bytes]) -> bytes:
    """The next line of its stdout."""
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        return await asyncio.to_thread(process.stdout.readline)


async def expand(pulse: Command) -> None:
    while await FleetLots(pulse.pool).advance(time.time_ns() // 1_000_000):
        pass


async def test_a_command_is_sent_shown_listed_and_cancelled(pulse: Command) -> None:
    (pulse.folder / "payload.json").write_text('{"delay_s": 5}')
    arguments = ("send", "acme", "lamp", "reboot", "@payload.json", "--ttl", "1h", "--timeout", "90s")
    sent = await pulse.json("command", *arguments, "--idempotency-key", "k1")
    made = sent["command"]
    assert (sent["made"], made["state"], made["payload"], made["timeout_s"]) == (True, "queued", {"delay_s": 5}, 90)
    again = await pulse("command", *arguments, "--idempotency-key", "k1")
    assert again == f"Command {made['command_id']} for acme/lamp was made before, under the same key.\n"
    await pulse("command", "send", "acme", "kettle", "boil", "-", "--ordered", stdin=b"[1]")
    held = await pulse("command", "send", "acme", "kettle", "boil", "--ordered")
    assert held.endswith("is made; it waits for an older one.\n")
    listed = (await pulse("command", "list", "acme")).splitlines()
    assert listed[0].split() == ["command", "device", "name", "state", "made", "by", "error"]
    assert len(listed) == 4
    first = await pulse.json("command", "list", "acme", "--limit", "2")
    rest = await pulse.json("command", "list", "acme", "--limit", "2", "--before", first["before"])
    assert [each["command_id"] for each in rest["commands"]] == [made["command_id"]]
    of_lamp = await pulse.json("command", "list", "acme", "--device", "lamp", "--state", "queued")
    assert [each["command_id"] for each in of_lamp["commands"]] == [made["command_id"]]
    assert "is cancelled" in await pulse("command", "cancel", "acme", made["command_id"])
    shown = await pulse("command", "show", "acme", made["command_id"])
    assert [line.split()[0] for line in shown.splitlines()][-2:] == ["queued", "cancelled"]
    assert "has ended" in await pulse("command", "cancel", "acme", made["command_id"], exit_code=1)
    actions = [(action, target) for action, target, _ in await pulse.logged()]
    assert actions == [
        ("command.create", "lamp"),
        ("command.create", "kettle"),
        ("command.create", "kettle"),
        ("command.cancel", made["command_id"]),
    ]


async def test_with_wait_each_state_is_told_until_the_last_which_is_the_exit_code(pulse: Command) -> None:
    for event, exit_code in ((Event.SUCCEED, 0), (Event.FAIL, 1)):
        with pulse.start("command", "send", "acme", "lamp", "reboot", "--wait", "--json") as process:
            queued = json.loads(await line_of(process))
            assert queued["state"] == "queued"
            await say(pulse, queued["command_id"], Event.SEND)
            assert json.loads(await line_of(process))["state"] == "sent"
            await say(pulse, queued["command_id"], Event.ACKNOWLEDGE)
            assert json.loads(await line_of(process))["state"] == "acknowledged"
            if event is Event.SUCCEED:
                await say(pulse, queued["command_id"], event, result=b'{"took_s":3}')
            else:
                await say(pulse, queued["command_id"], event, error="no \x9bpower")
            last = json.loads(await line_of(process))
            said = await ended(process, exit_code=exit_code)
        assert last["who"] == "device"
        if exit_code:
            assert (last["state"], last["error"]) == ("failed", "no \x9bpower")
            assert said == f"pulse: command {queued['command_id']} failed: no \\x9bpower\n"
        else:
            assert (last["state"], last["result"]) == ("succeeded", {"took_s": 3})


async def test_watching_a_command_that_has_ended_tells_how_it_came_there(pulse: Command) -> None:
    sent = await pulse.json("command", "send", "acme", "lamp", "reboot")
    await say(pulse, sent["command"]["command_id"], Event.SUCCEED, result=b'"done"')
    shown = (await pulse("command", "watch", "acme", sent["command"]["command_id"])).splitlines()
    assert [line.split()[3:] for line in shown[:2]][1] == ["succeeded", "by", "device"]
    assert shown[2] == '"done"'


async def test_ctrl_c_ends_the_waiting_and_not_the_command(pulse: Command) -> None:
    with pulse.start("command", "send", "acme", "lamp", "reboot", "--wait") as process:
        made = (await line_of(process)).split()[1].decode()
        assert b"queued" in await line_of(process)
        process.send_signal(signal.SIGINT)
        said = await ended(process, exit_code=130)
    assert said == f"it goes on; `pulse command watch acme {made}` follows it further\n"
    assert (await pulse.json("command", "show", "acme", made))["command"]["state"] == "queued"


async def test_a_fleet_is_told_and_followed_until_all_have_ended(pulse: Command) -> None:
    with pulse.start("command", "fleet", "send", "acme", "boil", "--prefix", "kettle", "--wait", "--json") as process:
        begun = json.loads(await line_of(process))
        assert (begun["stage"], begun["devices"]) == ("expanding", 0)
        await expand(pulse)
        while (expanded := json.loads(await line_of(process)))["stage"] == "expanding":
            pass  # between two lots of the expansion
        assert (expanded["stage"], expanded["counts"]) == ("expanded", {"queued": 2})
        listed = await pulse.json("command", "list", "acme", "--fleet", begun["fleet_id"])
        first, second = [each["command_id"] for each in listed["commands"]]
        await say(pulse, first, Event.SUCCEED)
        assert json.loads(await line_of(process))["counts"] == {"queued": 1, "succeeded": 1}
        await say(pulse, second, Event.REJECT)
        said = await ended(process, exit_code=1)
    assert "1 of 2 commands have not succeeded" in said
    shown = await pulse("command", "fleet", "show", "acme", begun["fleet_id"])
    assert "rejected" in shown
    again = await pulse("command", "fleet", "watch", "acme", begun["fleet_id"], exit_code=1)
    assert f"`pulse command list acme --fleet {begun['fleet_id']}" in again
    listed = (await pulse("command", "fleet", "list", "acme")).splitlines()
    assert listed[1].split()[:5] == [begun["fleet_id"], "boil", "expanded", "2", "2"]


async def test_a_fleet_command_is_cancelled(pulse: Command) -> None:
    sent = await pulse.json("command", "fleet", "send", "acme", "boil", "--device", "lamp", "--idempotency-key", "k")
    fleet_id = sent["fleet_command"]["fleet_id"]
    assert sent["fleet_command"]["filter"] == {"devices": ["lamp"]}
    assert "is cancelled" in await pulse("command", "fleet", "cancel", "acme", fleet_id)
    await expand(pulse)
    assert (await pulse.json("command", "fleet", "show", "acme", fleet_id))["fleet_command"]["stage"] == "cancelled"
    assert "there was no such device" in await pulse("command", "fleet", "watch", "acme", fleet_id)
    assert await pulse("command", "fleet", "cancel", "acme", fleet_id, exit_code=1)
    actions = [action for action, _, _ in await pulse.logged()]
    assert actions == ["fleet_command.create", "fleet_command.cancel"]


async def test_what_cannot_be_done_is_one_line_that_says_what_to_do(pulse: Command) -> None:
    await pulse("command", "send", "acme", "lamp", "reboot", "--idempotency-key", "k")
    for arguments, exit_code, said in (
        (("send", "acme", "nobody", "reboot"), 1, "pulse device list --tenant acme"),
        (("send", "nobody", "lamp", "reboot"), 1, "pulse tenant add nobody"),
        (("send", "acme", "lamp", "re boot"), 1, "name: must be 1 to 64"),
        (("send", "acme", "lamp", "reboot", "{"), 2, "JSON is cut off"),
        (("send", "acme", "lamp", "reboot", "--ttl", "soon"), 2, "'soon' is not a length of time"),
        (("send", "acme", "lamp", "reboot", "--ttl", "365d"), 1, "2592000 at the most; command_ttl_s_max is 2592000"),
        (("send", "acme", "lamp", "reboot", "[1]", "--idempotency-key", "k"), 1, "this key has made another command"),
        (("send", "acme", "lamp", "reboot", json.dumps("x" * 9000)), 1, "command_payload_bytes_max is 8192"),
        (("show", "acme", "nothing"), 1, "`pulse command list acme` lists them"),
        (("watch", "acme", "nothing"), 1, "`pulse command list acme` lists them"),
        (("list", "acme", "--before", "x"), 2, "--before: must be as the page before told it"),
        (("list", "acme", "--state", "asleep"), 2, "asleep"),
        (("fleet", "send", "acme", "reboot"), 1, "one of all, devices, prefix, attributes is needed"),
        (("fleet", "send", "acme", "reboot", "--device", "nobody"), 1, "no device 'nobody'"),
        (("fleet", "send", "acme", "reboot", "--attribute", "site"), 2, "NAME=VALUE"),
        (("fleet", "send", "acme", "reboot", "--attribute", "floor:=x"), 2, "a number, true or false"),
        (("fleet", "show", "acme", "nothing"), 1, "`pulse command fleet list acme` lists them"),
    ):
        assert said in await pulse("command", *arguments, exit_code=exit_code), arguments
    assert len((await pulse.json("command", "list", "acme"))["commands"]) == 1
