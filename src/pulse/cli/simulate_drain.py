"""Waiting until nothing is on its way any more, by the word of the audit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec
from rich.progress import Progress, TextColumn

from pulse.cli.context import progress_console
from pulse.domain.audit import StreamAudit
from pulse.domain.errors import Outage
from pulse.wiring.streams import TELEMETRY

POLL_S = 0.25
BUSY_S = 5.0
"""After so long it is also enough that all of ours is stored: others may keep the system from ever being idle."""
STALL_S_MAX = 30.0
"""How long nothing may move, an outage included, before the wait is given up."""
DRAIN_S_MAX = 1800.0


class Auditor(Protocol):
    """What is audited; raises Outage."""

    async def audit(self, stream: str) -> Sequence[StreamAudit]:
        """One equation a making of the stream."""


class AuditTotals(msgspec.Struct, frozen=True, kw_only=True):
    """The equation over all makings of the stream, in messages."""

    accepted: int
    stored: int
    dead: int
    in_flight: int
    expired: int
    balanced: bool

    def since(self, before: AuditTotals) -> AuditTotals:
        """What was added."""
        return AuditTotals(
            accepted=self.accepted - before.accepted,
            stored=self.stored - before.stored,
            dead=self.dead - before.dead,
            in_flight=self.in_flight - before.in_flight,
            expired=self.expired - before.expired,
            balanced=self.balanced,
        )


async def read_totals(auditor: Auditor) -> AuditTotals:
    """The audit as it is now. Raises Outage."""
    audits = await auditor.audit(TELEMETRY)
    return AuditTotals(
        accepted=sum(each.accepted for each in audits),
        stored=sum(each.stored for each in audits),
        dead=sum(each.dead for each in audits),
        in_flight=sum(each.in_flight for each in audits),
        expired=sum(each.expired for each in audits),
        balanced=all(each.balanced for each in audits),
    )


async def nothing_more(_totals: AuditTotals) -> bool:
    """For a protocol whose confirmation says that the message is in the stream."""
    return True


async def drain(
    auditor: Auditor,
    *,
    all_stored: Callable[[], Awaitable[bool]],
    all_arrived: Callable[[AuditTotals], Awaitable[bool]] = nothing_more,
) -> AuditTotals:
    """The audit once nothing is in flight; or once all of ours is stored, or nothing has moved for STALL_S_MAX.

    `all_arrived` says whether what was confirmed has come into the stream, as after a broker's confirmation it need not
    have. An outage is waited out for as long; then it is raised.
    """
    began_at = moved_at = time.monotonic()
    least: int | None = None
    most = -1
    with Progress(
        TextColumn("{task.description}"),
        console=progress_console,
        transient=True,
        disable=not progress_console.is_terminal,
    ) as progress:
        shown = progress.add_task("waiting for the pipeline")
        outage: Outage | None = None
        while True:
            try:
                totals = await read_totals(auditor)
                outage = None
                arrived = await all_arrived(totals)
                if totals.in_flight == 0 and arrived:
                    return totals
                if least is None or totals.in_flight < least or (not arrived and totals.accepted > most):
                    least, most, moved_at = totals.in_flight, totals.accepted, time.monotonic()
                if arrived and time.monotonic() - began_at > BUSY_S and await all_stored():
                    return totals
                progress.update(shown, description=f"waiting for the pipeline: {totals.in_flight:,} in flight")
            except Outage as error:
                if outage is None and not progress_console.is_terminal:
                    progress_console.print(f"waiting for {error.system}: {error.message}", highlight=False)
                outage = error
                progress.update(shown, description=f"waiting for {outage.system}: {outage.message}")
            now = time.monotonic()
            if now - moved_at > STALL_S_MAX or now - began_at > DRAIN_S_MAX:
                if outage is not None:
                    raise outage
                return totals
            await asyncio.sleep(POLL_S)
