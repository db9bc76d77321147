"""What the commands about commands share: the store, what is asked, and following what has begun until it has ended."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, TypeVar

import click
import msgspec
from rich.text import Text

from pulse.adapters.postgres.commands import CommandStore
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.pool import Scoped
from pulse.cli.context import progress_console
from pulse.cli.database import open_database
from pulse.cli.json_argument import Json, JsonArgument
from pulse.cli.tail import Age
from pulse.cli.tail_line import escaped
from pulse.domain.access import ChangeRecord
from pulse.domain.command_documents import read_cursor
from pulse.domain.command_requests import Asked
from pulse.domain.errors import Outage, Refusal
from pulse.runtime.settings import Settings

R = TypeVar("R")
T = TypeVar("T")

LOOK_EVERY_S = 0.25
RETRY_S = 1.0


def _cursor(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, str] | None:
    try:
        return read_cursor(value)
    except Refusal as refusal:
        raise click.UsageError(f"--before: {refusal.message}") from refusal


before_option = click.option(
    "--before", metavar="CURSOR", callback=_cursor, help="Begin behind this one, as the page before told it."
)
wait_option = click.option("--wait", is_flag=True, help="Follow it until it has ended; exit code 1 unless it succeeds.")


def asking(command: Callable[..., R]) -> Callable[..., R]:
    """The arguments that say what is asked; the command gets them as `asked`."""
    options = (
        click.argument("name"),
        click.argument("payload", type=JsonArgument("payload"), default="{}"),
        click.option("--ttl", type=Age(), metavar="AGE", help="How long it is sent to a device that does not answer."),
        click.option(
            "--timeout", type=Age(), metavar="AGE", help="How long a device that has acknowledged it may take."
        ),
        click.option("--idempotency-key", metavar="KEY", help="Repeated under the same key it makes nothing more."),
    )

    @functools.wraps(command)
    def run(
        *args: Any, name: str, payload: Json, ttl: timedelta | None, timeout: timedelta | None,
        idempotency_key: str | None, **given: Any,
    ) -> R:  # fmt: skip
        asked = Asked(name, payload.value, _seconds(ttl), _seconds(timeout), idempotency_key)
        return command(*args, asked=asked, **given)

    for option in reversed(options):
        run = option(run)
    return run


@asynccontextmanager
async def open_commands(
    settings: Settings, tenant_id: str, record: ChangeRecord | None = None
) -> AsyncIterator[CommandStore]:
    """The commands in the database of `settings`; Refusal NOT_FOUND where the tenant is not known."""
    async with open_database(settings) as pool:
        await IdentityStore(pool, presence_after=settings.presence_after()).tenant(tenant_id)
        yield CommandStore(Scoped(pool=pool, record=record), open_max=settings.command_open_max)


async def until(look: Callable[[], Awaitable[T]], ended: Callable[[T], bool], *, again: str) -> T:
    """What `look` sees at last, as soon as it has `ended`. An outage is waited out.

    Where it is cut off, says that what is followed goes on, and that `again` follows it further.
    """
    away = False
    try:
        while True:
            try:
                seen = await look()
            except Outage as outage:
                if not away:
                    _remark(f"{outage}; waiting for it")
                away = True
                await asyncio.sleep(RETRY_S)
                continue
            if away:
                _remark("PostgreSQL is back")
            away = False
            if ended(seen):
                return seen
            await asyncio.sleep(LOOK_EVERY_S)
    except asyncio.CancelledError:
        _remark(f"it goes on; `{again}` follows it further")
        raise


def json_line(value: object) -> None:
    """One JSON document on a line of stdout, at once."""
    click.echo(msgspec.json.encode(value))


def cell(text: str) -> Text:
    """Without anything that a terminal would act on: a device may have said it."""
    return Text(escaped(text))


def now_ms() -> int:
    """The time, in ms since the epoch."""
    return time.time_ns() // 1_000_000


def shown(at: datetime) -> str:
    """A moment, for people."""
    return f"{at:%Y-%m-%d %H:%M:%S %Z}"


def _seconds(given: timedelta | None) -> float | None:
    return None if given is None else given.total_seconds()


def _remark(text: str) -> None:
    progress_console.print(text, style="dim", highlight=False, markup=False)
