"""One child process that cannot stall on its output, cannot be orphaned, and can be stopped in bounded time."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import structlog

from pulse.adapters.embedded.rotated_log import RotatedLog
from pulse.domain.errors import ConfigurationError, Outage

log = structlog.get_logger()

LAUNCH_SCRIPT = Path(__file__).with_name("launch.py")
POLL_INTERVAL_S = 0.01
KILL_WAIT_S_MAX = 10.0
"""SIGKILL cannot be refused, but a process that waits for a disk ends only when the disk answers."""
DRAIN_READ_BYTES = 64 * 1024
DRAIN_WAIT_S_MAX = 1.0
TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAs:
    """The user that a child runs as; it gets no supplementary groups."""

    uid: int
    gid: int
    name: str


def wait_until(condition: Callable[[], bool], *, limit_s: float, interval_s: float = POLL_INTERVAL_S) -> bool:
    """Ask `condition` until it holds or `limit_s` has passed; returns whether it held."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval_s)
    return True


def launch_arguments(arguments: Sequence[str], *, run_as: RunAs | None, orphan_signal: signal.Signals) -> list[str]:
    """The command line that runs `arguments` by way of `launch.py`, for a child of this very process."""
    uid, gid = (run_as.uid, run_as.gid) if run_as else (-1, -1)
    launcher = [sys.executable, "-I", "-S", str(LAUNCH_SCRIPT)]
    return [*launcher, str(os.getpid()), str(int(orphan_signal)), str(uid), str(gid), *arguments]


_Request: TypeAlias = "tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]"


class _Spawner:
    """Makes every child in one thread that lives as long as this process.

    The kernel's death signal is tied to the *thread* that made the child: a child made in a worker thread that
    ends would be killed with it.
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[_Request]
        self._pid = 0
        self._lock = threading.Lock()

    def spawn(self, make: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Call `make` in the spawner's thread; what it raises is raised here."""
        with self._lock:
            if self._pid != os.getpid():
                self._requests = queue.SimpleQueue()
                self._pid = os.getpid()
                threading.Thread(target=self._serve, args=(self._requests,), name="spawner", daemon=True).start()
        answer: Future[subprocess.Popen[bytes]] = Future()
        self._requests.put((make, answer))
        return answer.result()

    @staticmethod
    def _serve(requests: queue.SimpleQueue[_Request]) -> None:
        while True:
            make, answer = requests.get()
            try:
                answer.set_result(make())
            except Exception as error:  # noqa: BLE001 - handed to the caller, who raises it
                answer.set_exception(error)


_spawner = _Spawner()


class ManagedProcess:
    """A child in a session of its own: Ctrl-C in the terminal does not reach it, only `stop` and `kill` do.

    On Linux it gets `orphan_signal` the moment this process dies, even by SIGKILL. Elsewhere the next `pulse up` finds
    it (see leftovers.py). Its output goes to `log_path`, at most `log_bytes_max * (log_generations + 1)` bytes; while
    the disk refuses it, output is dropped and the child runs on.

    `ready` is asked until it says yes; without it, a child is ready once it runs. May be started again after it ended.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        log_path: Path,
        ready: Callable[[], bool] | None = None,
        ready_s_max: float = 30.0,
        environment: Mapping[str, str] | None = None,
        working_directory: Path | None = None,
        run_as: RunAs | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        orphan_signal: signal.Signals = signal.SIGKILL,
        log_bytes_max: int = 4 * 1024 * 1024,
        log_generations: int = 3,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._arguments = list(arguments)
        self._ready = ready
        self._ready_s_max = ready_s_max
        self._environment = environment
        self._working_directory = working_directory
        self._run_as = run_as
        self._stop_signal = stop_signal
        self._orphan_signal = orphan_signal
        self._log_bytes_max = log_bytes_max
        self._log_generations = log_generations
        self._process: subprocess.Popen[bytes] | None = None
        self._drain: threading.Thread | None = None
        self._tail = bytearray()

    @property
    def pid(self) -> int | None:
        """Of the child, also after it ended; None before the first start."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """As in subprocess: negative is the signal that ended it; None while it runs or before it was started."""
        return self._process.poll() if self._process else None

    @property
    def tail(self) -> str:
        """The end of what this run has written, at most TAIL_BYTES."""
        return bytes(self._tail).decode("utf-8", errors="replace").strip()

    def start(self) -> None:
        """Start the child and return when it is ready.

        Raises ConfigurationError where there is no such program or its log cannot be written; Outage, with its last
        words, where it ends early or is not ready in time (then it is killed).
        """
        assert self._process is None or self._process.poll() is not None, f"{self.name} runs already"
        if not os.access(self._arguments[0], os.X_OK):
            raise ConfigurationError(f"cannot run {self.name}: there is no program {self._arguments[0]}")
        try:
            self._spawn()
        except OSError as error:
            raise ConfigurationError(f"cannot start {self.name}: {error.strerror}", hint=str(self.log_path)) from error
        try:
            ready = wait_until(
                lambda: not self.alive or self._ready is None or self._ready(), limit_s=self._ready_s_max
            )
        except BaseException:
            self.kill()
            raise
        if not self.alive:
            self._join_drain()
            raise Outage(
                self.name, f"{self.name} ended while starting ({self.describe_exit()})", hint=self._last_line()
            )
        if not ready:
            self.kill()
            raise Outage(self.name, f"{self.name} was not ready after {self._ready_s_max:g} s", hint=self._last_line())

    def stop(self, limit_s: float) -> None:
        """Ask the child to end, wait at most `limit_s`, then kill it; returns when it has ended."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(self._stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(limit_s, 0.0))
        if process.poll() is None:
            log.warning(
                "process did not stop in time and is killed", process=self.name, pid=process.pid, limit_s=limit_s
            )
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the child and whoever shares its session's process group; returns when the child has ended."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            # Not reaped yet, so the number of the group cannot have become somebody else's.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            try:
                process.wait(timeout=KILL_WAIT_S_MAX)
            except subprocess.TimeoutExpired as error:
                raise Outage(self.name, f"{self.name} (pid {process.pid}) does not end on SIGKILL") from error
        self._join_drain()

    def describe_exit(self) -> str:
        """How the last run ended: `exit code 1`, `SIGKILL`, or `running`."""
        code = self.returncode
        if code is None:
            return "running" if self._process else "never started"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def _spawn(self) -> None:
        output = RotatedLog(self.log_path, bytes_max=self._log_bytes_max, generations=self._log_generations)
        arguments = launch_arguments(self._arguments, run_as=self._run_as, orphan_signal=self._orphan_signal)
        try:
            self._process = _spawner.spawn(
                lambda: subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=dict(self._environment) if self._environment is not None else None,
                    cwd=self._working_directory,
                    start_new_session=True,
                    bufsize=0,
                )
            )
        except OSError:
            output.close()
            raise
        pipe = self._process.stdout
        assert pipe is not None
        self._tail = bytearray()
        self._drain = threading.Thread(
            target=self._drain_output, args=(pipe, output, self._tail), name=f"output of {self.name}", daemon=True
        )
        self._drain.start()

    def _drain_output(self, pipe: IO[bytes], output: RotatedLog, tail: bytearray) -> None:
        refused = False
        with pipe, output:
            while chunk := pipe.read(DRAIN_READ_BYTES):
                tail += chunk[-TAIL_BYTES:]
                del tail[:-TAIL_BYTES]
                try:
                    output.write(chunk)
                    refused = False
                except OSError as error:
                    # The disk may be full; reading on is what keeps the child from standing still with it.
                    if not refused:
                        log.warning("output of a process is dropped", process=self.name, error=error.strerror)
                    refused = True

    def _join_drain(self) -> None:
        if self._drain is not None:
            self._drain.join(DRAIN_WAIT_S_MAX)

    def _last_line(self) -> str:
        lines = self.tail.splitlines()
        return f"its last words: {lines[-1]}; see {self.log_path}" if lines else f"see {self.log_path}"
