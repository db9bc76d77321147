"""The `pulse` command: one module per command group, imported only when its command runs.

Exit codes: 0 done; 1 a check failed or a system is away; 2 the call or the configuration is wrong; 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from pulse import __version__
from pulse.cli.context import Context
from pulse.domain.errors import ConfigurationError, PulseError
from pulse.runtime import settings as settings_module

COMMANDS = {
    "up": "pulse.cli.up:up",
    "serve": "pulse.cli.serve:serve",
    "streams": "pulse.cli.streams:streams",
    "migrate": "pulse.cli.migrate:migrate",
    "tenant": "pulse.cli.tenant:tenant",
    "device": "pulse.cli.device:device",
    "audit": "pulse.cli.audit:audit",
    "doctor": "pulse.cli.doctor:doctor",
    "tail": "pulse.cli.tail:tail",
    "simulate": "pulse.cli.simulate:simulate",
    "settings": "pulse.cli.show_settings:show_settings",
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is named, so that `pulse --help` costs no asyncpg."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pulse")
@click.option(
    "--data-dir",
    metavar="DIR",
    help="The data of `pulse up`; other commands find it there.",
)
@click.option("--set", "assignments", metavar="NAME=VALUE", multiple=True, help="Set any setting; may be repeated.")
@click.pass_context
def cli(ctx: click.Context, data_dir: str | None, assignments: tuple[str, ...]) -> None:
    """Pulse: the durable message backbone of an IoT platform."""
    flags: dict[str, object] = {"data_dir": data_dir}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise click.UsageError(f"--set takes NAME=VALUE, not {assignment!r}")
        flags[name.strip()] = value
    ctx.obj = Context(load=lambda more: settings_module.load(environment=os.environ, flags={**flags, **more}))


def main() -> None:
    """Run the command line; every error of ours is one line on stderr and an exit code."""
    try:
        status = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except PulseError as error:
        click.echo(f"pulse: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)
