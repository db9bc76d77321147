"""`pulse route dry-run` and `pulse route attempts`: what a route would do, and what became of what it did."""

from __future__ import annotations

from typing import Any

import click

from pulse.app import dry_runs_of
from pulse.cli.context import Context, as_async, console, json_option, print_json
from pulse.cli.identities import limit_option
from pulse.cli.route_options import explained, hints, open_routes, route_options
from pulse.cli.route_view import attempts_of, dry_run_lines
from pulse.domain.dry_run import MESSAGES_MAX
from pulse.domain.route_documents import attempt_document
from pulse.domain.route_requests import new_route

messages_option = click.option(
    "--messages", type=click.IntRange(1, MESSAGES_MAX), default=100, show_default=True, help="How many to try it on."
)


@click.command("dry-run")
@click.argument("tenant_id")
@click.option("--id", "route_id", metavar="ROUTE_ID", help="A route that is there, in place of a draft.")
@route_options
@messages_option
@json_option
@click.pass_obj
@as_async
async def dry_run(
    context: Context, tenant_id: str, *, route_id: str | None, asked: dict[str, Any], messages: int, as_json: bool
) -> None:
    """Try a route on the last stored messages: what would match, and what would be sent. Nothing is.

    \b
    pulse route dry-run acme --webhook https://hooks.example.com/pulse --when 'metrics.temp > 30.0'
    pulse route dry-run acme --id hot
    """
    settings = context.settings()
    if (route_id is None) is (asked == {}):
        raise click.UsageError("give a draft, by options or as JSON, or --id and a route that is there")
    with explained(asked, hints(tenant_id)), dry_runs_of(settings) as dry_runs:
        async with open_routes(settings) as routes:
            await routes.identities.store.tenant(tenant_id)
            if route_id is not None:
                wanted = (await routes.store.route(tenant_id, route_id)).route
            else:
                wanted = new_route(asked, tenant_id=tenant_id, route_id="draft", allowed=dry_runs.allowed)
            ran = await dry_runs.run(wanted, routes.messages, limit=messages)
    if as_json:
        print_json(ran)
        return
    for line in dry_run_lines(ran):
        click.echo(line)


@click.command("attempts")
@click.argument("tenant_id")
@click.argument("route_id")
@limit_option
@json_option
@click.pass_obj
@as_async
async def attempts(context: Context, tenant_id: str, route_id: str, *, limit: int, as_json: bool) -> None:
    """List the last attempts of a route, newest first."""
    async with open_routes(context.settings()) as routes:
        await routes.store.route(tenant_id, route_id)
        found = await routes.store.attempts(tenant_id, route_id, limit=limit)
    if as_json:
        print_json({"attempts": [attempt_document(one) for one in found]})
    else:
        console.print(attempts_of(found) if found else "Nothing was sent for this route yet.")
