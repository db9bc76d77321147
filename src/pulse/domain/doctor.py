"""What `pulse doctor` says: a finding a line, and how numbers are judged. Pure.

ok         nothing to do
warning    it works, and will not for long, or not as it should
failing    it does not work, or messages were lost
not run    what it needs is away, which is a failing finding of its own
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec


class Status(StrEnum):
    """How one thing stands."""

    OK = "ok"
    WARNING = "warning"
    FAILING = "failing"
    NOT_RUN = "not run"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line: what was looked at, how it stands, and what to do where it is not ok."""

    check: str
    status: Status
    text: str
    advice: str = ""


def finding(check: str, status: Status, text: str, advice: str = "") -> Finding:
    """A finding; `advice` is dropped where nothing is wrong."""
    return Finding(check=check, status=status, text=text, advice="" if status is Status.OK else advice)


def graded(value: float, *, warning_at: float, failing_at: float) -> Status:
    """The status of a value that is worse the larger it is."""
    if value >= failing_at:
        return Status.FAILING
    return Status.WARNING if value >= warning_at else Status.OK


def is_well(findings: Iterable[Finding]) -> bool:
    """Whether nothing fails."""
    return all(each.status is not Status.FAILING for each in findings)


CLOCK_WARNING_S, CLOCK_FAILING_S = 2.0, 60.0
"""Timestamps from the future are refused beyond an hour, tokens end, and people compare logs."""


def judge_clock(check: str, offset_s: float) -> Finding:
    """How far the clock of a system is ahead of ours."""
    status = graded(abs(offset_s), warning_at=CLOCK_WARNING_S, failing_at=CLOCK_FAILING_S)
    text = f"{abs(offset_s) * 1000:.0f} ms {'ahead of' if offset_s >= 0 else 'behind'} this machine"
    return finding(check, status, text, "let both follow the same time servers (NTP)")


CONNECTIONS_WARNING_SHARE = 0.8


def judge_connections(*, used: int, usable: int, what: str) -> Finding:
    """Connections in use of those that PostgreSQL lets a role without privileges have."""
    status = graded(used / max(1, usable), warning_at=CONNECTIONS_WARNING_SHARE, failing_at=1.0)
    return finding(
        "connections",
        status,
        f"{used} of {usable} in use ({what})",
        "raise max_connections or the role's CONNECTION LIMIT, or put PgBouncer in between",
    )


DISK_WARNING_SHARE, DISK_FAILING_SHARE = 0.85, 0.97


def judge_disk(*, used_share: float, free_text: str, where: str) -> Finding:
    """How full a file system is."""
    status = graded(used_share, warning_at=DISK_WARNING_SHARE, failing_at=DISK_FAILING_SHARE)
    text = f"{free_text} free in {where}, {used_share:.0%} used"
    return finding("disk", status, text, "free some: full, it stops PostgreSQL and JetStream alike")


def judge_partitions(*, ahead: int, wanted: int) -> Finding:
    """Day partitions of telemetry that are there beyond today, without a gap."""
    status = Status.FAILING if ahead < 0 else Status.WARNING if ahead < wanted else Status.OK
    text = "there is none for today" if ahead < 0 else f"{ahead} days ahead of today, {wanted} wanted"
    return finding("partitions", status, text, "is `maintenance` running? it makes them; workers make what is missing")


def judge_dead_letters(waiting: dict[str, int]) -> Finding:
    """Dead letters by reason that nobody has replayed."""
    if not waiting:
        return finding("dead letters", Status.OK, "none waits")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(waiting.items()))
    advice = "`pulse dead-letters list` and `show` say why; mend them, `replay` them, or `purge` them"
    return finding("dead letters", Status.WARNING, f"{sum(waiting.values()):,} wait: {reasons}", advice)


STAY_WARNING_S = 900.0


def stay_s(
    *, age_s_max: float | None, bytes_left_at: tuple[float, int] | None, messages_left_at: tuple[float, int] | None
) -> float | None:
    """How long a message stays in a stream that lets go of the oldest; None where nothing ever removes it.

    `bytes_left_at` and `messages_left_at` are (what comes in a second, limit).
    """
    bounds = [limit / rate for rate, limit in filter(None, (bytes_left_at, messages_left_at)) if rate > 0]
    if age_s_max is not None:
        bounds.append(age_s_max)
    return min(bounds, default=None)


def full_in_s(*, used: int, limit: int | None, growth_per_s: float) -> float | None:
    """When a stream that refuses what does not fit is full at its present growth; None where never."""
    return None if limit is None or growth_per_s <= 0 else max(0, limit - used) / growth_per_s
