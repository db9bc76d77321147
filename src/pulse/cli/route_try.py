"""`pulse route dry-run`, `test` and `attempts`: what a route would do, what it does now, and what became of it."""

from __future__ import annotations

from typing import Any

import click

from pulse.adapters.nats.connection import connection
from pulse.cli.context import Context, as_async, console, json_option, print_json
from pulse.cli.identities import change as record_of
from pulse.cli.identities import limit_option
from pulse.cli.route_options import explained, hints, open_routes, route_options
from pulse.cli.route_view import attempts_of, dry_run_lines, trial_lines
from pulse.domain.dry_run import MESSAGES_MAX
from pulse.domain.errors import CheckFailed
from pulse.domain.route_documents import attempt_document
from pulse.domain.route_requests import new_route
from pulse.wiring.routes import AskedTrials, dry_runs_of

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


@click.command("test")
@click.argument("tenant_id")
@click.argument("route_id")
@json_option
@click.pass_obj
@as_async
async def test(context: Context, tenant_id: str, route_id: str, *, as_json: bool) -> None:
    """Send one message to the destination now, marked as a test, and show what it answers.

    It is like the last stored message of the devices that the route is about, and stored nowhere itself. The role
    delivery sends it. Exit code 1 where the answer is not 2xx.
    """
    settings = context.settings()
    with explained(hints=hints(tenant_id, route_id)):
        async with open_routes(settings, record_of("route.test", route_id, tenant_id)) as routes:
            await routes.store.route(tenant_id, route_id)
        async with connection(settings.nats_url, name="pulse cli") as client:
            trial = await AskedTrials(client).run(tenant_id, route_id)
    if as_json:
        print_json(trial)
    else:
        for line in trial_lines(trial):
            click.echo(line)
    if not trial.delivered:
        raise CheckFailed("the destination did not take it")


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
