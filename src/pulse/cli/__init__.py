"""The `pulse` command: one module per command group, imported only when its command runs.

Exit codes: 0 done; 1 a check failed or a system is away; 2 the call or the configuration is wrong; 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import io
import os
import select
import sys

import click
from click.shell_completion import shell_complete

from pulse import __version__
from pulse.cli.context import Context
from pulse.domain.errors import ConfigurationError, Outage, PulseError
from pulse.runtime.layers import load_with_sources
from pulse.runtime.masking import mask_text
from pulse.runtime.settings import Settings

COMMANDS = {
    "up": ("pulse.cli.up:up", "Start everything on this machine: NATS, PostgreSQL, all roles."),
    "serve": ("pulse.cli.serve:serve", "Run one role, or several, in this process."),
    "streams": ("pulse.cli.streams:streams", "Plan, apply and show the streams and consumers."),
    "migrate": ("pulse.cli.migrate:migrate", "Bring the database's schema up to date."),
    "tenant": ("pulse.cli.tenant:tenant", "Add and list tenants."),
    "device": ("pulse.cli.device:device", "Add, list, show and disable devices; rotate their tokens."),
    "shadow": ("pulse.cli.shadow:shadow", "Say what devices should be, see what they are, and who changed that."),
    "command": ("pulse.cli.command:command", "Tell devices what to do, one or many, and follow what becomes of it."),
    "route": ("pulse.cli.route:route", "Send messages to webhooks and topics; try routes before, see attempts after."),
    "key": ("pulse.cli.key:key", "Make, list and revoke keys of the control API."),
    "account": ("pulse.cli.account:account", "Who may sign in to the console."),
    "dead-letters": (
        "pulse.cli.dead_letters:dead_letters",
        "List, show, replay and purge what could not be processed.",
    ),
    "doctor": ("pulse.cli.doctor:doctor", "Look at everything, and say what is wrong and what to do."),
    "audit": ("pulse.cli.audit:audit", "Prove that every accepted message is accounted for."),
    "tail": ("pulse.cli.tail:tail", "Follow messages as they come."),
    "simulate": ("pulse.cli.simulate:simulate", "Be many devices, and check that every message arrived."),
    "settings": ("pulse.cli.show_settings:show_settings", "Print every setting and where its value comes from."),
}
"""By name: where the command is, and the line of `pulse --help`, so that the help imports none of them."""


EVERYWHERE = ("--set", "--data-dir")
"""Options of `pulse` that may stand behind the command as well."""
COMPLETION_VARIABLE = "_PULSE_COMPLETE"


class LazyGroup(click.Group):
    """Imports a command's module when the command runs, so that `pulse --help` costs no asyncpg."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            raise click.exceptions.NoSuchCommand(cmd_name, possibilities=COMMANDS, ctx=ctx)
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


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
            raise click.UsageError(f"--set takes NAME=VALUE, not {mask_text(assignment)!r}")
        flags[name.strip()] = value

    def load(more: dict[str, object], with_instance: bool) -> tuple[Settings, dict[str, str]]:
        given = {name: value for name, value in more.items() if value is not None}
        return load_with_sources(environment=os.environ, flags={**flags, **given}, with_instance=with_instance)

    ctx.obj = Context(load=load)


def main() -> None:
    """Run the command line; every error of ours is one line on stderr and an exit code.

    click's own `main` would turn a reader that left into exit code 1 and Ctrl-C into an empty line.
    """
    if instruction := os.environ.get(COMPLETION_VARIABLE):
        sys.exit(shell_complete(cli, {}, "pulse", COMPLETION_VARIABLE, instruction))
    context: click.Context | None = None
    try:
        with cli.make_context("pulse", _hoisted(sys.argv[1:])) as context:
            cli.invoke(context)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        click.echo(mask_text(shown.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except PulseError as error:
        click.echo(f"pulse: {mask_text(' '.join(str(error).split()))}{_whereabouts(context, error)}", err=True)
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)


def _whereabouts(context: click.Context | None, error: PulseError) -> str:
    """What a command that found nothing should know: it was never told where to look."""
    state = context.obj if context is not None else None
    if (
        not isinstance(state, Context)
        or state.no_instance_in is None
        or not isinstance(error, Outage | ConfigurationError)
    ):
        return ""
    return f"; nothing runs in {state.no_instance_in}: `pulse up` starts it, --data-dir names another folder"


def _hoisted(arguments: list[str]) -> list[str]:
    """`arguments` with `--set` and `--data-dir` before the command, wherever they stood."""
    first: list[str] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            rest += [argument, *remaining]
        elif argument in EVERYWHERE:
            first += [argument, *([value] if (value := next(remaining, None)) is not None else [])]
        elif argument.startswith(tuple(f"{option}=" for option in EVERYWHERE)):
            first.append(argument)
        else:
            rest.append(argument)
    return first + rest


def _reader_left() -> bool:
    """Whether stdout is what broke: the reader of `pulse settings | head -1` has seen enough, which is no failure."""
    if sys.stdout is None:
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
