"""`python -m pulse` in a real process: exit codes, signals, pipes, and what is on which stream."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

LIMIT_S = 150.0
SECRET = "s3cr3t-Zx81"
SOURCE = Path(__file__).resolve().parents[2] / "src"
PULSE = [sys.executable, "-m", "pulse"]


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG", "VIRTUAL_ENV"}}
    return {**kept, "PYTHONPATH": str(SOURCE), "COLUMNS": "60", **variables}


def pulse(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PULSE, *arguments],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def heed_ctrl_c() -> None:
    """A shell's background job ignores SIGINT and leaves that to its children: so would this, started from one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def process(*command: str, folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,  # noqa: PLW1509 - no threads here
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def test_settings_are_shown_on_stdout_masked_with_their_sources(tmp_path: Path) -> None:
    done = pulse(
        "settings", folder=tmp_path, DATABASE_URL=f"postgresql://pulse:{SECRET}@db.internal:5432/{'long' * 20}"
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("database_url")]
    assert line.split() == [
        "database_url",
        f"postgresql://pulse:********@db.internal:5432/{'long' * 20}",
        "DATABASE_URL",
    ]


def test_settings_are_json_for_programs(tmp_path: Path) -> None:
    done = pulse("--set", "gateway_port=1", "settings", "--json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["gateway_port"] == 1


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["settings", "--help"], ["--version"]])
def test_help_is_on_stdout_and_no_error(arguments: list[str], tmp_path: Path) -> None:
    done = pulse(*arguments, folder=tmp_path, PULSE_NO_SUCH_SETTING="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pulse" in done.stdout


def test_help_imports_neither_database_nor_network_clients(tmp_path: Path) -> None:
    code = (
        "import sys, pulse.cli; sys.argv = ['pulse', '--help']\n"
        "try: pulse.cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert not {"asyncpg", "nats", "uvicorn", "aiohttp", "prometheus_client"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"PULSE_GATWAY_PORT": "1"},
            "pulse: PULSE_GATWAY_PORT: there is no such setting (did you mean gateway_port?)\n",
        ),
        ({"PULSE_GATEWAY_PORT": "x"}, "pulse: PULSE_GATEWAY_PORT = 'x': Expected `int`, got `str`\n"),
        ({"PULSE_CONFIG": "absent.toml"}, "pulse: cannot read absent.toml: No such file or directory\n"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_code_2(
    variables: dict[str, str], line: str, tmp_path: Path
) -> None:
    done = pulse("settings", folder=tmp_path, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_wrong_call_is_exit_code_2_and_told_on_stderr(tmp_path: Path) -> None:
    done = pulse("nosuch", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: pulse ")


@pytest.mark.parametrize("arguments", [["settings"], ["settings", "--json"], ["--help"]])
def test_a_reader_that_left_is_no_failure(arguments: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PULSE, *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=LIMIT_S,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_ends_with_130_and_without_a_trace(tmp_path: Path) -> None:
    """The configuration is a FIFO, so the process is known to be at work when its other end can be opened."""
    fifo = tmp_path / "pulse.toml"
    os.mkfifo(fifo)
    with process(*PULSE, "settings", folder=tmp_path) as running:
        writing = open_when_read(fifo)
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=LIMIT_S)
        os.close(writing)
    assert (running.returncode, error) == (130, "")


def open_when_read(fifo: Path) -> int:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(0.01)
    raise AssertionError("nobody read the FIFO")


SERVING = """
import asyncio, signal, sys, time
import click
import pulse.cli
from pulse.cli.context import as_async
from pulse.runtime.faults import probe_for
from pulse.runtime.lifecycle import run_services, stop_on_signals
from pulse.runtime.logging import configure_logging

class Worker:
    name = "worker"
    async def run(self, stop):
        print("running", flush=True)
        if sys.argv[2:] == ["blocked"]:
            time.sleep(600)
        if sys.argv[2:] == ["bug"]:
            raise KeyError("bug")
        if sys.argv[2:] == ["crash"]:
            probe_for("worker.step:2")("worker.step")
            print("alive", flush=True)
            probe = probe_for("worker.step")
            probe("worker.step")
        await stop.wait()
        print("draining", flush=True)
        if sys.argv[2:] == ["slow"]:
            await asyncio.Event().wait()
        while sys.argv[2:] == ["until-sigterm"] and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            await asyncio.sleep(0.01)
        print("drained", flush=True)

@click.command()
@click.argument("how")
@as_async
async def work(how):
    configure_logging(level="info", log_format="json", role="test")
    with stop_on_signals() as stop:
        await run_services([Worker()], stop=stop, drain_s_max=600 if how == "slow" else 20)

pulse.cli.COMMANDS["work"] = ("__main__:work", "")
pulse.cli.main()
"""


def read_until(running: subprocess.Popen[str], text: str) -> None:
    assert running.stdout is not None
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if select.select([running.stdout], [], [], 1.0)[0] and running.stdout.readline().strip() == text:
            return
    raise AssertionError(f"never said {text!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(number: signal.Signals, tmp_path: Path) -> None:
    with process(sys.executable, "-c", SERVING, "work", "well", folder=tmp_path) as running:
        read_until(running, "running")
        running.send_signal(number)
        output, error = running.communicate(timeout=LIMIT_S)
    assert (running.returncode, output) == (0, "draining\ndrained\n")
    told = [json.loads(line) for line in error.splitlines()]
    assert [line["event"] for line in told] == ["stopping; the same signal again stops at once", "stopped"]
    assert told[0]["signal"] == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_again_stops_at_once(number: signal.Signals, tmp_path: Path) -> None:
    with process(sys.executable, "-c", SERVING, "work", "slow", folder=tmp_path) as running:
        read_until(running, "running")
        running.send_signal(number)
        read_until(running, "draining")
        running.send_signal(number)
        assert running.wait(LIMIT_S) == -number


def test_sigterm_after_ctrl_c_still_drains(tmp_path: Path) -> None:
    """On Ctrl-C a child gets SIGINT from the terminal and SIGTERM from its parent."""
    with process(sys.executable, "-c", SERVING, "work", "until-sigterm", folder=tmp_path) as running:
        read_until(running, "running")
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=LIMIT_S)
    assert (running.returncode, output) == (0, "draining\ndrained\n")


def test_a_bug_in_a_service_ends_with_1_and_its_trace(tmp_path: Path) -> None:
    with process(sys.executable, "-c", SERVING, "work", "bug", folder=tmp_path) as running:
        _, error = running.communicate(timeout=LIMIT_S)
    assert running.returncode == 1
    assert "in run" in error
    assert error.rstrip().endswith("KeyError: 'bug'")


def test_an_ordered_crash_is_a_sigkill(tmp_path: Path) -> None:
    with process(sys.executable, "-c", SERVING, "work", "crash", folder=tmp_path) as running:
        output, _ = running.communicate(timeout=LIMIT_S)
    assert (running.returncode, output) == (-signal.SIGKILL, "running\nalive\n")
