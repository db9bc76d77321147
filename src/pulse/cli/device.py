"""`pulse device`: make devices, list them, give them new tokens, and let them speak or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import click
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.identities import (
    Identities,
    change,
    enabled_of,
    limit_option,
    open_identities,
    status_of,
    status_option,
)
from pulse.domain.identity import DeviceDetails, NewDevice
from pulse.domain.registry import device_key, tenant_key
from pulse.runtime.settings import Settings

COUNT_MAX = 100_000
OVERLAP_S_DEFAULT = 86_400
OVERLAP_S_MAX = 30 * 86_400


@click.group("device")
def device() -> None:
    """Devices: who may send, and with which token."""


@device.command("add")
@click.argument("tenant_id")
@click.argument("device_id", required=False)
@click.option("--name", default="", help="For people.")
@click.option("--attribute", "attributes", metavar="NAME=VALUE", multiple=True, help="May be repeated.")
@click.option("--count", type=click.IntRange(1, COUNT_MAX), help="Make so many devices, numbered from 1.")
@click.option("--prefix", default="device-", show_default=True, help="With --count: how their ids begin.")
@json_option
@click.pass_obj
@as_async
async def add(
    context: Context,
    tenant_id: str,
    *,
    device_id: str | None,
    name: str,
    attributes: tuple[str, ...],
    count: int | None,
    prefix: str,
    as_json: bool,
) -> None:
    """Make a device, or --count of them, and print the token, which cannot be read again."""
    if (device_id is None) == (count is None):
        raise click.UsageError("name either one DEVICE_ID, or how many with --count")
    values = dict(_attribute(text) for text in attributes)
    ids = [device_id] if device_id is not None else _numbered(prefix, count or 0)
    settings = context.settings()
    record = change("device.create", ids[0], tenant_id, **({} if count is None else {"count": count}))
    async with open_identities(settings, record) as identities:
        new = [NewDevice(device_id=one, name=name, attributes=values) for one in ids]
        tokens = await identities.store.add_devices(tenant_id, new)
        projected = await _project(identities, tenant_id, ids)
    if as_json:
        listed = [{"device_id": one, "token": token} for one, token in tokens.items()]
        print_json({"tenant_id": tenant_id, "devices": listed, "projected": projected})
    elif device_id is not None:
        console.print(f"Device {tenant_id}/{device_id} is made.", highlight=False)
        _print_token(settings, tenant_id, device_id, tokens[device_id])
    else:
        for one, token in tokens.items():
            click.echo(f"{one}\t{token}")
        progress_console.print(f"{len(tokens)} devices of tenant {tenant_id} are made.", highlight=False)
        progress_console.print("These tokens cannot be read again.")


@device.command("list")
@click.option("--tenant", "tenant_id", metavar="TENANT_ID", help="Only this tenant's.")
@status_option
@click.option("--after", metavar="TENANT_ID/DEVICE_ID", default="/", help="Begin behind this one.")
@limit_option
@json_option
@click.pass_obj
@as_async
async def list_devices(
    context: Context, *, tenant_id: str | None, status: str | None, after: str, limit: int, as_json: bool
) -> None:
    """List devices, by tenant and id."""
    after_tenant, slash, after_device = after.partition("/")
    if not slash:
        raise click.UsageError(f"--after takes TENANT_ID/DEVICE_ID, not {after!r}")
    async with open_identities(context.settings()) as identities:
        page = await identities.store.devices(
            tenant_id=tenant_id, enabled=enabled_of(status), after=(after_tenant, after_device), limit=limit
        )
    more = f"{page[-1].tenant_id}/{page[-1].device_id}" if len(page) == limit else None
    if as_json:
        print_json({"devices": page, "after": more})
        return
    table = Table("tenant", "device", "name", "status", "presence", "last seen", "made", box=None, pad_edge=False)
    for one in page:
        table.add_row(
            one.tenant_id,
            one.device_id,
            escape(one.name),
            status_of(one.enabled),
            one.presence,
            _time(one.last_seen) if one.last_seen else "never",
            f"{one.created_at:%Y-%m-%d %H:%M}",
        )
    console.print(table)
    if more:
        progress_console.print(f"There may be more: --after {more}", style="dim", highlight=False)


@device.command("show")
@click.argument("tenant_id")
@click.argument("device_id")
@json_option
@click.pass_obj
@as_async
async def show(context: Context, tenant_id: str, device_id: str, as_json: bool) -> None:
    """Show a device, and when its tokens end."""
    async with open_identities(context.settings()) as identities:
        found = await identities.store.device(tenant_id, device_id)
    if as_json:
        print_json({"device": found})
    else:
        _print_device(found)


@device.command("rotate")
@click.argument("tenant_id")
@click.argument("device_id")
@click.option(
    "--overlap",
    "overlap_s",
    type=click.IntRange(0, OVERLAP_S_MAX),
    default=OVERLAP_S_DEFAULT,
    show_default=True,
    metavar="SECONDS",
    help="How long the old tokens stay valid; 0 ends them at once, as a leaked one must.",
)
@json_option
@click.pass_obj
@as_async
async def rotate(context: Context, tenant_id: str, device_id: str, overlap_s: int, as_json: bool) -> None:
    """Give a device a new token; the old one stays valid for a while."""
    settings = context.settings()
    record = change("device.rotate", device_id, tenant_id, overlap_s=overlap_s)
    async with open_identities(settings, record) as identities:
        token = await identities.store.rotate_token(tenant_id, device_id, overlap_s=overlap_s)
        projected = await _project(identities, tenant_id, [device_id])
    if as_json:
        body = {"tenant_id": tenant_id, "device_id": device_id, "token": token, "overlap_s": overlap_s}
        print_json(body | {"projected": projected})
        return
    old = f"stay valid for {overlap_s} s more at most" if overlap_s else "have ended"
    console.print(f"Device {tenant_id}/{device_id} has a new token; older ones {old}.", highlight=False)
    _print_token(settings, tenant_id, device_id, token)


@device.command("enable")
@click.argument("tenant_id")
@click.argument("device_id")
@json_option
@click.pass_obj
@as_async
async def enable(context: Context, tenant_id: str, device_id: str, as_json: bool) -> None:
    """Let a device speak again, with the tokens that it has."""
    await _set_enabled(context, tenant_id, device_id, enabled=True, as_json=as_json)


@device.command("disable")
@click.argument("tenant_id")
@click.argument("device_id")
@json_option
@click.pass_obj
@as_async
async def disable(context: Context, tenant_id: str, device_id: str, as_json: bool) -> None:
    """Refuse a device from now on."""
    await _set_enabled(context, tenant_id, device_id, enabled=False, as_json=as_json)


async def _set_enabled(context: Context, tenant_id: str, device_id: str, *, enabled: bool, as_json: bool) -> None:
    record = change("device.enable" if enabled else "device.disable", device_id, tenant_id)
    async with open_identities(context.settings(), record) as identities:
        await identities.store.set_device_enabled(tenant_id, device_id, enabled)
        projected = await _project(identities, tenant_id, [device_id])
    if as_json:
        body = {"tenant_id": tenant_id, "device_id": device_id, "enabled": enabled}
        print_json(body | {"projected": projected})
    else:
        console.print(f"Device {tenant_id}/{device_id} is {status_of(enabled)}.", highlight=False)


async def _project(identities: Identities, tenant_id: str, device_ids: list[str]) -> bool:
    """Tell the edge of the devices; of their tenant too, should it have missed that."""
    keys = [tenant_key(tenant_id), *(device_key(tenant_id, device_id) for device_id in device_ids)]
    with _progress(len(keys)) as progress:
        task = progress.add_task("telling the edge", total=len(keys))
        return await identities.project(keys, on_progress=lambda done: progress.advance(task, done))


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """A bar for work that takes a second or more; else none."""
    with Progress(console=progress_console, transient=True, disable=total < 5000) as progress:
        yield progress


def _numbered(prefix: str, count: int) -> list[str]:
    """As many ids, zero-padded to one width, so that they sort by number."""
    width = len(str(count))
    return [f"{prefix}{number:0{width}}" for number in range(1, count + 1)]


def _attribute(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.UsageError(f"--attribute takes NAME=VALUE, not {text!r}")
    return name, value


def _print_token(settings: Settings, tenant_id: str, device_id: str, token: str) -> None:
    """The token, and a reading sent with it; unwrapped, to be pasted."""
    url = f"http://{settings.gateway_host}:{settings.gateway_port}"
    click.echo(f"\nIts token, which cannot be read again:\n\n  {token}\n\nSend a reading:\n")
    click.echo(
        f"  curl -X POST {url}/ingest/v1/tenant/{tenant_id}/device/{device_id}/telemetry \\\n"
        f"    -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' \\\n"
        '    -d \'{"metrics":{"temp":21.5}}\''
    )


def _print_device(found: DeviceDetails) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("tenant", found.tenant_id)
    table.add_row("device", found.device_id)
    table.add_row("name", escape(found.name))
    table.add_row("status", status_of(found.enabled))
    seen = f"last seen {_time(found.last_seen)}" if found.last_seen else "never seen"
    table.add_row("presence", f"{found.presence}, {seen}")
    for name, value in found.attributes.items():
        table.add_row(f"  {escape(name)}", escape(str(value)))
    table.add_row("made", _time(found.created_at))
    table.add_row("changed", _time(found.updated_at))
    for token in found.tokens:
        end = f"ends {_time(token.expires_at)}" if token.expires_at else "does not end"
        table.add_row("token", f"of {_time(token.created_at)}, {end}")
    console.print(table)


def _time(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d %H:%M:%S %Z}"
