"""`pulse dead-letters`: what could not be processed, listed, shown, replayed, purged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.dead_letter_options import filter_options, in_state, state_option
from pulse.cli.dead_letter_view import body_lines, fields_of, table_of
from pulse.cli.identities import change as record_of
from pulse.cli.identities import limit_option
from pulse.domain.access import ChangeRecord
from pulse.domain.dead_letter import Filter, Replayed
from pulse.domain.dead_letter_documents import document
from pulse.domain.errors import CheckFailed, ConfigurationError
from pulse.wiring.cli import open_dead_letters

LIST_HINT = "`pulse dead-letters list` shows what there is"
FAILURES_SHOWN_MAX = 10
PROGRESS_FROM = 200
"""Fewer letters than this are done before a bar could be read."""


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
    wanted = in_state(wanted, state)
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
        print_json(document(letter))
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
        record = await _record(context, "replay", wanted, mended=True)
        async with open_dead_letters(context.settings(), to_replay=True, record=record) as letters:
            sent = await letters.replay_one(wanted.letter_id, body=mended)
        _print_replayed(as_json, replayed=1, skipped=0, last=sent.sequence)
        return
    _check_chosen(wanted, everything)
    record = await _record(context, "replay", wanted, again=again)
    async with open_dead_letters(context.settings(), to_replay=True, record=record) as letters:
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
    wanted = in_state(wanted, state)
    _check_chosen(wanted, everything)
    async with open_dead_letters(context.settings(), record=await _record(context, "purge", wanted)) as letters:
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


async def _record(context: Context, action: str, wanted: Filter, **details: object) -> ChangeRecord:
    """What audit_log is told: of one letter, whose it is."""
    tenant_id, target = wanted.tenant_id, ""
    if wanted.letter_id is not None:
        target = str(wanted.letter_id)
        async with open_dead_letters(context.settings()) as letters:
            tenant_id = next((one.tenant_id for one in await letters.page(wanted, limit=1)), tenant_id)
    given = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not None}
    return record_of(f"dead-letters.{action}", target, tenant_id, filter=given, **details)


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
