"""`pulse up` in a real process: from the first start to what is left when it, or a part of it, is killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import asyncpg
import psutil  # type: ignore[import-untyped]
import pytest

from pulse_up import END_S_MAX, SOURCE, Instance, prepare, wait_for

STOP_S_MAX = 25.0
"""Asked of a quiet machine it is five; of a busy one, that it ends by itself."""
ROW_S_MAX = 10.0
"""On a quiet machine a row takes a twentieth of a second; without the ack wait's 30 s it is there before this."""
NOBODY = 65534


async def rows(database_url: str) -> list[str]:
    """The metrics of all readings, in the order of the stream."""
    connection = await asyncpg.connect(database_url)
    try:
        return [row["metrics"] for row in await connection.fetch("SELECT metrics FROM telemetry ORDER BY position")]
    finally:
        await connection.close()


async def until_rows(database_url: str, count: int, *, limit_s: float = 30.0) -> float:
    """Return how long it took until there were so many rows."""
    started = time.monotonic()
    while True:
        found = await rows(database_url)
        took_s = time.monotonic() - started
        if len(found) >= count:
            assert len(found) == count, found
            return took_s
        assert took_s < limit_s, f"{len(found)} rows, not {count}"
        await asyncio.sleep(0.02)


def accepted(instance: Instance, metrics: dict[str, object], *, key: str) -> None:
    """Send until it is accepted: what is being healed answers with an error or not at all."""

    def sent() -> bool:
        try:
            status, answer = instance.send(metrics, key=key)
        except OSError:
            return False
        assert status in (202, 503), answer
        return status == 202

    wait_for(sent, "a reading is accepted")


def nothing_left(instance: Instance, family: list[psutil.Process]) -> None:
    """No process and no port; PostgreSQL's last backends see the end of their postmaster at once, but not before."""
    wait_for(lambda: not psutil.wait_procs(family, timeout=0)[1], f"all of {family} have ended", limit_s=STOP_S_MAX)
    wait_for(lambda: instance.ports.listened_on() == [], "nobody listens any more", limit_s=STOP_S_MAX)

    def in_folder() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cmdline"]) if str(instance.folder) in str(each.info["cmdline"])]

    wait_for(lambda: in_folder() == [], "nothing runs in the folder any more", limit_s=STOP_S_MAX)


def stops_cleanly(instance: Instance, number: signal.Signals) -> None:
    """By itself, with exit code 0, and nothing is left."""
    family = instance.family()
    assert len(family) > 5
    before = time.monotonic()
    instance.signal(number)
    assert instance.process is not None
    assert instance.process.wait(END_S_MAX) == 0, instance.output
    assert time.monotonic() - before < STOP_S_MAX
    nothing_left(instance, family)


async def test_from_a_first_start_to_a_second_one_that_finds_the_data(instance: Instance) -> None:
    """Done when 1: a curl for pasting, its row within a second, Ctrl-C within five, and all of it there again."""
    assert " " in str(instance.folder)
    instance.start()
    assert f"gateway      {instance.gateway_url} " in instance.output
    assert f"nats://127.0.0.1:{instance.ports.nats} " in instance.output
    assert f"postgresql://127.0.0.1:{instance.ports.postgres}/pulse" in instance.output
    pasted = subprocess.run(["sh", "-c", instance.curl], capture_output=True, text=True, check=True, timeout=60)
    assert pasted.stdout.startswith("HTTP/1.1 202"), pasted.stdout
    assert '"durability":"disk"' in pasted.stdout
    assert await until_rows(instance.database_url, 1) < ROW_S_MAX
    assert 'pulse_published_total{outcome="stored",stream="TELEMETRY"} 1.0' in metric_lines(instance)
    token = instance.token
    stops_cleanly(instance, signal.SIGINT)
    assert not (instance.data_dir / "instance.toml").exists()
    assert "the data are kept" in instance.output

    instance.start()
    assert instance.token == token
    assert instance.send({"n": 2}, token=token)[0] == 202
    await until_rows(instance.database_url, 2)
    audit = instance.pulse("audit", "--rows")
    assert audit.returncode == 0, audit
    stops_cleanly(instance, signal.SIGTERM)


def test_the_files_with_secrets_are_for_their_owner_alone(running: Instance) -> None:
    for name in ("instance.toml", "secrets.toml", "demo-token", "lock"):
        assert (running.data_dir / name).stat().st_mode & 0o077 == 0, name
    assert "pulse_" in running.output
    assert running.nats_url.partition("@")[0].rpartition(":")[2] not in running.output
    assert running.database_url.partition("@")[0].rpartition(":")[2] not in running.output


def test_a_second_one_in_the_same_folder_says_who_runs(running: Instance) -> None:
    second = running.pulse("up")
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert f"pid {running.pid}" in second.stderr
    assert "--data-dir" in second.stderr
    assert running.send({"n": 1})[0] == 202, "the first one was disturbed"


def test_a_taken_port_is_named_with_its_owner_and_its_setting(instance: Instance) -> None:
    with socket.create_server(("127.0.0.1", instance.ports.postgres)):
        refused = instance.pulse("up")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"port {instance.ports.postgres} for PostgreSQL is taken by" in refused.stderr
    assert f"pid {os.getpid()}" in refused.stderr
    assert "embedded_postgres_port" in refused.stderr
    assert instance.ports.listened_on() == [], "something was started all the same"


async def test_killed_it_leaves_no_orphan_and_the_next_one_recovers(instance: Instance) -> None:
    instance.start()
    assert instance.send({"n": 1})[0] == 202
    await until_rows(instance.database_url, 1)  # else it waits for the ack wait of 30 s; tests/chaos has that
    family = instance.family()
    instance.signal(signal.SIGKILL)
    nothing_left(instance, family)
    instance.start()
    assert instance.send({"n": 2})[0] == 202
    await until_rows(instance.database_url, 2)
    audit = instance.pulse("audit", "--rows")
    assert audit.returncode == 0, audit


async def test_every_child_that_is_killed_comes_back_by_itself(instance: Instance) -> None:
    instance.start()
    children = {
        "nats": ["nats-server"],
        "postgresql": ["postgres", "-D"],
        "ingest": ["serve", "ingest"],
        "maintenance": ["serve", "maintenance"],
        "gateway": ["serve", "gateway"],
    }
    for number, (name, words) in enumerate(children.items(), start=1):
        victim = instance.child(words)
        victim.kill()
        # What is sent while nats-server still takes the dead worker for a live one waits for the ack wait of 30 s.
        psutil.wait_procs([victim], timeout=STOP_S_MAX)
        accepted(instance, {"killed": name}, key=name)
        wait_for(partial(replaced, instance, words, victim), f"{name} is there again")
        await until_stored(instance, number)
    assert [name in row for name, row in zip(children, await rows(instance.database_url), strict=True)] == [True] * 5
    assert instance.process is not None
    assert instance.process.poll() is None
    audit = instance.pulse("audit", "--rows")
    assert audit.returncode == 0, audit


def replaced(instance: Instance, words: list[str], old: psutil.Process) -> bool:
    try:
        return bool(instance.child(words) != old)
    except (AssertionError, psutil.Error):
        return False


async def until_stored(instance: Instance, count: int) -> None:
    """As `until_rows`, with PostgreSQL away for a moment."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            if len(await rows(instance.database_url)) >= count:
                return
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            pass
        assert time.monotonic() < deadline, f"not {count} rows"
        await asyncio.sleep(0.05)


def test_ctrl_c_in_the_middle_of_a_start_leaves_nothing(instance: Instance) -> None:
    instance.start(wait=False)
    wait_for(lambda: bool(instance.ports.listened_on()) or instance.process_ended, "it begins to start")
    family = instance.family()
    assert instance.stop() == 0, instance.output
    nothing_left(instance, family)


def test_under_load_it_stops_in_time_and_loses_nothing(instance: Instance) -> None:
    """Many requests are under way when Ctrl-C comes; each that was answered 202 is a row after the next start."""
    instance.start()
    load = subprocess.Popen(
        instance.command("simulate", "--devices", "50", "--rate", "500", "--duration", "60"),
        cwd=instance.folder,
        env=instance.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: "telemetry" in metric_lines(instance), "the load has begun")
        stops_cleanly(instance, signal.SIGHUP)
    finally:
        load.kill()
        load.wait()
    instance.start()
    wait_for(lambda: instance.pulse("audit", "--rows").returncode == 0, "the audit agrees")


def metric_lines(instance: Instance) -> str:
    with urllib.request.urlopen(f"{instance.gateway_url}/metrics", timeout=30) as answer:  # noqa: S310 - our own URL
        lines = answer.read().decode().splitlines()
    told = ("pulse_gateway_requests_total", "pulse_published_total")
    return "\n".join(line for line in lines if line.startswith(told))


@pytest.fixture
def home_of_nobody() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pulse nobody ", ignore_cleanup_errors=True) as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield Path(folder)


def python_of_nobody(home: Path) -> str:
    """A Python that an ordinary user can run Pulse with; its version has to be that of the installed packages."""
    code = "import asyncpg, httptools, msgspec, nats, psutil, pulse.app"
    environment = {"PYTHONPATH": os.pathsep.join([str(SOURCE), sysconfig.get_path("purelib")])}
    for candidate in (sys.executable, shutil.which("python3", path=os.defpath)):
        if candidate is None:
            continue
        try:
            done = subprocess.run(
                [candidate, "-c", code],
                cwd=home,
                env=environment,
                capture_output=True,
                timeout=60,
                check=False,
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
            )
        except PermissionError:
            continue
        if done.returncode == 0:
            return candidate
    pytest.skip("there is no Python here that an ordinary user could run with what Pulse needs")


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test here is one of an ordinary user")
async def test_an_ordinary_user_can_run_it(home_of_nobody: Path) -> None:
    instance = prepare(
        home_of_nobody,
        run_as=NOBODY,
        python=python_of_nobody(home_of_nobody),
        HOME=str(home_of_nobody),
        PYTHONPATH=os.pathsep.join([str(SOURCE), sysconfig.get_path("purelib")]),
        PATH=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
    )
    try:
        instance.start()
        assert {each.uids().real for each in instance.family()} == {NOBODY}
        assert instance.send({"n": 1})[0] == 202
        await until_rows(instance.database_url, 1)
        stops_cleanly(instance, signal.SIGINT)
    finally:
        instance.end()
