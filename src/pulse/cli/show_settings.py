"""`pulse settings`: what every setting is, and so what its name is."""

from __future__ import annotations

import click
from rich.table import Table

from pulse.cli.context import Context, console, json_option, print_json


@click.command("settings")
@json_option
@click.pass_obj
def show_settings(context: Context, as_json: bool) -> None:
    """Print every setting with its value here, secrets masked."""
    values = context.settings().masked()
    if as_json:
        print_json(values)
        return
    table = Table("setting", "value", box=None, pad_edge=False)
    for name, value in values.items():
        table.add_row(name, str(value))
    console.print(table)
