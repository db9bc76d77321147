"""`pulse tenant`: make tenants, list them, let them speak or not, and say how often."""

from __future__ import annotations

import re

import click
import msgspec
from rich.markup import escape
from rich.table import Table

from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.identities import change, enabled_of, limit_option, open_identities, status_of, status_option
from pulse.domain.errors import Refusal
from pulse.domain.identity import TenantDetails
from pulse.domain.limits import Rate, TenantLimits, check_rate
from pulse.domain.registry import tenant_key

_RATE = re.compile(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)/([0-9]{1,10})")


def _as_rate(_context: click.Context, parameter: click.Parameter, text: str | None) -> Rate | None:
    """The rate of an option's text."""
    if text is None:
        return None
    found = _RATE.fullmatch(text)
    if found is None:
        raise click.BadParameter("messages a second, a slash, and messages at once, as in 500/2000")
    try:
        return check_rate(Rate(float(found[1]), int(found[2])), field=parameter.name or "")
    except Refusal as error:
        raise click.BadParameter(error.message) from error


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
    async with open_identities(
        context.settings(), change("tenant.create", tenant_id, tenant_id, name=name)
    ) as identities:
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


@tenant.command("limit")
@click.argument("tenant_id")
@click.option("--messages", metavar="PER_S/BURST", callback=_as_rate, help="All its devices together, as in 500/2000.")
@click.option("--device-messages", metavar="PER_S/BURST", callback=_as_rate, help="Each of its devices.")
@json_option
@click.pass_obj
@as_async
async def limit(
    context: Context, tenant_id: str, messages: Rate | None, device_messages: Rate | None, as_json: bool
) -> None:
    """Give a tenant limits of its own, in place of those that it had.

    A rate is messages a second in the long run (0: no limit) and messages at once. The settings hold for what is not
    given, so that without options the tenant has no limits of its own any more.
    """
    limits = TenantLimits(messages=messages, device_messages=device_messages)
    record = change("tenant.limit", tenant_id, tenant_id, **msgspec.structs.asdict(limits))
    async with open_identities(context.settings(), record) as identities:
        await identities.store.set_tenant_limits(tenant_id, limits)
        projected = await identities.project([tenant_key(tenant_id)])
    if as_json:
        print_json({"tenant_id": tenant_id, "limits": limits, "projected": projected})
    else:
        console.print(
            f"Tenant {tenant_id}: {_shown(messages)}; each of its devices: {_shown(device_messages)}.", highlight=False
        )


async def _set_enabled(context: Context, tenant_id: str, enabled: bool, as_json: bool) -> None:
    record = change("tenant.enable" if enabled else "tenant.disable", tenant_id, tenant_id)
    async with open_identities(context.settings(), record) as identities:
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
    table.add_row("may send", _shown(found.limits.messages))
    table.add_row("each device", _shown(found.limits.device_messages))
    table.add_row("made", f"{found.created_at:%Y-%m-%d %H:%M:%S %Z}")
    console.print(table)


def _shown(rate: Rate | None) -> str:
    if rate is None:
        return "as the settings say"
    return f"{rate.per_s:g} messages a second, {rate.burst} at once" if rate.per_s else "no limit"
