"""`pulse account`: who may sign in to the console, and one-time links for the operator."""

from __future__ import annotations

import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.table import Table

from pulse.adapters.passwords import Argon2Passwords
from pulse.adapters.postgres.console import AccountStore, SessionStore
from pulse.adapters.postgres.pool import Scoped
from pulse.cli.context import Context, as_async, console, json_option, print_json
from pulse.cli.database import open_database
from pulse.cli.identities import change
from pulse.cli.key import OPERATOR_KEY_FILE
from pulse.domain.access import in_force
from pulse.domain.account import SECRET_RANDOM_BYTES, check_account_name, check_password, make_session_secret
from pulse.domain.errors import ConfigurationError
from pulse.runtime.settings import Settings

LINK_S = 3600.0
password_option = click.option(
    "--password-stdin", is_flag=True, help="Read the password from standard input instead of asking for it."
)


@click.group("account")
def account() -> None:
    """Accounts of the console; each may what a key of its own may."""


@account.command("add")
@click.argument("name")
@click.option("--tenant", "tenant_id", metavar="TENANT_ID", help="For this tenant alone.")
@click.option("--operator", is_flag=True, help="For everything, all tenants included.")
@click.option("--read-only", is_flag=True, help="It may change nothing.")
@password_option
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
    password_stdin: bool,
    as_json: bool,
) -> None:
    """Make an account."""
    if operator == (tenant_id is not None):
        raise click.UsageError("say whose account it is: --tenant TENANT_ID, or --operator")
    settings = context.settings()
    hashed = Argon2Passwords().hash(_password(check_account_name(name), from_stdin=password_stdin))
    record = change("account.create", name, tenant_id, read_only=read_only)
    async with open_database(settings) as pool:
        store = AccountStore(Scoped(pool=pool, record=record))
        made = await store.add(name, password_hash=hashed, tenant_id=tenant_id, read_only=read_only)
    if as_json:
        print_json({"account": made})
    else:
        click.echo(f"Account {name} is made. Sign in at {console_url(settings)}/")


@account.command("list")
@json_option
@click.pass_obj
@as_async
async def list_accounts(context: Context, as_json: bool) -> None:
    """List accounts, those that have ended too."""
    async with open_database(context.settings()) as pool:
        found = await AccountStore(pool).accounts()
    if as_json:
        print_json({"accounts": found})
        return
    table = Table("name", "reaches", "may", "status", "made", "key", box=None, pad_edge=False)
    for one in found:
        table.add_row(
            one.name,
            "all tenants" if one.key.tenant_id is None else f"tenant {one.key.tenant_id}",
            "read" if one.key.read_only else "read and change",
            "in force" if in_force(one.key, datetime.now(UTC)) else "ended",
            f"{one.created_at:%Y-%m-%d %H:%M}",
            str(one.key.key_id),
        )
    console.print(table)


@account.command("password")
@click.argument("name")
@password_option
@click.pass_obj
@as_async
async def set_password(context: Context, name: str, password_stdin: bool) -> None:
    """Give an account another password, and sign it out everywhere."""
    hashed = Argon2Passwords().hash(_password(check_account_name(name), from_stdin=password_stdin))
    async with open_database(context.settings()) as pool:
        await AccountStore(Scoped(pool=pool, record=change("account.password", name, None))).set_password(name, hashed)
    click.echo(f"Account {name} has another password.")


@account.command("revoke")
@click.argument("name")
@click.pass_obj
@as_async
async def revoke(context: Context, name: str) -> None:
    """End an account, and sign it out everywhere."""
    async with open_database(context.settings()) as pool:
        await AccountStore(Scoped(pool=pool, record=change("account.revoke", name, None))).end(check_account_name(name))
    click.echo(f"Account {name} is ended.")


@account.command("link")
@click.pass_obj
def link(context: Context) -> None:
    """Print a link that signs in once, as the operator of the `pulse up` of this folder."""
    settings = context.settings()
    path = Path(settings.data_dir) / OPERATOR_KEY_FILE
    try:
        key = path.read_text("ascii").strip()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}", hint="run this where `pulse up` runs, or use `pulse account add`"
        ) from error
    click.echo(sign_in_link(settings, key))


@as_async
async def sign_in_link(settings: Settings, key_secret: str) -> str:
    """An address that signs in once, for an hour, as the key of that secret."""
    secret = make_session_secret(secrets.token_bytes(SECRET_RANDOM_BYTES))
    async with open_database(settings) as pool:
        await SessionStore(pool).add_link(secret, key_secret=key_secret, life_s=LINK_S)
    return f"{console_url(settings)}/sign-in/link?token={secret}"


def console_url(settings: Settings) -> str:
    """Where the console is."""
    return settings.ui_public_url or f"http://{settings.ui_host}:{settings.ui_port}"


def _password(name: str, *, from_stdin: bool) -> str:
    if from_stdin:
        return check_password(sys.stdin.readline().rstrip("\r\n"), name)
    return check_password(str(click.prompt("Password", hide_input=True, confirmation_prompt=True)), name)
