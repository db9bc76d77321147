"""`pulse dead-letters` in processes of its own, on real servers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dead_letter_bench import Bench, bench, envelope
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.streams import stream_state
from pulse.domain.route import make_job
from worker_bench import until

PROCESS_S_MAX = 120
HOSTILE = '{"metrics":{"\x1b]0;owned\x07":1,"a\u202eb":2},"x":"[bold red]"}'.encode()


class DeadLettersCommand:
    """The command, on the servers of the bench that it carries."""

    def __init__(self, system: Bench, folder: Path, environment: dict[str, str]) -> None:
        self.system = system
        self.folder = folder
        self._environment = environment

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Begin to run it."""
        return subprocess.Popen(
            [sys.executable, "-m", "pulse", "dead-letters", *arguments],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    async def __call__(self, *arguments: str, exit_code: int = 0, stdin: bytes = b"") -> str:
        """Run it to its end; returns stdout, or stderr where it is to fail."""
        with self.start(*arguments) as process:
            out, err = await asyncio.to_thread(process.communicate, stdin, PROCESS_S_MAX)
        assert process.returncode == exit_code, f"exit code {process.returncode}\n{out!r}\n{err!r}"
        assert b"Traceback" not in err
        return (err if exit_code else out).decode()

    async def json(self, *arguments: str) -> Any:
        """What it prints with --json."""
        return json.loads(await self(*arguments, "--json"))

    async def die(self, *bodies: bytes, **headers: str) -> list[int]:
        """Have these become dead letters; returns their ids."""
        before = len(await self.system.dead())
        await self.system.publish(*bodies, **headers)

        async def dead() -> bool:
            return len(await self.system.dead()) >= before + len(bodies)

        await self.system.ingest(dead)
        return [letter["id"] for letter in await self.system.dead()][before:]


@pytest.fixture
async def pulse(nats: NatsServer, database: str, tmp_path: Path) -> AsyncIterator[DeadLettersCommand]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PULSE_")}
    environment |= {"NATS_URL": nats.url, "DATABASE_URL": database, "COLUMNS": "160"}
    async with bench(nats.url, database) as system:
        yield DeadLettersCommand(system, tmp_path, environment)


async def test_where_there_is_nothing_it_says_so(pulse: DeadLettersCommand) -> None:
    assert await pulse("list") == "There are no dead letters.\n"
    assert await pulse("list", "--tenant", "t1") == "No dead letter matches.\n"
    assert await pulse.json("list") == {"dead_letters": [], "before": None}
    assert "nothing was replayed" in await pulse("replay", "--all", exit_code=1)
    assert "nothing was purged" in await pulse("purge", "--all", "--yes", exit_code=1)
    assert "there is no dead letter 5" in await pulse("show", "5", exit_code=1)


async def test_a_call_that_does_not_say_which_letters_is_refused(pulse: DeadLettersCommand) -> None:
    await pulse.die(b"bad")
    for arguments, said in (
        (["replay"], "--all"),
        (["replay", "1", "--all"], "--all"),
        (["purge", "--yes"], "--all"),
        (["replay", "--all", "--body", "/dev/null"], "give its ID"),
        (["list", "--reason", "boredom"], "boredom"),
        (["list", "--since", "yesterday"], "10m"),
    ):
        assert said in await pulse(*arguments, exit_code=2)


async def test_letters_are_listed_by_page_and_filter(pulse: DeadLettersCommand) -> None:
    ids = await pulse.die(b'{"test":1}', envelope(b"{}", device="boiler"), b"\xff")
    shown = await pulse("list")
    assert [line.split()[0] for line in shown.splitlines()] == ["id", *map(str, reversed(ids))]
    assert "t1/boiler" in shown
    first = await pulse.json("list", "--limit", "2")
    rest = await pulse.json("list", "--limit", "2", "--before", str(first["before"]))
    assert [one["id"] for page in (first, rest) for one in page["dead_letters"]] == ids[::-1]
    for options, found in (
        (["--reason", "invalid_payload"], ids[1:2]),
        (["--device", "boiler"], ids[1:2]),
        (["--since", "1h", "--state", "waiting"], ids[::-1]),
        (["--until", "2020-01-01"], []),
        (["--id", str(ids[2])], ids[2:]),
    ):
        assert [one["id"] for one in (await pulse.json("list", *options))["dead_letters"]] == found


async def test_a_letter_is_shown_whole_and_nothing_in_it_reaches_the_terminal(pulse: DeadLettersCommand) -> None:
    hostile, binary, empty = await pulse.die(HOSTILE, bytes(range(256)), b"", Trace="\x1b]0;owned\x07")
    shown = await pulse("show", str(hostile))
    assert "invalid_envelope" in shown
    assert "[bold red]" in shown
    assert shown.replace("\n", "").isprintable()
    assert (await pulse.json("show", str(hostile)))["body"].encode() == HOSTILE
    assert "00000040  40 41 42 43" in await pulse("show", str(binary))
    assert "(empty)" in await pulse("show", str(empty))
    assert (await pulse.json("show", str(binary)))["encoding"] == "base64"
    with pulse.start("show", str(binary), "--raw") as process:
        out, _ = await asyncio.to_thread(process.communicate, b"", PROCESS_S_MAX)
    assert out == bytes(range(256))


async def test_letters_are_replayed_once_unless_it_is_said_again(pulse: DeadLettersCommand) -> None:
    ids = await pulse.die(b"1", b"2", b"3")
    assert await pulse.json("replay", str(ids[0])) == {"replayed": 1, "skipped": 0, "failed": 0, "last_sequence": 4}
    done = await pulse("replay", "--reason", "invalid_envelope")
    before = "1 was replayed before (--again replays it too)"
    assert done == f"2 dead letters are replayed, the last as message 6; {before}.\n"
    assert (await pulse.json("replay", "--all"))["skipped"] == 3
    assert (await pulse.json("replay", "--all", "--again"))["replayed"] == 3
    shown = await pulse("show", str(ids[0]))
    assert "2 times" in shown
    assert "replayed" in await pulse("list", "--state", "replayed")
    logged = await pulse.system.pool.fetch("SELECT action, target, key_id FROM audit_log ORDER BY id")
    assert [tuple(row) for row in logged] == [("dead-letters.replay", on, None) for on in (str(ids[0]), "", "")]


async def test_a_mended_body_is_stored(pulse: DeadLettersCommand) -> None:
    first, second, third = await pulse.die(b"bad", b"worse", b"worst")
    (pulse.folder / "mended.json").write_bytes(envelope())
    await pulse("replay", str(first), "--body", "mended.json")
    await pulse("replay", str(second), "--body", "-", stdin=envelope())
    editor = pulse.folder / "editor"
    editor.write_text(f'#!/bin/sh\ncp "{pulse.folder}/mended.json" "$1"\n')
    editor.chmod(0o755)
    pulse._environment["EDITOR"] = "./editor"
    await pulse("replay", str(third), "--edit")
    pulse._environment["EDITOR"] = "true"
    assert "was not changed" in await pulse("replay", str(third), "--edit", exit_code=1)
    await pulse.system.ingest(lambda: pulse.system.settled(6))
    assert len(await pulse.system.stored()) == 3


async def test_a_replay_that_is_killed_half_way_and_repeated_sends_each_letter_once(pulse: DeadLettersCommand) -> None:
    await pulse.die(*(b"%d" % number for number in range(60)))

    async def accepted() -> int:
        return (await stream_state(pulse.system.client, "TELEMETRY")).last_seq

    async def begun() -> bool:
        return await accepted() >= 65

    # At five a second it would take another eleven.
    with pulse.start("replay", "--all", "--rate", "5") as process:
        await until(begun)
        process.send_signal(signal.SIGKILL)
    assert 65 <= await accepted() < 120
    report = await pulse.json("replay", "--all")
    assert report["replayed"] + report["skipped"] == 60
    assert await accepted() == 120
    bodies = [(await pulse.system.client.jetstream().get_msg("TELEMETRY", seq)).data for seq in range(61, 121)]
    assert sorted(bodies, key=lambda body: int(body or b"0")) == [b"%d" % number for number in range(60)]


async def test_without_nats_a_replay_fails_in_one_line_and_changes_nothing(
    pulse: DeadLettersCommand, nats: NatsServer
) -> None:
    await pulse.die(b"bad")
    nats.kill()
    assert "cannot connect to NATS" in await pulse("replay", "--all", exit_code=1)
    assert (await pulse.json("list"))["dead_letters"][0]["replays"] == 0


async def test_a_purge_asks_first_and_says_how_many(pulse: DeadLettersCommand) -> None:
    ids = await pulse.die(b"1", b"2", envelope(b"{}"))
    await pulse("replay", str(ids[0]))
    assert "would purge 1 " in await pulse("purge", "--reason", "invalid_payload", exit_code=2)
    assert await pulse.json("purge", "--state", "replayed", "--yes") == {"purged": 1}
    assert [letter["id"] for letter in await pulse.system.dead()] == ids[1:]
    assert await pulse("purge", "--all", "--yes") == "2 dead letters are purged.\n"
    assert await pulse.system.dead() == []
    logged = await pulse.system.pool.fetch("SELECT action, details->'filter'->>'replayed' FROM audit_log ORDER BY id")
    assert [tuple(row) for row in logged][1:] == [("dead-letters.purge", "true"), ("dead-letters.purge", None)]


async def test_jobs_of_a_route_are_found_by_it(pulse: DeadLettersCommand) -> None:
    ids = await pulse.die(b"1", b"2")
    await pulse.system.pool.execute(
        "UPDATE dead_letters SET stream = 'ROUTES', in_stream = false, body = $2 WHERE id = $1",
        ids[0], make_job(envelope(), route_id="hot", position=7),
    )  # fmt: skip
    found = (await pulse.json("list", "--route", "hot"))["dead_letters"]
    assert [(one["id"], one["sequence"]) for one in found] == [(ids[0], None)]
    shown = await pulse("show", str(ids[0]))
    assert "ROUTES, which it never came into" in shown
    assert await pulse("purge", "--route", "cold", "--yes", exit_code=1)
    assert await pulse.json("purge", "--route", "hot", "--yes") == {"purged": 1}
