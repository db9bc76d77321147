"""`pulse audit`: is every message that a stream of devices accepted accounted for?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
import msgspec
from rich.table import Table

from pulse.cli.context import Context, as_async, console, json_option, print_json
from pulse.domain.audit import RowCheck, StreamAudit
from pulse.domain.errors import CheckFailed
from pulse.wiring.cli import open_auditor
from pulse.wiring.streams import TELEMETRY, WORKERS


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints; one audit a making of each stream, oldest first; `rows` are those of telemetry."""

    ok: bool
    audits: Sequence[StreamAudit]
    rows: Sequence[RowCheck]


@click.command()
@click.option("--rows", is_flag=True, help="Also count the rows themselves: slow; right only while nothing is written.")
@json_option
@click.pass_obj
@as_async
async def audit(context: Context, rows: bool, as_json: bool) -> None:
    """Prove accepted = stored + dead + in flight + expired, on the running system.

    Exits 1 where it does not add up, where messages expired unprocessed, or where rows are missing or double.
    """
    async with open_auditor(context.settings()) as auditor:
        audits = [each for stream in WORKERS for each in await auditor.audit(stream)]
        of_rows = [each for each in audits if rows and each.stream == TELEMETRY]
        checks = {each.epoch: await auditor.check_rows(each.epoch) for each in of_rows}
    expired = sum(each.expired for each in audits)
    balanced = all(each.balanced for each in audits)
    agrees = all(check.agrees for check in checks.values())
    if as_json:
        print_json(Report(ok=balanced and agrees and expired == 0, audits=audits, rows=list(checks.values())))
    else:
        console.print(_table(audits, checks))
    if not balanced:
        raise CheckFailed("the ledger settles messages that the stream never accepted")
    if not agrees:
        raise CheckFailed("rows are missing or double")
    if expired:
        raise CheckFailed(
            f"{expired} messages expired unprocessed",
            hint="the workers were away for longer than the stream's limits keep a message",
        )


def _table(audits: Sequence[StreamAudit], checks: Mapping[int, RowCheck]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("stream", "epoch", "accepted", "= stored", "+ dead", "+ in flight", "+ expired"):
        table.add_column(name, justify="left" if name == "stream" else "right")
    if checks:
        table.add_column("rows", justify="right")
        table.add_column("duplicates", justify="right")
    for each in audits:
        numbers = (each.epoch, each.accepted, each.stored, each.dead, each.in_flight, each.expired)
        cells = [each.stream, *(f"{number:,}" for number in numbers)]
        check = checks.get(each.epoch) if each.stream == TELEMETRY else None
        if check is not None:
            cells += [f"{check.rows_in_table:,} of {check.rows_in_ledger:,}", f"{check.duplicates:,}"]
        table.add_row(*cells, style="" if each.balanced and not each.expired else "bold red")
    return table
