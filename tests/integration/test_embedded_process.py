from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from pulse.adapters.embedded import process as process_module
from pulse.adapters.embedded.process import LAUNCH_SCRIPT, ManagedProcess, wait_until
from pulse.adapters.embedded.rotated_log import RotatedLog
from pulse.adapters.embedded.supervisor import Backoff, Supervisor
from pulse.domain.errors import ConfigurationError, Outage

LIMIT_S = 20.0
SHELL = "/bin/sh"

PARENT = """
import sys, time
from pathlib import Path
from pulse.adapters.embedded.process import ManagedProcess, RunAs
run_as = RunAs(uid=65534, gid=65534, name="nobody") if sys.argv[2] == "other" else None
child = ManagedProcess("child", ["/bin/sleep", "600"], log_path=Path(sys.argv[1]) / "child.log", run_as=run_as)
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Ended, whether or not whoever adopted it has looked."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def started() -> Iterator[list[ManagedProcess]]:
    processes: list[ManagedProcess] = []
    yield processes
    for process in processes:
        process.kill()


def shell(script: str, folder: Path, started: list[ManagedProcess], **options: object) -> ManagedProcess:
    process = ManagedProcess("script", [SHELL, "-c", script], log_path=folder / "script.log", **options)  # type: ignore[arg-type]
    started.append(process)
    return process


def test_stop_asks_first(scratch: Path, started: list[ManagedProcess]) -> None:
    process = shell("trap 'echo asked; exit 7' TERM; echo up; while :; do sleep 0.02; done", scratch, started)
    process.start()
    assert wait_until(lambda: "up" in process.tail, limit_s=LIMIT_S)
    process.stop(LIMIT_S)
    assert (process.alive, process.returncode, process.describe_exit()) == (False, 7, "exit code 7")
    assert process.tail.endswith("asked")


def test_stop_kills_what_does_not_listen_and_its_children(scratch: Path, started: list[ManagedProcess]) -> None:
    process = shell("trap '' TERM; sleep 600 & echo child $!; wait", scratch, started)
    process.start()
    assert wait_until(lambda: "child" in process.tail, limit_s=LIMIT_S)
    grandchild = int(process.tail.split()[-1])
    process.stop(0.1)
    assert process.describe_exit() == "SIGKILL"
    assert wait_until(lambda: gone(grandchild), limit_s=LIMIT_S)


def test_start_waits_for_readiness(scratch: Path, started: list[ManagedProcess]) -> None:
    flag = scratch / "ready"
    process = shell(f"sleep 0.1; touch '{flag}'; sleep 600", scratch, started, ready=flag.exists)
    process.start()
    assert flag.exists()


def test_what_is_not_ready_in_time_is_killed(scratch: Path, started: list[ManagedProcess]) -> None:
    process = shell("echo thinking; sleep 600", scratch, started, ready=lambda: False, ready_s_max=0.3)
    with pytest.raises(Outage, match=r"not ready after 0\.3 s"):
        process.start()
    assert not process.alive


def test_an_early_end_is_told_with_its_last_words(scratch: Path, started: list[ManagedProcess]) -> None:
    process = shell("echo first; echo no such luck >&2; exit 3", scratch, started, ready=lambda: False)
    with pytest.raises(Outage, match=r"exit code 3.*no such luck"):
        process.start()


def test_a_missing_program_is_a_configuration_error(scratch: Path) -> None:
    process = ManagedProcess("absent", ["/no/such/program"], log_path=scratch / "absent.log")
    with pytest.raises(ConfigurationError, match="/no/such/program"):
        process.start()


def test_a_log_that_cannot_be_written_is_a_configuration_error(scratch: Path, started: list[ManagedProcess]) -> None:
    (scratch / "script.log").mkdir()
    process = shell("sleep 600", scratch, started)
    with pytest.raises(ConfigurationError, match=r"script\.log"):
        process.start()


def test_it_can_be_started_again(scratch: Path, started: list[ManagedProcess]) -> None:
    process = shell("sleep 600", scratch, started)
    process.start()
    first = process.pid
    process.kill()
    process.start()
    assert process.alive
    assert process.pid != first


def test_a_child_that_writes_ten_megabytes_is_not_stalled_and_its_log_is_bounded(
    scratch: Path, started: list[ManagedProcess]
) -> None:
    script = "head -c 10000000 /dev/zero | tr '\\0' x >&2; echo done"
    process = shell(script, scratch, started, log_bytes_max=1_000_000, log_generations=2)
    process.start()
    assert wait_until(lambda: not process.alive, limit_s=LIMIT_S)
    process.stop(LIMIT_S)
    assert (process.returncode, process.tail[-4:]) == (0, "done")
    sizes = {path.name: path.stat().st_size for path in scratch.iterdir()}
    assert sizes.keys() == {"script.log", "script.log.1", "script.log.2"}
    assert max(sizes.values()) == 1_000_000


def test_a_full_disk_does_not_stall_the_child(
    scratch: Path, started: list[ManagedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RotatedLog, output: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RotatedLog, "write", refuse)
    process = shell("head -c 1000000 /dev/zero; echo done", scratch, started)
    process.start()
    assert wait_until(lambda: not process.alive, limit_s=LIMIT_S)
    process.stop(LIMIT_S)
    assert process.tail.endswith("done")


def test_ctrl_c_does_not_reach_it(scratch: Path, started: list[ManagedProcess]) -> None:
    process = shell("sleep 600", scratch, started)
    process.start()
    assert process.pid is not None
    assert os.getsid(process.pid) == process.pid != os.getsid(0)


def test_a_child_inherits_neither_ignored_signals_nor_an_open_umask(
    scratch: Path, started: list[ManagedProcess]
) -> None:
    process = shell("grep SigIgn /proc/self/status; umask", scratch, started)
    process.start()
    assert wait_until(lambda: not process.alive, limit_s=LIMIT_S)
    process.stop(LIMIT_S)
    ignored, umask = process.tail.splitlines()
    assert int(ignored.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0
    assert umask == "0077"


def test_a_child_outlives_the_thread_that_started_it(scratch: Path, started: list[ManagedProcess]) -> None:
    """The kernel ties the death signal to the thread that forked."""

    def is_up() -> bool:
        return "up" in process.tail

    process = shell("trap 'echo still here' USR1; echo up; while :; do sleep 0.02; done", scratch, started, ready=is_up)
    thread = threading.Thread(target=process.start)
    thread.start()
    thread.join()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGUSR1)
    assert wait_until(lambda: "still here" in process.tail or not process.alive, limit_s=LIMIT_S)
    assert process.alive


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
@pytest.mark.parametrize("user", ["same", "other"])
def test_a_parent_that_is_killed_leaves_no_orphan(scratch: Path, user: str) -> None:
    if user == "other" and os.geteuid() != 0:
        pytest.skip("only root may run a child as another user")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(scratch), user],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
        parent.kill()
    assert wait_until(lambda: gone(child), limit_s=LIMIT_S)


def test_a_child_whose_parent_died_before_it_asked_for_the_death_signal_does_not_start() -> None:
    other_parent = str(os.getppid())
    launcher = [sys.executable, "-I", "-S", str(LAUNCH_SCRIPT)]
    result = subprocess.run(
        [*launcher, other_parent, "9", "-1", "-1", SHELL, "-c", "echo started"],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert result.returncode != 0
    assert result.stdout == ""
    assert "the parent has gone" in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may run a child as another user")
def test_another_user_gets_no_group_of_ours() -> None:
    launcher = [sys.executable, "-I", "-S", str(LAUNCH_SCRIPT), str(os.getpid()), "9"]
    result = subprocess.run(
        [*launcher, "65534", "65534", SHELL, "-c", "id -u; id -G"],
        extra_groups=[0, 4, 24],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
    )
    assert result.stdout.split() == ["65534", "65534"]


def test_the_supervisor_restarts_a_process_that_was_killed(scratch: Path, started: list[ManagedProcess]) -> None:
    process = shell("sleep 600", scratch, started)
    backoff = Backoff(delay_s_min=0.001, delay_s_max=0.01)
    with Supervisor(stop_s_max=LIMIT_S, backoff=backoff) as supervisor:
        supervisor.start(process)
        first = process.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: process.alive and process.pid != first, limit_s=LIMIT_S)
    assert not process.alive


def test_a_child_that_cannot_be_killed_is_an_outage(
    scratch: Path, started: list[ManagedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it waits for a disk that does not answer."""
    process = shell("sleep 600", scratch, started)
    process.start()
    monkeypatch.setattr(process_module, "KILL_WAIT_S_MAX", 0.05)
    with monkeypatch.context() as unkillable:
        unkillable.setattr(os, "killpg", lambda *_: None)
        unkillable.setattr(subprocess.Popen, "kill", lambda _: None)
        with pytest.raises(Outage, match="does not end on SIGKILL"):
            process.kill()
    process.kill()
