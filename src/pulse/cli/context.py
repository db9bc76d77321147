"""What the commands share: their settings, a console for people, JSON for programs, one event loop."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
import msgspec
import uvloop
from rich.console import Console

from pulse.runtime.logging import configure_logging
from pulse.runtime.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")

PIPE_COLUMNS = 500


class AnswerConsole(Console):
    """Leaves a reader that went away (`pulse settings | head -1`) to main(), and never breaks a line for a pipe."""

    def on_broken_pipe(self) -> None:
        """Called by rich inside its handler of BrokenPipeError."""
        raise BrokenPipeError


console = AnswerConsole(width=None if sys.stdout is not None and sys.stdout.isatty() else PIPE_COLUMNS)
"""For people: tables and what was done, on stdout."""
progress_console = Console(stderr=True)
"""For people: progress and asides, on stderr, so that stdout stays the answer."""


class Context:
    """The command line's own state; `click.pass_obj` hands it to a command."""

    def __init__(self, *, load: Callable[[dict[str, object], bool], tuple[Settings, dict[str, str]]]) -> None:
        self._load = load
        self.no_instance_in: Path | None = None
        """The data folder that no running `pulse up` was found in, where nothing else said where the systems are."""

    def settings(self, *, with_instance: bool = True, **flags: object) -> Settings:
        """The settings under this command's own flags; a flag that is None was not given.

        `with_instance`: also what a running `pulse up` has told of itself.

        Whatever is logged from here on goes to stderr, warnings and worse; a role says otherwise.
        """
        settings, sources = self._load(flags, with_instance)
        if with_instance and not {"nats_url", "database_url"} & sources.keys():
            self.no_instance_in = Path(settings.data_dir).absolute()
        configure_logging(level="warning", log_format=settings.log_format)
        return settings

    def settings_and_sources(self) -> tuple[Settings, dict[str, str]]:
        """The settings, and the layer that each one comes from that is no default."""
        return self._load({}, True)


def as_async(command: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, R]:
    """Let a click command be `async def`."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(command(*args, **kwargs))

    return run


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def print_json(value: object) -> None:
    """One JSON document on stdout, keys in the order given."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
