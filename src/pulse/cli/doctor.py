"""`pulse doctor`: everything that an operator would look at, a line each, whatever of it is away.

Every check is a function that returns findings; what it needs stands beside it in `_checks`. Each is bounded, so that
a system that hangs costs its own lines and no others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from rich.table import Table
from rich.text import Text

from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.postgres.pool import Pool, open_pool
from pulse.cli import doctor_nats, doctor_postgres
from pulse.cli.context import Context, as_async, console, json_option, print_json
from pulse.cli.doctor_http import role
from pulse.cli.up import PROCESSES, health_port
from pulse.domain.doctor import Finding, Status, finding, is_well
from pulse.domain.errors import CheckFailed, PulseError
from pulse.runtime.layers import INSTANCE_FILE
from pulse.runtime.settings import Settings
from pulse.topology.declared import load
from pulse.wiring.streams import TELEMETRY

CHECK_S_MAX = 8.0
CONNECT_S_MAX = 3.0
CONNECTIONS_MAX = 2
STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILING: "bold red", Status.NOT_RUN: "dim"}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints."""

    ok: bool
    findings: Sequence[Finding]


@dataclass(kw_only=True)
class Systems:
    """What could be reached: `there` names it, and holds `schema` where the tables are as this Pulse wants them."""

    there: set[str] = field(default_factory=set)
    _nats: PulseClient | None = None
    _pool: Pool | None = None

    @property
    def nats(self) -> PulseClient:
        assert self._nats is not None
        return self._nats

    @property
    def pool(self) -> Pool:
        assert self._pool is not None
        return self._pool

    async def open_nats(self, settings: Settings, stack: AsyncExitStack) -> list[Finding]:
        """Connect, and look at the server."""
        timeout_s = CONNECT_S_MAX / 2
        self._nats = await stack.enter_async_context(
            connection(settings.nats_url, name="pulse doctor", connect_timeout_s=timeout_s, drain_s_max=1.0)
        )
        findings = await doctor_nats.server(self._nats)
        self.there.add("nats")
        return findings

    async def open_postgresql(self, settings: Settings, stack: AsyncExitStack) -> list[Finding]:
        """Connect, and look at the server."""
        url, timeout_s = settings.database_url, CONNECT_S_MAX
        self._pool = await stack.enter_async_context(
            open_pool(url, size_max=CONNECTIONS_MAX, timeout_s=timeout_s, application_name="pulse doctor")
        )
        findings = await doctor_postgres.server(self._pool)
        self.there.add("postgresql")
        return findings

    async def see_schema(self) -> list[Finding]:
        """Whether the tables are there."""
        findings = await doctor_postgres.schema(self.pool)
        if is_well(findings):
            self.there.add("schema")
        return findings


class Check(NamedTuple):
    """`run` looks at one thing; `needs` are of `nats`, `postgresql`, `schema`."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[], Awaitable[list[Finding]]]


@click.command()
@click.option("--role", "roles", multiple=True, metavar="HOST:PORT", help="Where a role answers /readyz; repeatable.")
@json_option
@click.pass_obj
@as_async
async def doctor(context: Context, roles: tuple[str, ...], as_json: bool) -> None:
    """Look at NATS, PostgreSQL and the roles; say of each how it is, and what to do where it is not well.

    Exits 1 where something fails. The roles are found by themselves under `pulse up`, else by `--role` or the setting
    `role_addresses`.
    """
    settings, sources = context.settings(), context.settings_and_sources()[1]
    with_instance = Path(sources.get("nats_url", "")).name == INSTANCE_FILE
    addresses = _addresses(settings, roles, with_instance=with_instance)
    findings = await examine(settings, addresses, with_instance=with_instance)
    if as_json:
        print_json(Report(ok=is_well(findings), findings=findings))
    else:
        console.print(_table(findings))
    failing = [each.check for each in findings if each.status is Status.FAILING]
    if failing:
        raise CheckFailed(f"{len(failing)} of {len(findings)} fail: {', '.join(dict.fromkeys(failing))}")


async def examine(settings: Settings, addresses: Mapping[str, str], *, with_instance: bool) -> list[Finding]:
    """All findings, in the order of the checks. Ends within a few times CHECK_S_MAX, whatever hangs."""
    on = Systems()
    async with AsyncExitStack() as stack:
        first = await asyncio.gather(
            _bounded(Check("nats", (), lambda: on.open_nats(settings, stack)), on),
            _bounded(Check("postgresql", (), lambda: on.open_postgresql(settings, stack)), on),
        )
        schema = await _bounded(Check("schema", ("postgresql",), on.see_schema), on)
        checks = _checks(on, settings, addresses, with_instance=with_instance)
        rest = await asyncio.gather(*(_bounded(check, on) for check in checks))
    return [each for found in (*first, schema, *rest) for each in found]


def _checks(on: Systems, settings: Settings, addresses: Mapping[str, str], *, with_instance: bool) -> list[Check]:
    declared = load(stream_replicas=settings.stream_replicas)
    nats, postgresql, tables, all_of_it = ("nats",), ("postgresql",), ("schema",), ("nats", "schema")
    port, ahead = settings.embedded_nats_monitor_port, settings.partitions_ahead_days
    checks = [
        Check("nats sync", nats, lambda: doctor_nats.persistence(on.nats, port)),
        Check("clock of nats", nats, lambda: doctor_nats.clock(on.nats, TELEMETRY)),
        Check("streams", nats, lambda: doctor_nats.drift(on.nats, declared)),
        Check("fill of the streams", nats, lambda: doctor_nats.fill(on.nats, declared)),
        Check("connections", postgresql, lambda: doctor_postgres.connections(on.pool)),
        Check("partitions", tables, lambda: doctor_postgres.partitions(on.pool, ahead)),
        Check("dead letters", tables, lambda: doctor_postgres.dead_letters(on.pool)),
        Check("audit", all_of_it, lambda: doctor_postgres.audit(on.nats, on.pool)),
        Check("registry", all_of_it, lambda: doctor_postgres.registry(on.nats, on.pool)),
    ]
    if with_instance:
        checks.append(Check("disk", (), partial(doctor_postgres.disk, str(Path(settings.data_dir).absolute()))))
    checks += [Check(f"role {name}", (), partial(role, name, address)) for name, address in addresses.items()]
    return checks


async def _bounded(check: Check, on: Systems) -> list[Finding]:
    """What `check` finds; a failing line where it cannot, and one that says why where it was not tried."""
    away = [need for need in check.needs if need not in on.there]
    if away:
        text = f"needs {' and '.join(away)}, which is not well"
        return [Finding(check=check.name, status=Status.NOT_RUN, text=text)]
    try:
        async with asyncio.timeout(CHECK_S_MAX):
            return await check.run()
    except TimeoutError:
        return [
            finding(check.name, Status.FAILING, f"no answer within {CHECK_S_MAX:g} s", "is it overloaded, or frozen?")
        ]
    except PulseError as error:
        return [finding(check.name, Status.FAILING, error.message, error.hint)]


def _addresses(settings: Settings, roles: Sequence[str], *, with_instance: bool) -> dict[str, str]:
    """Where each role answers for its health, by the name that it is told under."""
    given = [*roles, *settings.role_addresses.split()]
    if given or not with_instance:
        return {address: address for address in given}
    return {name: f"{settings.health_host}:{health_port(settings, name)}" for name in PROCESSES}


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("", "check", "", box=None, pad_edge=False, show_header=False)
    for each in findings:
        advice = f"\n→ {each.advice}" if each.advice else ""
        table.add_row(Text(each.status, style=STYLES[each.status]), each.check, Text(f"{each.text}{advice}"))
    return table
