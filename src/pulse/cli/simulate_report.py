"""The truth table of a simulated run, and what is wrong with it."""

from __future__ import annotations

import msgspec
from rich.table import Table

from pulse.cli.simulate_drain import AuditTotals
from pulse.domain.tally import Latencies, Outcome, Storage, Tally

CONFIRMED_BY = {"http": "answered 202", "mqtt": "confirmed with a PUBACK"}


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """In milliseconds, of `count` messages."""

    count: int
    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, latencies: Latencies) -> Latency:
        """Rounded to 10 µs."""
        p50_s, p99_s = latencies.quantile_s(0.5), latencies.quantile_s(0.99)
        return cls(
            count=latencies.count,
            p50_ms=round(p50_s * 1000, 2),
            p99_ms=round(p99_s * 1000, 2),
            max_ms=round(latencies.max_s * 1000, 2),
        )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints; all but latencies and seconds in messages. `ok` is the verdict, `fault` why it is not.

    `planned` = `sent` + `never_sent`; `sent` = `accepted` + `heartbeats` + `refused` + `unconfirmed`. `audit` is what
    was added to the audit's equation during the run, by this run and by everybody else.
    """

    ok: bool
    fault: str
    protocol: str
    tenant_id: str
    devices: int
    interrupted: bool
    duration_s: float
    planned: int
    sent: int
    never_sent: int
    late: int
    sent_twice: int
    retried: int
    answers: dict[str, int]
    accepted: int
    heartbeats: int
    refused: int
    unconfirmed: int
    recognised_as_duplicate: int
    storage: Storage
    dead_letters: int
    latency: Latency
    stored_after: Latency
    audit: AuditTotals


def report_of(
    tally: Tally,
    *,
    protocol: str,
    tenant_id: str,
    interrupted: bool,
    duration_s: float,
    storage: Storage,
    dead_letters: int,
    stored_after: Latencies,
    audit: AuditTotals,
) -> Report:
    """Put the run together and judge it."""
    fault = fault_of(tally, storage, audit)
    by_outcome = tally.by_outcome
    return Report(
        ok=not fault,
        fault=fault,
        protocol=protocol,
        tenant_id=tenant_id,
        devices=tally.devices,
        interrupted=interrupted,
        duration_s=round(duration_s, 3),
        planned=tally.count,
        sent=tally.sent,
        never_sent=tally.count - tally.sent,
        late=tally.late,
        sent_twice=tally.sent_twice,
        retried=tally.retried,
        answers=dict(sorted(tally.answers.items())),
        accepted=by_outcome[Outcome.ACCEPTED],
        heartbeats=by_outcome[Outcome.HEARTBEAT],
        refused=by_outcome[Outcome.REFUSED],
        unconfirmed=by_outcome[Outcome.UNCONFIRMED],
        recognised_as_duplicate=tally.recognised,
        storage=storage,
        dead_letters=dead_letters,
        latency=Latency.of(tally.latencies),
        stored_after=Latency.of(stored_after),
        audit=audit,
    )


def fault_of(tally: Tally, storage: Storage, audit: AuditTotals) -> str:
    """What is wrong, in one line; empty where every accepted message is stored once and the audit agrees."""
    answered = tally.by_outcome[Outcome.ACCEPTED] + tally.by_outcome[Outcome.HEARTBEAT]
    if storage.missing:
        return f"{storage.missing:,} accepted messages are not stored"
    if storage.duplicates:
        return f"{storage.duplicates:,} messages are stored more than once"
    if storage.unexpected > tally.by_outcome[Outcome.UNCONFIRMED]:
        return "messages are stored that were refused"
    if not audit.balanced:
        return "the audit disagrees: the ledger settles messages that the stream never accepted"
    if audit.expired > 0:
        return f"the audit disagrees: {audit.expired:,} messages expired unprocessed"
    if audit.accepted < answered:
        return f"the audit disagrees: the stream accepted {audit.accepted:,} messages, the sender was told {answered:,}"
    if tally.sent and not answered:
        return "nothing was accepted"
    return ""


def table_of(report: Report) -> Table:
    """The report for people."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    storage, audit = report.storage, report.audit
    rate = report.sent / report.duration_s if report.duration_s else 0.0
    _row(table, "sent", report.sent, f"by {report.devices:,} devices in {report.duration_s:.1f} s, {rate:,.0f}/s")
    if report.never_sent:
        why = "it was stopped" if report.interrupted else "as many were under way as may be, until the time was up"
        _row(table, "  never sent", report.never_sent, why)
    _row(table, "  late", report.late, "sent more than 0.1 s behind its time")
    _row(table, "  sent twice", report.sent_twice, "on purpose, under the same key")
    _row(table, "  retried", report.retried, "tries after the first")
    _row(table, "accepted", report.accepted, CONFIRMED_BY[report.protocol])
    _row(table, "  heartbeats", report.heartbeats, "the same; they make no row")
    _row(table, "  recognised", report.recognised_as_duplicate, "202s that name the message accepted before")
    _row(table, "refused", report.refused, "for good")
    _row(table, "unconfirmed", report.unconfirmed, "no final answer; may be stored or not")
    answers = "   ".join(f"{status}: {count:,}" for status, count in report.answers.items())
    table.add_row("answers", "", answers)
    table.add_row()
    _row(table, "stored", storage.stored, "rows in PostgreSQL of this run, each message once")
    _row(table, "  missing", storage.missing, "accepted, and not stored", bad=True)
    _row(table, "  duplicates", storage.duplicates, "stored more than once", bad=True)
    if storage.unexpected:
        _row(table, "  unconfirmed", storage.unexpected, "stored, though the sender never heard of it")
    if report.dead_letters:
        _row(table, "dead letters", report.dead_letters, "of this tenant since the run began")
    table.add_row()
    table.add_row("latency", "", _latency(report.latency) + "   from its time to its confirmation")
    table.add_row("to the row", "", _latency(report.stored_after) + f"   of {report.stored_after.count:,} watched")
    table.add_row(
        "audit",
        "",
        f"+{audit.accepted:,} accepted = +{audit.stored:,} stored + {audit.dead:,} dead"
        f" + {audit.in_flight:,} in flight + {audit.expired:,} expired",
    )
    table.add_row()
    equal = "=" if storage.missing == 0 else "≠"
    matched = storage.stored - storage.unexpected
    verdict = f"accepted {storage.accepted:,} {equal} stored {matched:,}, duplicates {storage.duplicates:,}"
    if report.never_sent and not report.interrupted:
        verdict += f"; {report.never_sent:,} never sent: this machine did not keep up with the rate"
    table.add_row("verdict", "", verdict, style="bold green" if report.ok else "bold red")
    return table


def _row(table: Table, name: str, count: int, why: str, *, bad: bool = False) -> None:
    style = "bold red" if bad and count else ""
    if count or not name.startswith("  ") or bad:
        table.add_row(name, f"{count:,}", f"[dim]{why}[/dim]", style=style)


def _latency(latency: Latency) -> str:
    if not latency.count:
        return "none"
    return f"p50 {latency.p50_ms:,.1f} ms   p99 {latency.p99_ms:,.1f} ms   max {latency.max_ms:,.1f} ms"
