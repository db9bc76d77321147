"""`pulse dead-letters`: what could not be processed, listed, shown, replayed, purged."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pulse.app import open_dead_letters
from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.dead_letter_view import body_lines, fields_of, json_of, table_of
from pulse.cli.identities import limit_option
from pulse.cli.tail import Age
from pulse.domain.dead_letter import Filter, Replayed
from pulse.domain.errors import CheckFailed, ConfigurationError, Reason
from pulse.topology.declared import load

R = TypeVar("R")

LIST_HINT = "`pulse dead-letters list` shows what there is"
FAILURES_SHOWN_MAX = 10
PROGRESS_FROM = 200
"""Fewer letters than this are done before a bar could be read."""


class Moment(click.ParamType[datetime]):
    """An age like 2h, or a time like 2026-11-23T10:00 (UTC unless it says otherwise)."""

    name = "age or time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Read it."""
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            try:
                age: timedelta = Age().convert(value, param, ctx)
            except click.BadParameter:
                self.fail(f"{value!r} is neither an age like 90s, 10m, 2h, 1d nor a time like 2026-11-23T10:00")
            return datetime.now(UTC) - age
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def filter_options(command: Callable[..., R]) -> Callable[..., R]:
    """The options that say which dead letters; the command gets them as `wanted`."""
    streams = [stream.name for stream in load().streams if not stream.name.startswith("KV_")]
    options = (
        click.option("--id", "letter_id", type=click.IntRange(1), help="The one with this id."),
        click.option("--reason", type=click.Choice([reason.value for reason in Reason]), metavar="REASON", help="Why."),
        click.option("--tenant", "tenant_id", metavar="TENANT_ID"),
        click.option("--device", "device_id", metavar="DEVICE_ID"),
        click.option("--stream", type=click.Choice(streams), metavar="STREAM", help="Where it came from."),
        click.option("--since", type=Moment(), metavar="AGE|TIME", help="Died at that time or later."),
        click.option("--until", type=Moment(), metavar="AGE|TIME", help="Died before that time."),
    )

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> R:
        fields = ("letter_id", "reason", "tenant_id", "device_id", "stream", "since", "until")
        return command(*args, wanted=Filter(**{name: given.pop(name) for name in fields}), **given)

    for option in reversed(options):
        run = option(run)
    return run


state_option = click.option(
    "--state", type=click.Choice(["waiting", "replayed"]), help="Only those never replayed, or those replayed."
)


@click.group("dead-letters")
def dead_letters() -> None:
    """What could not be processed: kept whole, with the reason, until it is replayed or purged."""


@dead_letters.command("list")
@filter_options
@state_option
@click.option("--before", type=click.IntRange(1), metavar="ID", help="Begin below this id.")
@limit_option
@json_option
@click.pass_obj
@as_async
async def list_letters(
    context: Context, *, wanted: Filter, state: str | None, before: int | None, limit: int, as_json: bool
) -> None:
    """List dead letters, newest first."""
    wanted = _in_state(wanted, state)
    async with open_dead_letters(context.settings()) as letters:
        page = await letters.page(wanted, before=before, limit=limit)
    more = page[-1].id if len(page) == limit else None
    if as_json:
        print_json({"dead_letters": page, "before": more})
        return
    if not page:
        console.print("There are no dead letters." if wanted == Filter() and not before else "No dead letter matches.")
        return
    console.print(table_of(page))
    if more:
        progress_console.print(f"There may be more: --before {more}", style="dim", highlight=False)


@dead_letters.command("show")
@click.argument("letter_id", type=click.IntRange(1), metavar="ID")
@click.option("--full", is_flag=True, help="All of the body, however long.")
@click.option("--raw", is_flag=True, help="Only the body, byte by byte, for a file: to be mended and replayed.")
@json_option
@click.pass_obj
@as_async
async def show(context: Context, letter_id: int, *, full: bool, raw: bool, as_json: bool) -> None:
    """Show one dead letter whole."""
    async with open_dead_letters(context.settings()) as letters:
        letter = await letters.show(letter_id)
    if raw:
        sys.stdout.buffer.write(letter.body)
    elif as_json:
        print_json(json_of(letter))
    else:
        console.print(fields_of(letter))
        click.echo()
        for line in body_lines(letter.body, whole=full):
            click.echo(line)


@dead_letters.command("replay")
@click.argument("one", type=click.IntRange(1), metavar="[ID]", required=False)
@filter_options
@click.option("--all", "everything", is_flag=True, help="All that there are; needed where nothing else says which.")
@click.option("--again", is_flag=True, help="Those that were replayed before as well.")
@click.option("--rate", type=click.FloatRange(0.1, 100_000), metavar="N", help="At most so many a second.")
@click.option(
    "--body",
    "body_file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="With ID: the mended body, whole as `show --raw` prints it, from this file or - for stdin.",
)
@click.option("--edit", is_flag=True, help="With ID: mend the body in $EDITOR first.")
@json_option
@click.pass_obj
@as_async
async def replay(
    context: Context,
    *,
    one: int | None,
    wanted: Filter,
    everything: bool,
    again: bool,
    rate: float | None,
    body_file: Path | None,
    edit: bool,
    as_json: bool,
) -> None:
    """Publish dead letters again where they came from: the one with ID, or all that match.

    A replay that was cut off can be repeated: within two minutes nothing is sent twice. What fails again is a new dead
    letter that names this one.
    """
    if one is not None:
        wanted = msgspec.structs.replace(wanted, letter_id=one)
    if body_file is not None or edit:
        if wanted.letter_id is None or (body_file is not None and edit):
            raise click.UsageError("--body and --edit mend one dead letter: give its ID, and one of the two")
        mended = _read_body(body_file) if body_file is not None else await _edited(context, wanted.letter_id)
        async with open_dead_letters(context.settings(), to_replay=True) as letters:
            sent = await letters.replay_one(wanted.letter_id, body=mended)
        _print_replayed(as_json, replayed=1, skipped=0, last=sent.sequence)
        return
    _check_chosen(wanted, everything)
    async with open_dead_letters(context.settings(), to_replay=True) as letters:
        found = await letters.count(wanted)
        if not found.count:
            raise CheckFailed("no dead letter matches: nothing was replayed", hint=LIST_HINT)
        skipped = 0 if again else found.replayed
        done, last = 0, None
        failed: list[Replayed] = []
        if not again:
            wanted = msgspec.structs.replace(wanted, replayed=False)
        with _progress("replaying", found.count - skipped) as advance:
            async for page in letters.replay(wanted, last_id=found.last_id, rate_per_s=rate):
                refused = [each for each in page if each.refusal]
                failed += refused
                done += len(page) - len(refused)
                last = next((each.sequence for each in reversed(page) if each.sequence), last)
                advance(len(page))
    _print_replayed(as_json, replayed=done, skipped=skipped, failed=len(failed), last=last)
    for each in failed[:FAILURES_SHOWN_MAX]:
        progress_console.print(f"dead letter {each.letter_id}: {each.refusal}", highlight=False, markup=False)
    if failed:
        raise CheckFailed(f"{len(failed)} could not be replayed, and are kept as they were")


@dead_letters.command("purge")
@filter_options
@state_option
@click.option("--all", "everything", is_flag=True, help="All that there are; needed where nothing else says which.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
@as_async
async def purge(
    context: Context, *, wanted: Filter, state: str | None, everything: bool, yes: bool, as_json: bool
) -> None:
    """Delete dead letters for good."""
    wanted = _in_state(wanted, state)
    _check_chosen(wanted, everything)
    async with open_dead_letters(context.settings()) as letters:
        found = await letters.count(wanted)
        if not found.count:
            raise CheckFailed("no dead letter matches: nothing was purged", hint=LIST_HINT)
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigurationError(f"this would purge {found.count:,} dead letters", hint="--yes does not ask")
            waiting = found.count - found.replayed
            click.confirm(
                f"Purge {found.count:,} dead letters for good, {waiting:,} of them never replayed?",
                abort=True,
                err=True,
            )
        purged = 0
        with _progress("purging", found.count) as advance:
            async for count in letters.purge(wanted, last_id=found.last_id):
                purged += count
                advance(count)
    if as_json:
        print_json({"purged": purged})
    else:
        console.print(f"{purged:,} dead letters are purged.", highlight=False)


def _read_body(path: Path) -> bytes:
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()


async def _edited(context: Context, letter_id: int) -> bytes:
    """The body of a letter, as $EDITOR left it."""
    async with open_dead_letters(context.settings()) as letters:
        body = (await letters.show(letter_id)).body
    try:
        mended = click.edit(body.decode(), extension=".json")
    except UnicodeDecodeError:
        raise click.UsageError("this body is no text: use `show ID --raw > FILE` and `replay ID --body FILE`") from None
    if mended is None or mended.encode() == body:
        raise CheckFailed("the body was not changed: nothing was replayed", hint="without --edit it is sent as it is")
    return mended.encode()


def _check_chosen(wanted: Filter, everything: bool) -> None:
    if (wanted == Filter()) is not everything:
        raise click.UsageError("say which dead letters, by an option like --reason or --since, or say --all")


def _in_state(wanted: Filter, state: str | None) -> Filter:
    return wanted if state is None else msgspec.structs.replace(wanted, replayed=state == "replayed")


def _print_replayed(as_json: bool, *, replayed: int, skipped: int, last: int | None, failed: int = 0) -> None:
    if as_json:
        print_json({"replayed": replayed, "skipped": skipped, "failed": failed, "last_sequence": last})
        return
    told = "1 dead letter is replayed" if replayed == 1 else f"{replayed:,} dead letters are replayed"
    told += f", the last as message {last}" if last is not None else ""
    before = "1 was replayed before (--again replays it too)"
    if skipped > 1:
        before = f"{skipped:,} were replayed before (--again replays them too)"
    told += f"; {before}" if skipped else ""
    console.print(f"{told}.", highlight=False)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for work that takes a second or more; else none."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console, transient=True, disable=total < PROGRESS_FROM) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
