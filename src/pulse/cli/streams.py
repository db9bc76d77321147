"""`pulse streams plan|apply|status`: the streams as declared, as they are, and the way from one to the other."""

from __future__ import annotations

import sys

import click
import msgspec
from rich.table import Table
from rich.text import Text

from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.streams import StreamSurvey, survey
from pulse.cli.context import Context, as_async, console, json_option, print_json
from pulse.cli.streams_status import StreamStatus, bytes_text, duration_text, status_of
from pulse.domain.errors import CheckFailed
from pulse.runtime.settings import Settings
from pulse.topology.compare import UNLIMITED
from pulse.topology.declared import Declared, load
from pulse.topology.plan import Change, Plan

DURATIONS = frozenset({"max_age", "duplicate_window", "ack_wait", "inactive_threshold", "subject_delete_marker_ttl"})
SIZES = frozenset({"max_bytes", "max_msg_size"})


@click.group()
def streams() -> None:
    """The JetStream streams and consumers: declared, actual, and the difference."""


@streams.command("plan")
@json_option
@click.pass_obj
def plan(context: Context, as_json: bool) -> None:
    """Print what `apply` would change and what that would cost. Exit 1 where something differs."""
    settings = context.settings()
    found = _read_plan(settings, load(stream_replicas=settings.stream_replicas))
    _show_plan(found, as_json=as_json)
    _refuse_blocked(found)
    if found.changes:
        raise CheckFailed(f"{_count(found.changes)} to make", hint="`pulse streams apply` makes them")


@streams.command("apply")
@click.option("--yes", is_flag=True, help="Accept that messages are evicted or consumers reset.")
@json_option
@click.pass_obj
def apply(context: Context, yes: bool, as_json: bool) -> None:
    """Bring the server to what is declared. Does nothing at all where a change is blocked."""
    settings = context.settings()
    declared = load(stream_replicas=settings.stream_replicas)
    found = _read_plan(settings, declared)
    _show_plan(found, as_json=as_json)
    _refuse_blocked(found)
    if not found.changes:
        return
    if found.costly and not yes:
        _confirm(found)
    _apply_plan(settings, declared, found)
    if not as_json:
        console.print(f"Applied {_count(found.changes)}; the server is as declared.", highlight=False)


@streams.command("status")
@json_option
@click.pass_obj
def status(context: Context, as_json: bool) -> None:
    """Print what each stream holds, how its consumers stand, and what is about to be lost."""
    settings = context.settings()
    declared = load(stream_replicas=settings.stream_replicas)
    surveys = _survey(settings, declared)
    found = [status_of(each) for each in surveys.values() if each is not None]
    missing = [name for name, each in surveys.items() if each is None]
    if as_json:
        print_json({"streams": found, "missing": missing})
        return
    _show_status(found, missing)


@as_async
async def _read_plan(settings: Settings, declared: Declared) -> Plan:
    async with connection(settings.nats_url, name="pulse streams plan") as client:
        return await Provisioner(client).plan(declared)


@as_async
async def _apply_plan(settings: Settings, declared: Declared, shown: Plan) -> None:
    """Plan anew, as time went by while somebody read the plan, and apply what is still within what was shown."""
    async with connection(settings.nats_url, name="pulse streams apply") as client:
        provisioner = Provisioner(client)
        now = await provisioner.plan(declared)
        agreed = {(change.action, change.target, change.differences) for change in shown.changes}
        costly = {change.target for change in shown.costly}
        if any((change.action, change.target, change.differences) not in agreed for change in now.changes) or any(
            change.target not in costly for change in now.costly
        ):
            raise CheckFailed("the streams have changed since the plan was printed", hint="run it again")
        await provisioner.apply(declared, now)


@as_async
async def _survey(settings: Settings, declared: Declared) -> dict[str, StreamSurvey | None]:
    async with connection(settings.nats_url, name="pulse streams status") as client:
        return {stream.name: await survey(client, stream.name) for stream in declared.streams}


def _refuse_blocked(found: Plan) -> None:
    if found.blocked:
        raise CheckFailed(
            f"{_count(found.blocked)} cannot be made in place; nothing was changed",
            hint="run the commands above" if found.blocked[0].way_out else "",
        )


def _confirm(found: Plan) -> None:
    losses = "; ".join(f"{change.target} {change.cost}" for change in found.costly)
    if not sys.stdin.isatty():
        raise CheckFailed(f"not applied: {losses}", hint="--yes accepts that")
    if not click.confirm("Apply?", err=True):
        raise CheckFailed("not applied")


def _count(changes: tuple[Change, ...]) -> str:
    return "1 change" if len(changes) == 1 else f"{len(changes)} changes"


def _show_plan(found: Plan, *, as_json: bool) -> None:
    if as_json:
        print_json({"changes": [_change_document(change) for change in found.changes], "not_ours": found.not_ours})
        return
    if found.changes:
        console.print(_table_of(found.changes))
    else:
        console.print("Nothing to do: the server is as declared.")
    for (reason, way_out), targets in _by_way_out(found.blocked).items():
        _print_plainly(f"\n{', '.join(targets)}: {reason}.")
        for command in ("The way out:", *(f"  {command}" for command in way_out)) if way_out else ():
            _print_plainly(command)
    if found.not_ours:
        _print_plainly(f"\nNot ours, left alone: {', '.join(found.not_ours)}")


def _table_of(changes: tuple[Change, ...]) -> Table:
    if not any(change.differences or change.cost for change in changes):
        table = Table("change", "what", box=None, pad_edge=False)
        for change in changes:
            table.add_row(change.action, change.target)
        return table
    table = Table("change", "what", "field", "on the server", "declared", "cost", box=None, pad_edge=False)
    for change in changes:
        cells = [change.action, change.target]
        cost = "" if change.action == "create" else str(change.cost)
        if not change.differences:
            table.add_row(*cells, "", "", "", cost)
        for difference in change.differences:
            before, after = (_value_text(difference.field, value) for value in (difference.actual, difference.declared))
            table.add_row(*cells, difference.field, Text(before), Text(after), cost)
            cells, cost = ["", ""], ""
    return table


def _by_way_out(blocked: tuple[Change, ...]) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    grouped: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for change in blocked:
        grouped.setdefault((change.reason, change.way_out), []).append(change.target)
    return grouped


def _change_document(change: Change) -> dict[str, object]:
    document: dict[str, object] = msgspec.to_builtins(change)
    del document["config"]
    return document


def _value_text(field: str, value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    if isinstance(value, int) and field in DURATIONS:
        return duration_text(value / 1e9) if value else "none"
    if isinstance(value, int) and value <= 0 and field in UNLIMITED:
        return "unlimited"
    if isinstance(value, int) and field in SIZES:
        return bytes_text(value)
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "-"
    return str(value) or "-"


def _show_status(found: list[StreamStatus], missing: list[str]) -> None:
    if found:
        table = Table(
            "stream", "messages", "bytes", "of limit", "fullest subject", "first", "last", "oldest", "of age limit",
            box=None, pad_edge=False,
        )  # fmt: skip
        for stream in found:
            table.add_row(
                stream.name,
                f"{stream.messages:,}",
                bytes_text(stream.bytes),
                _percent(stream.bytes_share),
                _percent(stream.fullest_subject_share),
                str(stream.first_seq),
                str(stream.last_seq),
                "-" if stream.oldest_age_s is None else duration_text(stream.oldest_age_s),
                _percent(stream.age_share),
            )
        console.print(table)
        _show_consumers(found)
    for stream in found:
        for warning in stream.warnings:
            _print_plainly(f"! {stream.name}: {warning}")
    if missing:
        _print_plainly(f"Missing: {', '.join(missing)}. `pulse streams apply` makes them.")


def _show_consumers(found: list[StreamStatus]) -> None:
    if not any(stream.consumers for stream in found):
        console.print("\nNo consumers.")
        return
    console.print()
    table = Table(
        "consumer", "stream", "not delivered", "not acked", "redelivered", "lag", "pulls waiting",
        box=None, pad_edge=False,
    )  # fmt: skip
    for stream in found:
        for consumer in stream.consumers:
            table.add_row(
                consumer.name,
                stream.name,
                f"{consumer.pending:,}",
                f"{consumer.ack_pending:,}",
                f"{consumer.redelivered:,}",
                f"{consumer.lag:,}",
                str(consumer.waiting_pulls),
            )
    console.print(table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _print_plainly(text: str) -> None:
    """Without markup and line breaks of our making, so that a command can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
