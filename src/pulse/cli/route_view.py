"""Routes, their attempts and dry runs on a terminal. What others have said is shown, and never obeyed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from pulse.cli.identities import status_of
from pulse.cli.tail_line import escaped
from pulse.domain.dry_run import DryRun
from pulse.domain.route import Route, Webhook
from pulse.domain.route_trial import Trial
from pulse.domain.stored_route import RouteAttempt, RouteHealth, StoredRoute

CELL_LENGTH_MAX = 80


def table_of(page: Sequence[StoredRoute]) -> Table:
    """One line each."""
    table = Table("route", "name", "status", "types", "devices", "when", "to", box=None, pad_edge=False)
    for one in page:
        route = one.route
        table.add_row(
            route.route_id,
            cell(route.name),
            Text(status_of(route.enabled), style="" if route.enabled else "yellow"),
            ", ".join(route.match.message_types),
            cell(_devices(route)),
            cell(route.match.expression or "always"),
            cell(_to(route)),
        )
    return table


def fields_of(stored: StoredRoute, health: RouteHealth | None) -> Table:
    """All that may be told of a route."""
    route = stored.route
    table = Table.grid(padding=(0, 2))
    table.add_row("route", f"{route.route_id}, revision {route.revision}")
    table.add_row("name", cell(route.name))
    why = f": {stored.disabled_reason}" if stored.disabled_reason else ""
    table.add_row("status", cell(status_of(route.enabled) + why))
    table.add_row("types", ", ".join(route.match.message_types))
    table.add_row("devices", cell(_devices(route), length_max=1000))
    table.add_row("when", cell(route.match.expression or "always", length_max=2000))
    table.add_row("to", cell(_to(route), length_max=3000))
    if isinstance(route.destination, Webhook) and route.destination.headers:
        table.add_row("headers", cell(", ".join(sorted(route.destination.headers)), length_max=2000))
    if route.ordered:
        behind = f"; {health.in_line:,} wait for their turn" if health is not None and health.in_line else ""
        table.add_row("order", f"of one device one after the other{behind}")
    table.add_row("sends", cell(route.template or "the whole envelope", length_max=20_000))
    if stored.signed_since is not None:
        until = stored.previous_secret_until
        before = f"; the one before is valid until {_time(until)}" if until is not None else ""
        table.add_row("secret", f"of {_time(stored.signed_since)}{before}")
    if health is not None:
        table.add_row(
            "matched", f"{health.jobs:,} jobs, {health.no_room:,} found no room, {health.unanswered:,} unclear"
        )
        table.add_row("sent", f"{health.delivered:,} delivered, {health.dead:,} dead")
        since = f" since {_time(health.failing_since)}" if health.failing_since else ""
        failing = f", {health.failures:,} failures{since}" if health.failures else ""
        table.add_row("destination", f"circuit {health.circuit}{failing}")
    table.add_row("changed", _time(stored.updated_at))
    return table


def attempts_of(attempts: Sequence[RouteAttempt]) -> Table:
    """One line each."""
    table = Table("when", "id", "device", "attempt", "outcome", "answer", "ms", box=None, pad_edge=False)
    for one in attempts:
        answer = str(one.status) if one.status is not None else f"{one.failure}: {one.error}"
        colour = {"delivered": "green", "dead": "red"}.get(one.outcome, "yellow")
        table.add_row(
            _time(one.at),
            cell(one.message_id),
            cell(one.device_id),
            str(one.attempt),
            Text(one.outcome, style=colour),
            cell(answer),
            f"{one.elapsed_ms:.0f}",
        )
    return table


def dry_run_lines(ran: DryRun) -> list[str]:
    """What a dry run found, in words."""
    lines = [f"{ran.matched:,} of the last {ran.examined:,} messages match."]
    if not ran.examined:
        lines = ["There are no stored messages of devices that this route is about."]
    if ran.refused:
        lines.append(f"{ran.refused:,} of them could not be sent.")
    if ran.unanswered:
        lines.append(f"Of {ran.unanswered:,} the expression said neither yes nor no, which is no match:")
        lines += [f"  {escaped(each.why)} ({each.count:,})" for each in ran.reasons]
    if ran.destination_refused:
        lines.append(f"Nothing could be sent to the destination now: {escaped(ran.destination_refused)}.")
    if ran.ordered:
        lines.append("Those of one device would be sent one after the other, in the order of their stream.")
    if not ran.complete:
        lines.append("Time ran out before all of them were looked at.")
    for sample in ran.samples:
        to = escaped(sample.refused or sample.to)
        lines.append(f"{sample.device_id}, message {sample.position} → {to}")
        if sample.body:
            lines.append(f"  {escaped(sample.body)}")
    return lines


def trial_lines(trial: Trial) -> list[str]:
    """What became of a test message, in words."""
    answer = str(trial.status) if trial.status is not None else f"{trial.failure}: {trial.error}"
    lines = [
        f"{escaped(trial.to)}",
        f"  {'delivered' if trial.delivered else 'not delivered'}: {escaped(answer)}, {trial.elapsed_ms:.0f} ms,"
        f" as {trial.message_id}, in the name of {trial.device_id}",
    ]
    if trial.excerpt:
        lines.append(f"  {escaped(trial.excerpt)}")
    return lines


def cell(text: str, *, length_max: int = CELL_LENGTH_MAX) -> Text:
    """Without anything that a terminal would act on."""
    shown = escaped(text)
    return Text(shown if len(shown) <= length_max else f"{shown[: length_max - 1]}…")


def _devices(route: Route) -> str:
    devices = route.match.devices
    said: list[str] = []
    if devices.ids:
        said.append(", ".join(devices.ids))
    if devices.prefix:
        said.append(f"{devices.prefix}…")
    said += [f"{name}={_json(value)}" for name, value in devices.attributes.items()]
    return " and ".join(said) or "all"


def _to(route: Route) -> str:
    to = route.destination
    return to.url if isinstance(to, Webhook) else f"tenant/{route.tenant_id}/route/{to.topic}"


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S %Z}"
