"""`pulse tenant`: make tenants, list them, and let them speak or not."""

from __future__ import annotations

import click
from rich.markup import escape
from rich.table import Table

from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.identities import enabled_of, limit_option, open_identities, status_of, status_option
from pulse.domain.identity import TenantDetails
from pulse.domain.registry import tenant_key


@click.group("tenant")
def tenant() -> None:
    """Tenants: whose devices they are."""


@tenant.command("add")
@click.argument("tenant_id")
@click.option("--name", default="", help="For people.")
@json_option
@click.pass_obj
@as_async
async def add(context: Context, tenant_id: str, name: str, as_json: bool) -> None:
    """Make a tenant."""
    async with open_identities(context.settings()) as identities:
        made = await identities.store.add_tenant(tenant_id, name=name)
        projected = await identities.project([tenant_key(tenant_id)])
    if as_json:
        print_json({"tenant": made, "projected": projected})
    else:
        console.print(f"Tenant {tenant_id} is made.", highlight=False)
        console.print(f"Give it a device: pulse device add {tenant_id} DEVICE_ID", highlight=False)


@tenant.command("list")
@status_option
@click.option("--after", default="", metavar="TENANT_ID", help="Begin behind this one.")
@limit_option
@json_option
@click.pass_obj
@as_async
async def list_tenants(context: Context, status: str | None, after: str, limit: int, as_json: bool) -> None:
    """List tenants, by id."""
    async with open_identities(context.settings()) as identities:
        page = await identities.store.tenants(after=after, enabled=enabled_of(status), limit=limit)
    more = page[-1].tenant_id if len(page) == limit else None
    if as_json:
        print_json({"tenants": page, "after": more})
        return
    table = Table("tenant", "name", "status", "made", box=None, pad_edge=False)
    for one in page:
        table.add_row(one.tenant_id, escape(one.name), status_of(one.enabled), f"{one.created_at:%Y-%m-%d %H:%M}")
    console.print(table)
    if more:
        progress_console.print(f"There may be more: --after {more}", style="dim")


@tenant.command("show")
@click.argument("tenant_id")
@json_option
@click.pass_obj
@as_async
async def show(context: Context, tenant_id: str, as_json: bool) -> None:
    """Show a tenant, and how many devices it has."""
    async with open_identities(context.settings()) as identities:
        found = await identities.store.tenant(tenant_id)
        devices = await identities.store.device_count(tenant_id)
    if as_json:
        print_json({"tenant": found, "devices": devices})
    else:
        _print_tenant(found, devices)


@tenant.command("enable")
@click.argument("tenant_id")
@json_option
@click.pass_obj
@as_async
async def enable(context: Context, tenant_id: str, as_json: bool) -> None:
    """Let the tenant's devices speak again, those that are enabled themselves."""
    await _set_enabled(context, tenant_id, True, as_json)


@tenant.command("disable")
@click.argument("tenant_id")
@json_option
@click.pass_obj
@as_async
async def disable(context: Context, tenant_id: str, as_json: bool) -> None:
    """Refuse all of the tenant's devices from now on."""
    await _set_enabled(context, tenant_id, False, as_json)


async def _set_enabled(context: Context, tenant_id: str, enabled: bool, as_json: bool) -> None:
    async with open_identities(context.settings()) as identities:
        await identities.store.set_tenant_enabled(tenant_id, enabled)
        projected = await identities.project([tenant_key(tenant_id)])
    if as_json:
        print_json({"tenant_id": tenant_id, "enabled": enabled, "projected": projected})
    else:
        console.print(f"Tenant {tenant_id} is {status_of(enabled)}.", highlight=False)


def _print_tenant(found: TenantDetails, devices: int) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("tenant", found.tenant_id)
    table.add_row("name", escape(found.name))
    table.add_row("status", status_of(found.enabled))
    table.add_row("devices", str(devices))
    table.add_row("made", f"{found.created_at:%Y-%m-%d %H:%M:%S %Z}")
    console.print(table)
