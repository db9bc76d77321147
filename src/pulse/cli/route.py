"""`pulse route`: which messages go to which webhooks and topics."""

from __future__ import annotations

import secrets
from typing import Any

import click
import msgspec

from pulse.cli.context import Context, as_async, console, json_option, print_json, progress_console
from pulse.cli.identities import change as record_of
from pulse.cli.identities import enabled_of, limit_option, status_option
from pulse.cli.json_argument import Json, JsonArgument
from pulse.cli.route_options import explained, hints, open_routes, route_options
from pulse.cli.route_try import attempts, dry_run, test
from pulse.cli.route_view import fields_of, table_of
from pulse.domain.access import ChangeRecord
from pulse.domain.errors import CheckFailed
from pulse.domain.json_text import read_json
from pulse.domain.route import Route
from pulse.domain.route_documents import document, health_document, settable
from pulse.domain.route_requests import (
    ROUTE_ID_BYTES,
    check_revision,
    masked,
    new_route,
    patched,
    replaced,
    with_enabled,
)
from pulse.domain.stored_route import StoredRoute
from pulse.domain.webhook import OVERLAP_S_MAX
from pulse.wiring.routes import dry_runs_of, webhook_allowed

version_option = click.option("--revision", type=click.IntRange(1), help="Only if the route is at this revision.")


@click.group("route")
def route() -> None:
    """Routes: which messages go to which webhooks and topics."""


route.add_command(dry_run)
route.add_command(test)
route.add_command(attempts)


@route.command("list")
@click.argument("tenant_id")
@status_option
@click.option("--after", default="", metavar="ROUTE_ID", help="Begin behind this id.")
@limit_option
@json_option
@click.pass_obj
@as_async
async def list_routes(
    context: Context, tenant_id: str, *, status: str | None, after: str, limit: int, as_json: bool
) -> None:
    """List the routes of a tenant."""
    async with open_routes(context.settings()) as routes:
        await routes.identities.store.tenant(tenant_id)
        page = await routes.store.routes(tenant_id, after=after, enabled=enabled_of(status), limit=limit)
    more = page[-1].route.route_id if len(page) == limit else None
    if as_json:
        print_json({"routes": [document(one) for one in page], "after": more})
        return
    console.print(table_of(page) if page else "There is no such route." if after or status else "There are no routes.")
    if more:
        progress_console.print(f"There may be more: --after {more}", style="dim", highlight=False)


@route.command("show")
@click.argument("tenant_id")
@click.argument("route_id")
@json_option
@click.pass_obj
@as_async
async def show(context: Context, tenant_id: str, route_id: str, *, as_json: bool) -> None:
    """Show a route: what it matches, where it goes, and how that takes it."""
    async with open_routes(context.settings()) as routes:
        stored = await routes.store.route(tenant_id, route_id)
        health = await routes.store.health(tenant_id, route_id)
    if as_json:
        print_json({**document(stored), "health": health_document(health)})
    else:
        console.print(fields_of(stored, health))


@route.command("add")
@click.argument("tenant_id")
@route_options
@click.option("--id", "route_id", metavar="ROUTE_ID", help="Its id; default: one is made.")
@click.option("--disabled", is_flag=True, help="Let it take nothing yet.")
@json_option
@click.pass_obj
@as_async
async def add(
    context: Context, tenant_id: str, *, asked: dict[str, Any], route_id: str | None, disabled: bool, as_json: bool
) -> None:
    """Make a route, from options, or from JSON, @FILE, or - for stdin; of a webhook its secret is shown once.

    \b
    pulse route add acme --webhook https://hooks.example.com/pulse --when 'metrics.temp > 30.0'
    """
    settings = context.settings()
    name = route_id or f"r-{secrets.token_hex(ROUTE_ID_BYTES)}"
    asked = {**asked, "enabled": False} if disabled else asked
    with explained(asked, hints(tenant_id)), dry_runs_of(settings) as dry_runs:
        if "destination" not in asked:
            raise click.UsageError("say where it goes: --webhook URL, --mqtt TOPIC, or JSON with a destination")
        made = new_route(asked, tenant_id=tenant_id, route_id=name, allowed=dry_runs.allowed)
        dry_runs.check(made)
        async with open_routes(settings, record_of("route.create", name, tenant_id, **settable(made))) as routes:
            stored, secret = await routes.store.add(made)
            projected = await routes.tell(tenant_id, name)
    _print_changed(stored, "is made", as_json=as_json, secret=secret, projected=projected)


@route.command("edit")
@click.argument("tenant_id")
@click.argument("route_id")
@click.argument("patch", type=JsonArgument("route", of_object=True), metavar="[PATCH]", required=False)
@version_option
@json_option
@click.pass_obj
@as_async
async def edit(
    context: Context, tenant_id: str, route_id: str, *, patch: Json | None, revision: int | None, as_json: bool
) -> None:
    """Change a route by PATCH, a JSON Merge Patch, @FILE, or - for stdin; without one in $EDITOR.

    Headers that are not named keep their values.

    \b
    pulse route edit acme hot '{"match": {"expression": "metrics.temp > 35.0"}}'
    """
    settings = context.settings()
    allowed = webhook_allowed(settings)
    if patch is None:
        asked, revision = await _edited(context, tenant_id, route_id, revision)
    else:
        asked = patch.value or {}

    with explained(asked, hints(tenant_id, route_id)), dry_runs_of(settings) as dry_runs:

        def decide(before: Route) -> Route:
            check_revision(before, revision)
            after = (replaced if patch is None else patched)(before, asked, allowed=allowed)
            return dry_runs.check(after)

        async with open_routes(settings, record_of("route.change", route_id, tenant_id, **masked(asked))) as routes:
            stored, secret = await routes.store.change(tenant_id, route_id, decide)
            projected = await routes.tell(tenant_id, route_id)
    _print_changed(stored, "is changed", as_json=as_json, secret=secret, projected=projected)


async def _edited(context: Context, tenant_id: str, route_id: str, revision: int | None) -> tuple[dict[str, Any], int]:
    """The route as $EDITOR left it, and the revision that it was."""
    async with open_routes(context.settings()) as routes:
        stored = await routes.store.route(tenant_id, route_id)
    check_revision(stored.route, revision)
    shown = settable(stored.route)
    shown["destination"].pop("header_names", None)
    text = msgspec.json.format(msgspec.json.encode(shown), indent=2).decode() + "\n"
    edited = click.edit(text, extension=".json")
    if edited is None or edited == text:
        raise CheckFailed("the route was not changed")
    asked: dict[str, Any] = read_json(msgspec.json.Decoder(dict[str, Any]), edited.encode())
    return asked, stored.route.revision


@route.command("enable")
@click.argument("tenant_id")
@click.argument("route_id")
@json_option
@click.pass_obj
@as_async
async def enable(context: Context, tenant_id: str, route_id: str, *, as_json: bool) -> None:
    """Let a route take messages again."""
    await _set_enabled(context, tenant_id, route_id, enabled=True, as_json=as_json)


@route.command("disable")
@click.argument("tenant_id")
@click.argument("route_id")
@json_option
@click.pass_obj
@as_async
async def disable(context: Context, tenant_id: str, route_id: str, *, as_json: bool) -> None:
    """Let a route take nothing more."""
    await _set_enabled(context, tenant_id, route_id, enabled=False, as_json=as_json)


async def _set_enabled(context: Context, tenant_id: str, route_id: str, *, enabled: bool, as_json: bool) -> None:
    record = record_of("route.enable" if enabled else "route.disable", route_id, tenant_id)
    async with open_routes(context.settings(), record) as routes:
        stored, _ = await routes.store.change(tenant_id, route_id, lambda before: with_enabled(before, enabled))
        projected = await routes.tell(tenant_id, route_id)
    done = "is enabled" if enabled else "is disabled"
    _print_changed(stored, done, as_json=as_json, projected=projected)


@route.command("delete")
@click.argument("tenant_id")
@click.argument("route_id")
@version_option
@json_option
@click.pass_obj
@as_async
async def delete(context: Context, tenant_id: str, route_id: str, *, revision: int | None, as_json: bool) -> None:
    """Delete a route, its secrets, and the record of its attempts; what waits for it becomes dead letters."""
    record: ChangeRecord = record_of("route.delete", route_id, tenant_id)
    with explained(hints=hints(tenant_id, route_id)):
        async with open_routes(context.settings(), record) as routes:
            await routes.store.delete(tenant_id, route_id, lambda before: check_revision(before, revision))
            projected = await routes.tell(tenant_id, route_id)
    if as_json:
        print_json({"deleted": True, "projected": projected})
    else:
        console.print(f"Route {tenant_id}/{route_id} is deleted.", highlight=False)


@route.command("rotate")
@click.argument("tenant_id")
@click.argument("route_id")
@click.option(
    "--overlap-s",
    type=click.IntRange(0, OVERLAP_S_MAX),
    default=86_400,
    show_default=True,
    help="How long the secret before stays valid too; 0 ends it at once.",
)
@json_option
@click.pass_obj
@as_async
async def rotate(context: Context, tenant_id: str, route_id: str, *, overlap_s: int, as_json: bool) -> None:
    """Sign a webhook with a new secret, which is shown once; for a while with the one before as well."""
    record = record_of("route.rotate", route_id, tenant_id, overlap_s=overlap_s)
    with explained(hints=hints(tenant_id, route_id)):
        async with open_routes(context.settings(), record) as routes:
            stored, secret = await routes.store.rotate_secret(tenant_id, route_id, overlap_s=overlap_s)
            projected = await routes.tell(tenant_id, route_id)
    _print_changed(stored, "has a new secret", as_json=as_json, secret=secret, projected=projected)


def _print_changed(stored: StoredRoute, done: str, *, as_json: bool, projected: bool, secret: str = "") -> None:
    if as_json:
        print_json({"route": document(stored), "projected": projected, "secret": secret or None})
        return
    one = stored.route
    console.print(f"Route {one.tenant_id}/{one.route_id} {done}.", highlight=False, markup=False)
    if secret:
        console.print(f"It signs with {secret} from now on, which is not shown again.", highlight=False, markup=False)
