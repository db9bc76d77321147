"""`pulse serve`: the roles, in this process."""

from __future__ import annotations

import click
import structlog

from pulse.app import serve as serve_roles
from pulse.cli.context import Context, as_async
from pulse.runtime.logging import configure_logging
from pulse.runtime.roles import Role


@click.command()
@click.argument("roles", nargs=-1, required=True, type=click.Choice([role.value for role in Role]))
@click.pass_obj
@as_async
async def serve(context: Context, roles: tuple[str, ...]) -> None:
    """Run ROLES in this process until SIGTERM or Ctrl-C.

    All are stateless: run as many of each, on as many machines, as you need.
    """
    settings = context.settings()
    chosen = [role for role in Role if role.value in roles]
    configure_logging(level=settings.log_level, log_format=settings.log_format, role="+".join(chosen))
    structlog.get_logger().info("settings", **settings.masked())
    await serve_roles(settings, chosen)
