"""What `pulse route` commands share: the store and its way to the edge, a route from flags or JSON, refusals that mark
the place in an expression.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.pool import Scoped
from pulse.adapters.postgres.recent_messages import RecentMessages
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.adapters.postgres.routes import RouteStore
from pulse.cli.command_fleet import read_attribute
from pulse.cli.database import open_database
from pulse.cli.identities import Identities
from pulse.cli.json_argument import Json, JsonArgument, said
from pulse.domain.access import ChangeRecord
from pulse.domain.errors import Reason, Refusal
from pulse.domain.registry import route_key
from pulse.domain.route import MATCHED_TYPES
from pulse.runtime.settings import Settings
from pulse.wiring.routes import sealer_of

R = TypeVar("R")
SHOWN_AROUND = 60
HERE = "⟨here⟩"


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The routes, the messages that they are tried on, and the edge."""

    store: RouteStore
    messages: RecentMessages
    identities: Identities

    async def tell(self, tenant_id: str, route_id: str) -> bool:
        """Tell the workers of a route that was changed; a warning where they cannot be told now."""
        return await self.identities.project([route_key(tenant_id, route_id)])


@asynccontextmanager
async def open_routes(settings: Settings, record: ChangeRecord | None = None) -> AsyncIterator[Routes]:
    """The routes in the database of `settings`."""
    async with open_database(settings) as pool:
        yield Routes(
            store=RouteStore(Scoped(pool=pool, record=record), seals=sealer_of(settings)),
            messages=RecentMessages(pool, statement_s_max=settings.query_s_max),
            identities=Identities(
                store=IdentityStore(pool, presence_after=settings.presence_after()),
                truth=RegistryTruth(pool),
                settings=settings,
            ),
        )


def route_options(command: Callable[..., R]) -> Callable[..., R]:
    """The argument and options that say what a route is; the command gets them as `asked`."""
    types = [str(each) for each in MATCHED_TYPES]
    options = (
        click.argument("definition", type=JsonArgument("route", of_object=True), metavar="[JSON]", required=False),
        click.option("--name", help="What people call it."),
        click.option("--webhook", metavar="URL", help="POST to this URL."),
        click.option("--header", "headers", metavar="NAME=VALUE", multiple=True, help="With --webhook; repeatable."),
        click.option("--timeout", "timeout_s", type=float, metavar="S", help="With --webhook: of one attempt."),
        click.option("--mqtt", "topic", metavar="TOPIC", help="Publish below tenant/TENANT_ID/route/."),
        click.option("--when", "expression", metavar="CEL", help="Like 'metrics.temp > 30.0'."),
        click.option(
            "--type", "types", type=click.Choice(types), multiple=True, help="Repeatable; default: telemetry."
        ),
        click.option("--device", "devices", metavar="DEVICE_ID", multiple=True, help="Only this one; repeatable."),
        click.option("--prefix", help="Only devices whose ids begin so."),
        click.option(
            "--attribute", "attributes", metavar="NAME=VALUE", multiple=True, help="Only devices with it; repeatable."
        ),
        click.option(
            "--ordered", is_flag=True, help="Of one device one after the other, in the order of their stream."
        ),
        click.option("--template", metavar="JSON|@FILE", help="What is sent: JSON with places like ${metrics.temp}."),
    )

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> R:
        names = (
            "definition", "name", "webhook", "headers", "timeout_s", "topic", "expression", "types", "devices",
            "prefix", "attributes", "ordered", "template",
        )  # fmt: skip
        return command(*args, asked=_asked(**{name: given.pop(name) for name in names}), **given)

    for option in reversed(options):
        run = option(run)
    return run


def _asked(*, definition: Json | None, webhook: str | None, topic: str | None, **given: Any) -> dict[str, Any]:
    """A route as JSON has it, with what the flags say in place of what stands there."""
    asked: dict[str, Any] = dict(definition.value or {}) if definition else {}
    if webhook and topic:
        raise click.UsageError("a route has one destination: --webhook or --mqtt")
    if topic:
        asked["destination"] = {"kind": "mqtt", "topic": topic}
    elif webhook:
        asked["destination"] = {"kind": "webhook", "url": webhook}
    if given["headers"] or given["timeout_s"] is not None:
        destination = dict(asked.get("destination") or {})
        if given["headers"]:
            destination["headers"] = dict(map(_header, given["headers"]))
        if given["timeout_s"] is not None:
            destination["timeout_s"] = given["timeout_s"]
        asked["destination"] = destination
    match = dict(asked.get("match") or {})
    devices = dict(match.get("devices") or {})
    attributes = dict(map(read_attribute, given["attributes"]))
    devices |= _given(ids=list(given["devices"]), prefix=given["prefix"], attributes=attributes)
    match |= _given(message_types=list(given["types"]), expression=given["expression"], devices=devices)
    asked |= _given(match=match, name=given["name"])
    if given["ordered"]:
        asked["ordered"] = True
    if given["template"] is not None:
        asked["template"] = _text(given["template"])
    return asked


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise click.UsageError("--header takes NAME=VALUE")
    return name, value


def _text(argument: str) -> str:
    """The template as it stands there, or in a file."""
    if not argument.startswith("@"):
        return argument
    try:
        with click.open_file(argument[1:], encoding="utf-8") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--template {argument}: {error}") from error


@contextmanager
def explained(asked: Mapping[str, Any] | None = None, hints: Mapping[Reason, str] | None = None) -> Iterator[None]:
    """What is refused within says which part is at fault, where in an expression, and what to do."""
    try:
        yield
    except Refusal as refusal:
        message = said(refusal)
        expression = ((asked or {}).get("match") or {}).get("expression")
        if refusal.field == "match.expression" and refusal.position is not None and isinstance(expression, str):
            message += f": {_marked(expression, refusal.position)}"
        hint = (hints or {}).get(refusal.reason)
        raise Refusal(refusal.reason, f"{message} ({hint})" if hint else message, field=refusal.field) from refusal


def _marked(expression: str, at: int) -> str:
    """The expression, in one line, with a mark where reading stopped."""
    before, after = expression[:at][-SHOWN_AROUND:], expression[at:][:SHOWN_AROUND]
    return f"{before}{HERE}{after}".replace("\n", " ")


def hints(tenant_id: str, route_id: str = "") -> dict[Reason, str]:
    """What to do about a refusal."""
    show = f"`pulse route show {tenant_id} {route_id}` shows it as it is now"
    return {
        Reason.NOT_FOUND: f"`pulse route list {tenant_id}` lists them",
        Reason.CONFLICT: show if route_id else f"`pulse route list {tenant_id}` lists those that are there",
    }
