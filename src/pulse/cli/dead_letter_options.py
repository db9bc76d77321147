"""The options of `pulse dead-letters` that say which of them are meant."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click
import msgspec

from pulse.cli.tail import Age
from pulse.domain.dead_letter import Filter
from pulse.domain.errors import Reason
from pulse.topology.declared import load

R = TypeVar("R")


class Moment(click.ParamType[datetime]):
    """An age like 2h, or a time like 2026-11-23T10:00 (UTC unless it says otherwise)."""

    name = "age or time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Read it."""
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            try:
                age: timedelta = Age().convert(value, param, ctx)
            except click.BadParameter:
                self.fail(f"{value!r} is neither an age like 90s, 10m, 2h, 1d nor a time like 2026-11-23T10:00")
            return datetime.now(UTC) - age
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def filter_options(command: Callable[..., R]) -> Callable[..., R]:
    """The options that say which dead letters; the command gets them as `wanted`."""
    streams = [stream.name for stream in load().streams if not stream.name.startswith("KV_")]
    options = (
        click.option("--id", "letter_id", type=click.IntRange(1), help="The one with this id."),
        click.option("--reason", type=click.Choice([reason.value for reason in Reason]), metavar="REASON", help="Why."),
        click.option("--tenant", "tenant_id", metavar="TENANT_ID"),
        click.option("--device", "device_id", metavar="DEVICE_ID"),
        click.option("--stream", type=click.Choice(streams), metavar="STREAM", help="Where it came from."),
        click.option("--route", "route_id", metavar="ROUTE_ID", help="Jobs of this route."),
        click.option("--since", type=Moment(), metavar="AGE|TIME", help="Died at that time or later."),
        click.option("--until", type=Moment(), metavar="AGE|TIME", help="Died before that time."),
    )

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> R:
        fields = ("letter_id", "reason", "tenant_id", "device_id", "stream", "route_id", "since", "until")
        return command(*args, wanted=Filter(**{name: given.pop(name) for name in fields}), **given)

    for option in reversed(options):
        run = option(run)
    return run


state_option = click.option(
    "--state", type=click.Choice(["waiting", "replayed"]), help="Only those never replayed, or those replayed."
)


def in_state(wanted: Filter, state: str | None) -> Filter:
    """Of those that are wanted, those in the state that `--state` names."""
    return wanted if state is None else msgspec.structs.replace(wanted, replayed=state == "replayed")
