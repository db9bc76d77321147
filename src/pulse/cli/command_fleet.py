"""`pulse command fleet`: tell many devices the same, and see how far they have come together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pulse.adapters.postgres.commands import CommandStore
from pulse.cli.command_following import (
    asking,
    before_option,
    cell,
    json_line,
    now_ms,
    open_commands,
    shown,
    until,
    wait_option,
)
from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.identities import change, limit_option
from pulse.cli.json_argument import explained
from pulse.domain.command import State
from pulse.domain.command_documents import cursor, fleet_document, instant
from pulse.domain.command_requests import Asked, CommandBounds, new_fleet
from pulse.domain.errors import CheckFailed, Reason
from pulse.domain.fleet import Filter, Fleet, Stage


@click.group("fleet")
def fleet() -> None:
    """Fleet commands: one request, a command for each of many devices."""


@fleet.command("send")
@click.argument("tenant_id")
@asking
@click.option("--all", "everything", is_flag=True, help="All devices of the tenant.")
@click.option("--device", "devices", metavar="DEVICE_ID", multiple=True, help="This one; may be repeated.")
@click.option("--prefix", default="", help="Those whose id begins so.")
@click.option(
    "--attribute",
    "attributes",
    metavar="NAME=VALUE",
    multiple=True,
    help="Those that have it, a text; NAME:=VALUE for a number or boolean. May be repeated.",
)
@wait_option
@json_option
@click.pass_obj
@as_async
async def send(
    context: Context,
    tenant_id: str,
    *,
    asked: Asked,
    everything: bool,
    devices: tuple[str, ...],
    prefix: str,
    attributes: tuple[str, ...],
    wait: bool,
    as_json: bool,
) -> None:
    """Tell many devices to do NAME with PAYLOAD: JSON, @FILE, or - for stdin.

    Where several options say which devices, all of them have to hold. With --json and --wait there is a line of JSON
    for each step forward.

    \b
    pulse command fleet send acme reboot --attribute site=north --wait
    """
    settings = context.settings()
    bounds = msgspec.convert(settings, CommandBounds, from_attributes=True)
    wanted = Filter(all=everything, devices=devices, prefix=prefix, attributes=dict(map(read_attribute, attributes)))
    record = change("fleet_command.create", asked.name, tenant_id, filter=wanted, idempotency_key=asked.idempotency_key)
    with explained({Reason.NOT_FOUND: f"`pulse device list --tenant {tenant_id}` lists them"}):
        new = new_fleet(asked, tenant_id=tenant_id, wanted=wanted, bounds=bounds)
        async with open_commands(settings, tenant_id, record) as commands:
            made, is_new = await commands.create_fleet(new, who=record.actor, at_ms=now_ms())
    if as_json and not wait:
        print_json({"fleet_command": fleet_document(made), "made": is_new})
        return
    if not as_json:
        told = "is made" if is_new else "was made before, under the same key"
        console.print(f"Fleet command {made.fleet_id} of {tenant_id} {told}.", highlight=False)
    if wait:
        async with open_commands(settings, tenant_id) as commands:
            await _follow(commands, tenant_id, made.fleet_id, as_json=as_json)


@fleet.command("list")
@click.argument("tenant_id")
@before_option
@limit_option
@json_option
@click.pass_obj
@as_async
async def list_fleets(
    context: Context, tenant_id: str, *, before: tuple[int, str] | None, limit: int, as_json: bool
) -> None:
    """List fleet commands, the newest first."""
    async with open_commands(context.settings(), tenant_id) as commands:
        page = await commands.fleets(tenant_id, before=before, limit=limit)
    more = cursor(page[-1].created_ms, page[-1].fleet_id) if len(page) == limit else None
    if as_json:
        print_json({"fleet_commands": [fleet_document(one) for one in page], "before": more})
        return
    table = Table("fleet command", "name", "stage", "devices", "ended", "made", "by", box=None, pad_edge=False)
    for one in page:
        made = shown(instant(one.created_ms))
        table.add_row(
            one.fleet_id, one.name, one.stage, f"{one.devices:,}", f"{_ended(one):,}", made, cell(one.created_by)
        )
    console.print(table if page else "There are no fleet commands.")
    if more:
        progress_console.print(f"There may be more: --before {more}", style="dim", highlight=False)


@fleet.command("show")
@click.argument("tenant_id")
@click.argument("fleet_id")
@json_option
@click.pass_obj
@as_async
async def show(context: Context, tenant_id: str, fleet_id: str, *, as_json: bool) -> None:
    """Show a fleet command, and how many of its commands are in each state."""
    with explained(_hints(tenant_id)):
        async with open_commands(context.settings(), tenant_id) as commands:
            found = await commands.fleet(tenant_id, fleet_id)
    if as_json:
        print_json({"fleet_command": fleet_document(found)})
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("fleet command", found.fleet_id)
    table.add_row("name", found.name)
    table.add_row("payload", cell(found.payload.decode()))
    table.add_row("filter", cell(msgspec.json.encode(found.filter).decode()))
    table.add_row("made", cell(f"{shown(instant(found.created_ms))} by {found.created_by}"))
    table.add_row("expires", shown(instant(found.expires_ms)))
    table.add_row("stage", found.stage)
    table.add_row("devices", f"{found.devices:,}")
    for state, count in _in_order(found):
        table.add_row(f"  {state}", f"{count:,}")
    console.print(table)


@fleet.command("cancel")
@click.argument("tenant_id")
@click.argument("fleet_id")
@json_option
@click.pass_obj
@as_async
async def cancel(context: Context, tenant_id: str, fleet_id: str, *, as_json: bool) -> None:
    """Make no more of its commands, and end those that have not ended."""
    record = change("fleet_command.cancel", fleet_id, tenant_id)
    with explained(_hints(tenant_id)):
        async with open_commands(context.settings(), tenant_id, record) as commands:
            ended = await commands.cancel_fleet(tenant_id, fleet_id, who=record.actor, at_ms=now_ms())
    if as_json:
        print_json({"fleet_command": fleet_document(ended)})
    else:
        console.print(f"Fleet command {fleet_id} is cancelled.", highlight=False)


@fleet.command("watch")
@click.argument("tenant_id")
@click.argument("fleet_id")
@json_option
@click.pass_obj
@as_async
async def watch(context: Context, tenant_id: str, fleet_id: str, *, as_json: bool) -> None:
    """Follow a fleet command until all of it has ended; exit code 1 unless all succeeds.

    With --json a line for each step forward.
    """
    with explained(_hints(tenant_id)):
        async with open_commands(context.settings(), tenant_id) as commands:
            await _follow(commands, tenant_id, fleet_id, as_json=as_json)


async def _follow(commands: CommandStore, tenant_id: str, fleet_id: str, *, as_json: bool) -> None:
    """Tell how far it has come. Raises CheckFailed where some have ended otherwise than that they succeeded."""
    last: Fleet | None = None
    with _progress() as (progress, task):

        async def look() -> Fleet:
            nonlocal last
            found = await commands.fleet(tenant_id, fleet_id)
            if as_json and found != last:
                whole = fleet_document(found)
                json_line({name: whole[name] for name in ("fleet_id", "stage", "devices", "counts")})
            last = found
            total = None if found.stage is Stage.EXPANDING else found.devices
            progress.update(task, total=total, completed=_ended(found), counts=_counts(found))
            return found

        again = f"pulse command fleet watch {tenant_id} {fleet_id}"
        ended = await until(look, _has_ended, again=again)
    if not as_json:
        console.print(f"All of {ended.devices:,} have ended: {_counts(ended) or 'there was no such device'}.")
    failed = ended.devices - ended.counts.get(State.SUCCEEDED, 0)
    if failed:
        hint = f"`pulse command list {tenant_id} --fleet {fleet_id} --state failed` lists those that failed"
        raise CheckFailed(f"{failed:,} of {ended.devices:,} commands have not succeeded", hint=hint)


@contextmanager
def _progress() -> Iterator[tuple[Progress, TaskID]]:
    """A bar on a terminal; while devices are still being found it has no end."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[counts]}"))
    shows = progress_console.is_terminal
    with Progress(*columns, console=progress_console, transient=True, disable=not shows) as progress:
        yield progress, progress.add_task("", total=None, counts="")


def _has_ended(found: Fleet) -> bool:
    return found.stage in (Stage.EXPANDED, Stage.CANCELLED) and _ended(found) == found.devices


def _ended(found: Fleet) -> int:
    return sum(count for state, count in found.counts.items() if state.final)


def _counts(found: Fleet) -> str:
    return ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in _in_order(found))


def _in_order(found: Fleet) -> Iterator[tuple[State, int]]:
    """The counts in the order of a command's life."""
    return ((state, found.counts[state]) for state in State if found.counts.get(state))


def read_attribute(text: str) -> tuple[str, str | int | float | bool]:
    name, separator, value = text.partition("=")
    if not separator or not name.removesuffix(":"):
        raise click.UsageError(f"--attribute takes NAME=VALUE or NAME:=VALUE, not {text!r}")
    if not name.endswith(":"):
        return name, value
    try:
        return name[:-1], msgspec.json.decode(value, type=int | float | bool)
    except msgspec.DecodeError:
        raise click.UsageError(f"--attribute NAME:=VALUE takes a number, true or false, not {value!r}") from None


def _hints(tenant_id: str) -> dict[Reason, str]:
    return {Reason.NOT_FOUND: f"`pulse command fleet list {tenant_id}` lists them"}
