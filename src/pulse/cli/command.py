"""`pulse command`: tell devices what to do, and see how far they have come."""

from __future__ import annotations

import click
import msgspec
from rich.table import Table

from pulse.adapters.postgres.commands import CommandStore
from pulse.cli.command_fleet import fleet
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
from pulse.cli.tail_line import escaped
from pulse.domain.command import Command, Move, State
from pulse.domain.command_documents import cursor, document, instant, moves_document
from pulse.domain.command_requests import Asked, CommandBounds, new_command
from pulse.domain.errors import CheckFailed, Reason

COLOUR_OF = {
    State.SUCCEEDED: "green",
    State.FAILED: "red",
    State.REJECTED: "red",
    State.EXPIRED: "yellow",
    State.TIMED_OUT: "yellow",
    State.CANCELLED: "dim",
}


@click.group("command")
def command() -> None:
    """Commands: what devices were told to do, and what became of it."""


command.add_command(fleet)


@command.command("send")
@click.argument("tenant_id")
@click.argument("device_id")
@asking
@click.option("--ordered", is_flag=True, help="Only after the older ordered ones of this device and name have ended.")
@wait_option
@json_option
@click.pass_obj
@as_async
async def send(
    context: Context, tenant_id: str, device_id: str, *, asked: Asked, ordered: bool, wait: bool, as_json: bool
) -> None:
    """Tell a device to do NAME with PAYLOAD: JSON, @FILE, or - for stdin.

    It is told now, or when it is back. With --json and --wait there is a line of JSON for each state.

    \b
    pulse command send acme lamp-1 reboot '{"delay_s": 5}' --wait
    """
    settings = context.settings()
    bounds = msgspec.convert(settings, CommandBounds, from_attributes=True)
    record = change("command.create", device_id, tenant_id, name=asked.name, idempotency_key=asked.idempotency_key)
    with explained({Reason.NOT_FOUND: f"`pulse device list --tenant {tenant_id}` lists them"}):
        new = new_command(asked, tenant_id=tenant_id, device_id=device_id, ordered=ordered, bounds=bounds)
        async with open_commands(settings, tenant_id, record) as commands:
            made, is_new = await commands.create(new, who=record.actor, at_ms=now_ms())
    if as_json and not wait:
        print_json({"command": document(made), "made": is_new})
        return
    if not as_json:
        told = "is made" if is_new else "was made before, under the same key"
        waits = "; it waits for an older one" if made.held else ""
        console.print(f"Command {made.command_id} for {tenant_id}/{device_id} {told}{waits}.", highlight=False)
    if wait:
        async with open_commands(settings, tenant_id) as commands:
            await _follow(commands, tenant_id, made.command_id, as_json=as_json)


@command.command("list")
@click.argument("tenant_id")
@click.option("--device", "device_id", metavar="DEVICE_ID", help="Only this device's.")
@click.option("--state", type=click.Choice([state.value for state in State]), metavar="STATE", help="Only those in it.")
@click.option("--fleet", "fleet_id", metavar="FLEET_ID", help="Only those of this fleet command.")
@before_option
@limit_option
@json_option
@click.pass_obj
@as_async
async def list_commands(
    context: Context,
    tenant_id: str,
    *,
    device_id: str | None,
    state: str | None,
    fleet_id: str | None,
    before: tuple[int, str] | None,
    limit: int,
    as_json: bool,
) -> None:
    """List commands, the newest first."""
    async with open_commands(context.settings(), tenant_id) as commands:
        page = await commands.commands(
            tenant_id,
            device_id=device_id,
            state=None if state is None else State(state),
            fleet_id=fleet_id,
            before=before,
            limit=limit,
        )
    more = cursor(page[-1].created_ms, page[-1].command_id) if len(page) == limit else None
    if as_json:
        print_json({"commands": [document(one) for one in page], "before": more})
        return
    table = Table("command", "device", "name", "state", "made", "by", "error", box=None, pad_edge=False)
    for one in page:
        table.add_row(
            one.command_id,
            one.device_id,
            one.name,
            _state(one),
            shown(instant(one.created_ms)),
            cell(one.created_by),
            cell(one.error or ""),
        )
    console.print(table if page else "There are no such commands.")
    if more:
        progress_console.print(f"There may be more: --before {more}", style="dim", highlight=False)


@command.command("show")
@click.argument("tenant_id")
@click.argument("command_id")
@json_option
@click.pass_obj
@as_async
async def show(context: Context, tenant_id: str, command_id: str, *, as_json: bool) -> None:
    """Show a command, and which states it came into."""
    with explained(_hints(tenant_id)):
        async with open_commands(context.settings(), tenant_id) as commands:
            found = await commands.command(tenant_id, command_id)
            moves = await commands.moves(tenant_id, command_id)
    if as_json:
        print_json({"command": document(found) | {"moves": moves_document(moves)}})
    else:
        _print(found, moves)


@command.command("cancel")
@click.argument("tenant_id")
@click.argument("command_id")
@json_option
@click.pass_obj
@as_async
async def cancel(context: Context, tenant_id: str, command_id: str, *, as_json: bool) -> None:
    """End a command that has not ended; what its device still says of it moves nothing."""
    record = change("command.cancel", command_id, tenant_id)
    with explained(_hints(tenant_id)):
        async with open_commands(context.settings(), tenant_id, record) as commands:
            ended = await commands.cancel(tenant_id, command_id, who=record.actor, at_ms=now_ms())
    if as_json:
        print_json({"command": document(ended)})
    else:
        console.print(f"Command {command_id} is cancelled.", highlight=False)


@command.command("watch")
@click.argument("tenant_id")
@click.argument("command_id")
@json_option
@click.pass_obj
@as_async
async def watch(context: Context, tenant_id: str, command_id: str, *, as_json: bool) -> None:
    """Follow a command until it has ended; exit code 1 unless it succeeds. With --json a line for each state."""
    with explained(_hints(tenant_id)):
        async with open_commands(context.settings(), tenant_id) as commands:
            await _follow(commands, tenant_id, command_id, as_json=as_json)


async def _follow(commands: CommandStore, tenant_id: str, command_id: str, *, as_json: bool) -> None:
    """Tell each state once. Raises CheckFailed where the last one is not that it has succeeded."""
    told: set[State] = set()

    async def look() -> Command:
        # In this order: the moves are then no older than the state.
        found = await commands.command(tenant_id, command_id)
        for move in await commands.moves(tenant_id, command_id):
            if move.state not in told:
                _tell(found, move, as_json=as_json)
                told.add(move.state)
        return found

    ended = await until(look, lambda found: found.state.final, again=f"pulse command watch {tenant_id} {command_id}")
    if ended.state is not State.SUCCEEDED:
        why = f": {escaped(ended.error)}" if ended.error else ""
        raise CheckFailed(f"command {command_id} {ended.state.replace('_', ' ')}{why}")


def _tell(found: Command, move: Move, *, as_json: bool) -> None:
    if as_json:
        line = {"command_id": found.command_id, **moves_document([move])[0]}
        json_line(line if not move.state.final else line | _outcome(found))
        return
    console.print(f"{shown(instant(move.at_ms))}  {move.state:<12}  by", cell(move.who), highlight=False)
    if move.state.final and found.result is not None:
        console.print(cell(found.result.decode()))


def _outcome(found: Command) -> dict[str, object]:
    whole = document(found)
    return {"result": whole["result"], "error": whole["error"]}


def _print(found: Command, moves: list[Move]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("command", found.command_id)
    table.add_row("device", f"{found.tenant_id}/{found.device_id}")
    table.add_row("name", found.name)
    table.add_row("payload", cell(found.payload.decode()))
    table.add_row("state", _state(found))
    if found.fleet_id:
        table.add_row("of fleet", found.fleet_id)
    if found.ordered:
        table.add_row("ordered", "yes; it waits for an older one" if found.held else "yes")
    table.add_row("expires", shown(instant(found.expires_ms)))
    table.add_row("timeout", f"{found.timeout_ms / 1000:g} s")
    table.add_row("sent", f"{found.sends} times" if found.sends != 1 else "once")
    if found.result is not None:
        table.add_row("result", cell(found.result.decode()))
    if found.error is not None:
        table.add_row("error", cell(found.error))
    for move in moves:
        table.add_row(move.state, cell(f"{shown(instant(move.at_ms))} by {move.who}"))
    console.print(table)


def _state(found: Command) -> str:
    colour = COLOUR_OF.get(found.state)
    return f"[{colour}]{found.state}[/]" if colour else found.state


def _hints(tenant_id: str) -> dict[Reason, str]:
    return {Reason.NOT_FOUND: f"`pulse command list {tenant_id}` lists them"}
