"""A tenant's own limits as the columns of `tenants`: four, of which each two are null together."""

from __future__ import annotations

import asyncpg

from pulse.domain.limits import Rate, TenantLimits, check_rate

LIMIT_COLUMNS = "messages_per_s, messages_burst, device_messages_per_s, device_messages_burst"


def limits_of(row: asyncpg.Record) -> TenantLimits:
    """The limits in a row that has LIMIT_COLUMNS."""
    return TenantLimits(
        messages=_rate(row["messages_per_s"], row["messages_burst"]),
        device_messages=_rate(row["device_messages_per_s"], row["device_messages_burst"]),
    )


def limit_values(limits: TenantLimits) -> tuple[float | None, int | None, float | None, int | None]:
    """What LIMIT_COLUMNS hold for `limits`. Raises Refusal INVALID_REQUEST for a rate that is out of bounds."""
    return (*_values(limits.messages, "messages"), *_values(limits.device_messages, "device_messages"))


def _rate(per_s: float | None, burst: int | None) -> Rate | None:
    return None if per_s is None or burst is None else Rate(per_s, burst)


def _values(rate: Rate | None, field: str) -> tuple[float | None, int | None]:
    if rate is None:
        return None, None
    check_rate(rate, field=field)
    return rate.per_s, rate.burst
