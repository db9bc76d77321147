"""`pulse key`: keys of the control API, for an operator or for one tenant."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from pulse.adapters.embedded.files import write_private
from pulse.adapters.postgres.access import KeyStore
from pulse.adapters.postgres.pool import Scoped
from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.database import open_database
from pulse.cli.identities import change, limit_option
from pulse.domain.access import ApiKey, ChangeRecord, in_force, is_secret, opens
from pulse.runtime.settings import Settings

DAYS_MAX = 3660
OPERATOR_KEY_FILE = "operator-key"


@click.group("key")
def key() -> None:
    """Keys of the control API: who may ask and change what."""


@key.command("add")
@click.argument("name")
@click.option("--tenant", "tenant_id", metavar="TENANT_ID", help="For this tenant alone.")
@click.option("--operator", is_flag=True, help="For everything, all tenants included.")
@click.option("--read-only", is_flag=True, help="It may change nothing.")
@click.option("--days", type=click.IntRange(1, DAYS_MAX), help="It ends after so many days; default: never.")
@json_option
@click.pass_obj
@as_async
async def add(
    context: Context,
    name: str,
    *,
    tenant_id: str | None,
    operator: bool,
    read_only: bool,
    days: int | None,
    as_json: bool,
) -> None:
    """Make a key and print its secret, which cannot be read again."""
    if operator == (tenant_id is not None):
        raise click.UsageError("say whose key it is: --tenant TENANT_ID, or --operator")
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    settings = context.settings()
    record = change("key.create", name, tenant_id, read_only=read_only, expires_at=expires_at)
    async with _store(settings, record) as store:
        made, secret = await store.add(name=name, tenant_id=tenant_id, read_only=read_only, expires_at=expires_at)
    if as_json:
        print_json({"key": made, "secret": secret})
        return
    url = f"http://{settings.ui_host}:{settings.ui_port}/api/v1"
    path = "tenants" if tenant_id is None else f"tenants/{tenant_id}/devices"
    click.echo(f"Key {made.key_id} is made. Its secret, which cannot be read again:\n\n  {secret}\n\nAsk with it:\n")
    click.echo(f"  curl -H 'Authorization: Bearer {secret}' {url}/{path}")


@key.command("list")
@click.option("--after", type=int, default=0, metavar="KEY_ID", help="Begin behind this one.")
@limit_option
@json_option
@click.pass_obj
@as_async
async def list_keys(context: Context, after: int, limit: int, as_json: bool) -> None:
    """List keys, those that have ended too."""
    async with _store(context.settings()) as store:
        page = await store.keys(after=after, limit=limit)
    more = page[-1].key_id if len(page) == limit else None
    if as_json:
        print_json({"keys": page, "after": more})
        return
    table = Table("key", "name", "reaches", "may", "status", "made", "last used", box=None, pad_edge=False)
    for one in page:
        table.add_row(
            str(one.key_id),
            escape(one.name),
            "all tenants" if one.tenant_id is None else f"tenant {one.tenant_id}",
            "read" if one.read_only else "read and change",
            _status(one),
            f"{one.created_at:%Y-%m-%d %H:%M}",
            "never" if one.last_used_at is None else f"{one.last_used_at:%Y-%m-%d %H:%M}",
        )
    console.print(table)
    if more:
        progress_console.print(f"There may be more: --after {more}", style="dim", highlight=False)


@key.command("revoke")
@click.argument("key_id", type=click.IntRange(1, 2**63 - 1))
@json_option
@click.pass_obj
@as_async
async def revoke(context: Context, key_id: int, as_json: bool) -> None:
    """End a key, from the next request on."""
    async with _store(context.settings(), change("key.revoke", str(key_id), None)) as store:
        ended = await store.revoke(key_id)
    if as_json:
        print_json({"key": ended})
    else:
        console.print(f"Key {key_id} ({escape(ended.name)}) is revoked.", highlight=False)


@as_async
async def operator_key(settings: Settings, folder: Path) -> str:
    """The operator's key of this data folder, kept there with mode 0600; made where none is in force."""
    path = folder / OPERATOR_KEY_FILE
    known = path.read_text("ascii").strip() if path.exists() else ""
    async with _store(settings) as store:
        if is_secret(known) and opens(await store.find(known), known, datetime.now(UTC)):
            return known
    async with _store(settings, change("key.create", "pulse up", None)) as store:
        _, secret = await store.add(name="pulse up", tenant_id=None)
    write_private(path, secret + "\n")
    return secret


@asynccontextmanager
async def _store(settings: Settings, record: ChangeRecord | None = None) -> AsyncIterator[KeyStore]:
    async with open_database(settings) as pool:
        yield KeyStore(Scoped(pool=pool, record=record))


def _status(one: ApiKey) -> str:
    if one.revoked_at is not None:
        return "revoked"
    if not in_force(one, datetime.now(UTC)):
        return "expired"
    return "in force" if one.expires_at is None else f"until {one.expires_at:%Y-%m-%d}"
