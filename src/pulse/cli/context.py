"""What the commands share: their settings, a console for people, JSON for programs, one event loop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import click
import msgspec
import uvloop
from rich.console import Console

from pulse.runtime.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")

console = Console()
"""For people: tables and what was done, on stdout."""
progress_console = Console(stderr=True)
"""For people: progress and asides, on stderr, so that stdout stays the answer."""


class Context:
    """The command line's own state; `click.pass_obj` hands it to a command."""

    def __init__(self, *, load: Callable[[dict[str, object]], Settings]) -> None:
        self._load = load

    def settings(self, **flags: object) -> Settings:
        """The settings under this command's own flags; a flag that is None was not given."""
        return self._load(flags)


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
