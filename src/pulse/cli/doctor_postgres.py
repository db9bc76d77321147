"""What `pulse doctor` looks at in PostgreSQL, and where the two systems have to agree."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import aclosing

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.dead_letters import DeadLetterStore
from pulse.adapters.postgres.doctor import DatabaseFacts
from pulse.adapters.postgres.pool import Pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.cli.streams_status import bytes_text
from pulse.domain.doctor import (
    Finding,
    Status,
    finding,
    judge_clock,
    judge_connections,
    judge_dead_letters,
    judge_disk,
    judge_partitions,
)
from pulse.domain.registry import Record, record_key, same_admission
from pulse.wiring.cli import auditor_on
from pulse.wiring.streams import WORKERS

VERSION_MIN = 150_000
REGISTRY_S_MAX = 3.0
PAGE_RECORDS = 1000


async def server(pool: Pool) -> list[Finding]:
    """Whether it answers, takes writes, is new enough; which tier it is, and its clock."""
    found = await DatabaseFacts(pool).server()
    tier = "no tables yet" if found.tier is None else f"tier {found.tier}"
    text = f"PostgreSQL {found.version}, {tier}, {bytes_text(found.bytes)}, answers in {found.round_trip_s:.4f} s"
    advice = ""
    if found.standby or found.read_only:
        why = "a standby" if found.standby else "default_transaction_read_only is on"
        text, advice = f"{text}: read-only ({why})", "nothing is stored until it takes writes, or DATABASE_URL leads on"
    elif found.number < VERSION_MIN:
        advice = f"upgrade it: {VERSION_MIN // 10_000} or newer is needed"
    status = Status.FAILING if advice else Status.OK
    return [finding("postgresql", status, text, advice), judge_clock("clock of postgresql", found.clock_offset_s)]


async def schema(pool: Pool) -> list[Finding]:
    """Whether all migrations are applied."""
    left = await DatabaseFacts(pool).migrations_left()
    if left:
        return [finding("schema", Status.FAILING, f"not applied: {', '.join(left)}", "`pulse migrate`")]
    return [finding("schema", Status.OK, "up to date")]


async def connections(pool: Pool) -> list[Finding]:
    """How many connections are left, of the server's and of the role's."""
    found = await DatabaseFacts(pool).connections()
    findings = [judge_connections(used=found.used, usable=found.usable, what="max_connections")]
    if found.role_limit >= 0:
        findings.append(judge_connections(used=found.used_by_role, usable=found.role_limit, what="of this role"))
    return findings


async def partitions(pool: Pool, wanted: int) -> list[Finding]:
    """Whether tomorrow has a place."""
    ahead = await DatabaseFacts(pool).partitions_ahead()
    if ahead is None:
        return [finding("partitions", Status.OK, "TimescaleDB makes them")]
    return [judge_partitions(ahead=ahead, wanted=wanted)]


async def dead_letters(pool: Pool) -> list[Finding]:
    """What could not be processed, and waits for somebody."""
    counts = await DeadLetterStore(pool).count_by_reason()
    return [judge_dead_letters({reason: count for (reason, replayed), count in counts.items() if not replayed})]


async def audit(client: PulseClient, pool: Pool) -> list[Finding]:
    """The audit's equation, and whether anything expired unprocessed."""
    findings = []
    auditor = auditor_on(client, pool)
    for each in [each for stream in WORKERS for each in await auditor.audit(stream)]:
        text = (
            f"{each.stream} epoch {each.epoch}: {each.accepted:,} accepted = {each.stored:,} stored"
            f" + {each.dead:,} dead + {each.in_flight:,} in flight + {each.expired:,} expired"
        )
        if not each.balanced:
            advice = (
                "the ledger settles what the stream never accepted: was a backup restored, or another NATS connected?"
            )
        else:
            advice = "these are gone: the workers were away for longer than the stream's limits keep a message"
        well = each.balanced and not each.expired
        findings.append(finding("audit", Status.OK if well else Status.FAILING, text, advice))
    return findings


async def registry(client: PulseClient, pool: Pool) -> list[Finding]:
    """Whether the edge knows what PostgreSQL says, of as much as can be compared in a moment."""
    truth, bucket = RegistryTruth(pool), RegistryBucket(client)
    deadline = time.monotonic() + REGISTRY_S_MAX
    compared, different, complete = 0, 0, True
    async with aclosing(truth.pages(PAGE_RECORDS)) as pages:
        async for page in pages:
            wanted = {record_key(record): record for record in page}
            found = await bucket.read(list(wanted))
            suspects = [key for key, record in wanted.items() if not _same(record, found.get(key))]
            if suspects:
                # What changes at this moment is on its way: look once more, at both.
                again, found = await truth.load(suspects), await bucket.read(suspects)
                different += sum(not _same(again.get(key), found.get(key)) for key in suspects)
            compared += len(page)
            if time.monotonic() > deadline:
                complete = False
                break
    text = f"{compared:,} tenants, devices and routes compared{'' if complete else ' (not all)'}, {different:,} differ"
    advice = (
        "devices may be refused, or let in, wrongly: `maintenance` mends it within reconcile_interval_s; does it run?"
    )
    return [finding("registry", Status.FAILING if different else Status.OK, text, advice)]


async def disk(data_dir: str) -> list[Finding]:
    """The file system of `data_dir`, where `pulse up` keeps everything on this machine."""
    usage = await asyncio.to_thread(shutil.disk_usage, data_dir)
    return [judge_disk(used_share=1 - usage.free / usage.total, free_text=bytes_text(usage.free), where=data_dir)]


def _same(left: Record | None, right: Record | None) -> bool:
    return same_admission(left, right, time.time_ns() // 1_000_000)
