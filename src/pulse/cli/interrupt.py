"""Ctrl-C for a command that has something to finish."""

from __future__ import annotations

import asyncio
import signal
from types import TracebackType

import click

from pulse.cli.context import progress_console
from pulse.runtime.lifecycle import STOP_SIGNALS


class Interrupt:
    """Takes SIGINT and SIGTERM: the first sets `asked`, the next one ends the command at once, as Ctrl-C does.

    To be entered by the command's main task; leaves the handlers as they were.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._at_once = False
        self._cancelled = False

    def __enter__(self) -> Interrupt:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._cancelled and isinstance(error, asyncio.CancelledError):
            raise click.Abort from error

    def now_ends_at_once(self) -> None:
        """There is nothing left to finish early: the next signal ends the command."""
        self._at_once = True

    def _ask(self) -> None:
        if self._at_once or self.asked.is_set():
            self._cancelled = True
            self._task.cancel()
            return
        self.asked.set()
        progress_console.print("stopping; checking what was sent; Ctrl-C again ends at once", style="dim")
