"""`pulse settings`: what every setting is, and so what its name is."""

from __future__ import annotations

import click
from rich.table import Table
from rich.text import Text

from pulse.cli.context import Context, console, json_option, print_json


@click.command("settings")
@json_option
@click.pass_obj
def show_settings(context: Context, as_json: bool) -> None:
    """Print every setting, its value here, and where that comes from.

    Secrets are masked. A setting without a `from` has its default.
    """
    settings, sources = context.settings_and_sources()
    values = settings.masked()
    if as_json:
        print_json(values)
        return
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for name, value in values.items():
        table.add_row(name, Text(str(value), overflow="fold"), Text(sources.get(name, "")))
    console.print(table)
