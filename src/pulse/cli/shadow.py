"""`pulse shadow`: what a device should be, what it says it is, and who changed that."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import click
import msgspec
from msgspec import UNSET
from rich.table import Table
from rich.text import Text

from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.pool import Scoped
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.cli.context import Context, as_async, console, json_option, print_json
from pulse.cli.database import open_database
from pulse.cli.identities import change as record_of
from pulse.cli.json_argument import Json, JsonArgument, explained
from pulse.cli.tail_line import escaped
from pulse.domain.access import ChangeRecord
from pulse.domain.command_documents import instant
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import check_device_id
from pulse.domain.shadow import Sections, Shadow, ShadowBounds, ShadowKey, Update, check_update
from pulse.domain.shadow_documents import document
from pulse.domain.shadow_merge import Object
from pulse.domain.shadow_requests import Changed, change, removal
from pulse.runtime.settings import Settings

CELL_LENGTH_MAX = 100
"""In a table; --json has all of it."""
ABSENT = "–"


def _name(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    try:
        return check_device_id(value, field="--name") if value else ""
    except Refusal as refusal:
        raise click.UsageError(refusal.message) from refusal


name_option = click.option(
    "--name", default="", metavar="NAME", callback=_name, help="A named shadow; default: the unnamed one."
)
version_option = click.option("--version", type=click.IntRange(0), help="Only if the shadow is at this version.")


@click.group("shadow")
def shadow() -> None:
    """Shadows: what devices should be, and what they say they are."""


@shadow.command("get")
@click.argument("tenant_id")
@click.argument("device_id")
@name_option
@json_option
@click.pass_obj
@as_async
async def get(context: Context, tenant_id: str, device_id: str, *, name: str, as_json: bool) -> None:
    """Show a shadow: desired, reported, and where they differ."""
    async with open_shadows(context.settings(), tenant_id, device_id) as shadows:
        found = await shadows.shadow(ShadowKey(tenant_id, device_id, name))
    if not found.exists:
        hint = f"`pulse shadow names {tenant_id} {device_id}` lists those it has"
        raise Refusal(Reason.NOT_FOUND, f"{tenant_id}/{device_id} has no such shadow ({hint})")
    if as_json:
        print_json(document(found))
        return
    console.print(f"version {found.version}, changed {_time(instant(found.updated_ms))}", highlight=False)
    console.print(_table(found))


@shadow.command("names")
@click.argument("tenant_id")
@click.argument("device_id")
@json_option
@click.pass_obj
@as_async
async def names(context: Context, tenant_id: str, device_id: str, *, as_json: bool) -> None:
    """List the names of a device's shadows."""
    async with open_shadows(context.settings(), tenant_id, device_id) as shadows:
        found = await shadows.names(tenant_id, device_id)
    if as_json:
        print_json({"names": found})
    elif not found:
        console.print(f"{tenant_id}/{device_id} has no shadow: it has reported nothing, and nothing is desired of it.")
    else:
        for one in found:
            click.echo(one or "(unnamed)")


@shadow.command("patch")
@click.argument("tenant_id")
@click.argument("device_id")
@click.argument("desired", type=JsonArgument("desired", of_object=True))
@name_option
@version_option
@json_option
@click.pass_obj
@as_async
async def patch(
    context: Context, tenant_id: str, device_id: str, desired: Json, *, name: str, version: int | None, as_json: bool
) -> None:
    """Patch what is desired with DESIRED, a JSON Merge Patch, @FILE, or - for stdin.

    null deletes an attribute, and null for all of it everything that is desired. The device hears what is left to do,
    now or when it is back.

    \b
    pulse shadow patch acme lamp-1 '{"power": "on", "colour": null}'
    """
    settings = context.settings()
    bounds = msgspec.convert(settings, ShadowBounds, from_attributes=True)
    key = ShadowKey(tenant_id, device_id, name)
    record = record_of("shadow.change", device_id, tenant_id, name=name, desired=desired.value)
    with explained(_hints(key)):
        update = check_update(Update(Sections(desired=desired.value), version=UNSET if version is None else version))

        def decide(before: Shadow) -> Changed:
            return change(key, before, update, at_ms=_now_ms(), who=record.actor, bounds=bounds)

        async with open_shadows(settings, tenant_id, device_id, record) as shadows:
            after = (await shadows.change(key, decide)).shadow
    if as_json:
        print_json(document(after))
        return
    left = ", ".join(path for path, _ in _leaves(after.delta))
    told = f"left to do: {escaped(left)}" if left else "the device has it all"
    console.print(f"The shadow of {_whose(key)} is at version {after.version}; {told}.", markup=False, highlight=False)


@shadow.command("delete")
@click.argument("tenant_id")
@click.argument("device_id")
@name_option
@version_option
@json_option
@click.pass_obj
@as_async
async def delete(
    context: Context, tenant_id: str, device_id: str, *, name: str, version: int | None, as_json: bool
) -> None:
    """Delete a shadow; one that is made later goes on counting its versions."""
    key = ShadowKey(tenant_id, device_id, name)
    record = record_of("shadow.delete", device_id, tenant_id, name=name)

    def decide(before: Shadow) -> Changed:
        return removal(key, before, at_ms=_now_ms(), who=record.actor, version=version)

    with explained(_hints(key)):
        async with open_shadows(context.settings(), tenant_id, device_id, record) as shadows:
            gone = (await shadows.change(key, decide)).shadow
    if as_json:
        print_json({"deleted": True, "version": gone.version})
    else:
        console.print(f"The shadow of {_whose(key)} is deleted.", highlight=False)


@shadow.command("changes")
@click.argument("tenant_id")
@click.argument("device_id")
@name_option
@json_option
@click.pass_obj
@as_async
async def changes(context: Context, tenant_id: str, device_id: str, *, name: str, as_json: bool) -> None:
    """List the last changes, newest first: who asked for what."""
    async with open_shadows(context.settings(), tenant_id, device_id) as shadows:
        found = list(reversed(await shadows.changes(ShadowKey(tenant_id, device_id, name))))
    if as_json:
        listed = [{"version": e.version, "at": instant(e.at_ms), "who": e.who, "patch": e.patch} for e in found]
        print_json({"changes": listed})
        return
    table = Table("version", "when", "who", "what", box=None, pad_edge=False)
    for one in found:
        what = "deleted" if one.patch is None else _json(one.patch)
        table.add_row(str(one.version), _time(instant(one.at_ms)), _cell(one.who), _cell(what))
    console.print(table if found else f"{tenant_id}/{device_id} has no such shadow, and never had.")


@asynccontextmanager
async def open_shadows(
    settings: Settings, tenant_id: str, device_id: str, record: ChangeRecord | None = None
) -> AsyncIterator[ShadowStore]:
    """The shadows in the database of `settings`; Refusal NOT_FOUND where the device is not known."""
    async with open_database(settings) as pool:
        await IdentityStore(pool, presence_after=settings.presence_after()).device(tenant_id, device_id)
        yield ShadowStore(Scoped(pool=pool, record=record), names_max=settings.shadow_names_max)


def _hints(key: ShadowKey) -> dict[Reason, str]:
    option = f" --name {key.name}" if key.name else ""
    return {Reason.CONFLICT: f"`pulse shadow get {key.tenant_id} {key.device_id}{option}` shows it as it is now"}


def _table(found: Shadow) -> Table:
    """A line for each attribute that is desired or reported, those marked that are left to do."""
    desired, reported = dict(_leaves(found.desired.state)), dict(_leaves(found.reported.state))
    left = dict(_leaves(found.delta))
    table = Table("attribute", "desired", "reported", "", box=None, pad_edge=False)
    for path in sorted(desired.keys() | reported.keys()):
        to_do = path in left
        cells = [_cell(desired.get(path, ABSENT)), _cell(reported.get(path, ABSENT))]
        table.add_row(_cell(path), *cells, "to do" if to_do else "", style="yellow" if to_do else "")
    return table


def _leaves(state: Object, above: str = "") -> Iterator[tuple[str, str]]:
    """Each attribute that is no object with something in it: its path, and its value as JSON."""
    for name, value in state.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", _json(value)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _cell(text: str) -> Text:
    """Without anything that a terminal would act on: a device may have said it."""
    shown = escaped(text)
    return Text(shown if len(shown) <= CELL_LENGTH_MAX else f"{shown[: CELL_LENGTH_MAX - 1]}…")


def _whose(key: ShadowKey) -> str:
    return f"{key.tenant_id}/{key.device_id}" + (f", {key.name}," if key.name else "")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S %Z}"
