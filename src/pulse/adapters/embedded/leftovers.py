"""Which processes work in a folder: it tells a server that a killed run left behind from a stranger with its pid."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import structlog

from pulse.adapters.embedded.process import wait_until
from pulse.domain.errors import Outage

log = structlog.get_logger()

KILL_WAIT_S_MAX = 10.0


def processes_in(folder: Path, *, program: str) -> list[psutil.Process]:
    """The live processes of `program` whose working directory is `folder`.

    Both servers stay in the folder that they were started in, PostgreSQL's backends as well. No pid file is
    trusted: a pid may have been given to somebody else since. Processes that we may not look at are not ours.
    """
    named = (process for process in psutil.process_iter(["name"]) if process.info["name"] == program)
    return [process for process in named if _works_in(process, folder)]


def stop_leftovers(folder: Path, *, program: str, stop_signal: signal.Signals, limit_s: float) -> list[int]:
    """End every process of `program` in `folder`, by force after `limit_s`; returns the pids that were found.

    Only for whoever holds the folder's lock. Raises Outage where one survives SIGKILL.
    """
    found = processes_in(folder, program=program)
    if not found:
        return []
    pids = [process.pid for process in found]
    log.warning("stopping what a killed run has left behind", program=program, pids=pids, folder=str(folder))
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(stop_signal)
    if not wait_until(lambda: not processes_in(folder, program=program), limit_s=limit_s, interval_s=0.05):
        for process in processes_in(folder, program=program):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    if not wait_until(lambda: not processes_in(folder, program=program), limit_s=KILL_WAIT_S_MAX, interval_s=0.05):
        raise Outage(program, f"{program} of an earlier run (pid {pids[0]}) does not end on SIGKILL")
    return pids


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        link = Path(f"/proc/{process.pid}/cwd")
        # The link leads to the folder itself, whatever it is called in the mount namespace of the process.
        return link.samefile(folder) if psutil.LINUX else Path(process.cwd()).samefile(folder)
    except (OSError, psutil.Error):
        return False
