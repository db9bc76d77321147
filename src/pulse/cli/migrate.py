"""`pulse migrate`: bring the database's schema to this version of Pulse."""

from __future__ import annotations

import click

from pulse.adapters.postgres.migrate import Migration, available, pending
from pulse.adapters.postgres.migrate import migrate as apply_migrations
from pulse.adapters.postgres.pool import open_connection
from pulse.adapters.postgres.tiers import read_storage
from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console

STATEMENT_TIMEOUT_S = 3600.0
"""Of one migration: it may have to build an index over a large table."""


@click.command("migrate")
@click.option("--dry-run", is_flag=True, help="Only say what would be applied.")
@json_option
@click.pass_obj
@as_async
async def migrate(context: Context, dry_run: bool, as_json: bool) -> None:
    """Apply the schema migrations that the database does not have yet."""
    settings = context.settings()
    migrations = available()
    async with open_connection(
        settings.database_url, timeout_s=STATEMENT_TIMEOUT_S, application_name="pulse migrate"
    ) as connection:
        if dry_run:
            done = await pending(connection, migrations)
        else:
            done = await apply_migrations(connection, migrations, on_start=_announce)
        storage = await read_storage(connection)
    if as_json:
        listed = [{"number": migration.number, "name": migration.name} for migration in done]
        stored = None if storage is None else {"tier": storage.tier, "timescaledb": storage.version}
        key = "pending" if dry_run else "applied"
        print_json({"schema": len(migrations), "dry_run": dry_run, key: listed, "storage": stored})
        return
    if not done:
        console.print(f"The schema is up to date: {len(migrations):04}.")
    else:
        verb = "would be applied" if dry_run else "applied"
        for migration in done:
            console.print(f"{migration.number:04}_{migration.name} {verb}")
    if storage is not None:
        console.print(f"Storage: {storage.describe()}.", soft_wrap=True)


def _announce(migration: Migration) -> None:
    progress_console.print(f"applying {migration.number:04}_{migration.name} …", style="dim")
