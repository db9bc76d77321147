"""Token buckets: never more than promised, never less than promised, nobody at another's expense, bounded memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.limits import NS_PER_S, Rate, RateLimits, TenantLimits, check_rate

NO_LIMIT = Rate(0, 1)
START_NS = 10**15

rates = st.builds(Rate, st.sampled_from([0.1, 1.0, 3.0, 7.5, 200.0, 20_000.0]), st.integers(1, 50))
gaps_ns = st.lists(st.integers(0, 2 * NS_PER_S) | st.integers(0, 10**6), max_size=200)


def admitted(limits: RateLimits, now_ns: int, tenant_id: str = "acme", device_id: str = "d") -> bool:
    try:
        limits.admit(tenant_id, device_id, now_ns)
    except LimitExceeded:
        return False
    return True


@given(rates, gaps_ns)
def test_no_interval_sees_more_than_the_burst_and_the_rate_times_its_length(rate: Rate, gaps: list[int]) -> None:
    limits = RateLimits(device=rate, tenant=NO_LIMIT)
    now, times = START_NS, []
    for gap in gaps:
        now += gap
        if admitted(limits, now):
            times.append(now)
    for first in range(len(times)):
        for last in range(first, len(times)):
            seconds = (times[last] - times[first]) / NS_PER_S
            assert last - first + 1 <= rate.burst + rate.per_s * seconds + 1e-6


@given(rates, gaps_ns)
def test_a_message_is_refused_only_where_the_bucket_is_empty(rate: Rate, gaps: list[int]) -> None:
    """Against the plain description of a token bucket, with a token's rounding to whole ns as the slack."""
    limits = RateLimits(device=rate, tenant=NO_LIMIT)
    now, tokens = START_NS, float(rate.burst)
    for gap in gaps:
        now += gap
        tokens = min(rate.burst, tokens + gap * rate.per_s / NS_PER_S)
        if admitted(limits, now):
            tokens -= 1
        else:
            assert tokens < 1 + 1e-3


@given(rates)
def test_who_waits_as_long_as_told_is_admitted_and_no_sooner(rate: Rate) -> None:
    limits = RateLimits(device=rate, tenant=NO_LIMIT)
    while admitted(limits, START_NS):
        pass
    with pytest.raises(LimitExceeded) as refused:
        limits.admit("acme", "d", START_NS)
    assert refused.value.retry_after_s is not None
    wait_ns = math.ceil(refused.value.retry_after_s * NS_PER_S)
    assert not admitted(limits, START_NS + wait_ns - 1000)
    assert admitted(limits, START_NS + wait_ns + 1)


def test_the_refusal_names_the_limit_and_its_value() -> None:
    limits = RateLimits(device=Rate(2, 1), tenant=Rate(3, 2))
    limits.admit("acme", "a", START_NS)
    with pytest.raises(LimitExceeded) as refused:
        limits.admit("acme", "a", START_NS)
    assert (refused.value.reason, refused.value.limit, refused.value.value, refused.value.retry_after_s) == (
        Reason.RATE_LIMITED, "device_messages_per_s", 2, 0.5,
    )  # fmt: skip
    limits.admit("acme", "b", START_NS)
    with pytest.raises(LimitExceeded) as refused:
        limits.admit("acme", "c", START_NS)
    assert (refused.value.limit, refused.value.value) == ("tenant_messages_per_s", 3)


def test_a_device_beyond_its_rate_takes_nothing_from_its_neighbours() -> None:
    """At 100 times its rate it gets its own share; the tenant's bucket is left to the others."""
    limits = RateLimits(device=Rate(10, 10), tenant=Rate(40, 40))
    loud = quiet = 0
    for tick in range(10_000):
        now = START_NS + tick * NS_PER_S // 1000
        loud += admitted(limits, now, device_id="loud")
        if tick % 100 == 0:
            quiet += sum(admitted(limits, now, device_id=f"quiet-{number}") for number in range(3))
    assert quiet == 300
    assert 100 <= loud <= 110


def test_a_tenant_beyond_its_rate_takes_nothing_from_another() -> None:
    limits = RateLimits(device=NO_LIMIT, tenant=Rate(100, 10))
    loud = quiet = 0
    for tick in range(1000):
        now = START_NS + tick * NS_PER_S // 1000
        loud += admitted(limits, now, "loud", f"d{tick}")
        quiet += tick % 20 == 0 and admitted(limits, now, "quiet")
    assert quiet == 50
    assert 100 <= loud <= 110


def test_a_message_that_its_tenant_refuses_costs_its_device_nothing() -> None:
    limits = RateLimits(device=Rate(1, 1), tenant=Rate(1, 1))
    limits.admit("acme", "a", START_NS)
    assert not admitted(limits, START_NS, device_id="b")
    assert admitted(limits, START_NS + NS_PER_S, device_id="b")


def test_who_was_away_for_long_has_saved_up_no_more_than_a_burst() -> None:
    limits = RateLimits(device=NO_LIMIT, tenant=Rate(1000, 2))
    limits.admit("acme", "d", START_NS)
    later = START_NS + 60 * NS_PER_S
    assert [admitted(limits, later) for _ in range(4)] == [True, True, False, False]


def test_a_rate_of_zero_is_no_limit() -> None:
    limits = RateLimits(device=NO_LIMIT, tenant=NO_LIMIT)
    assert all(admitted(limits, START_NS) for _ in range(10_000))
    assert limits.buckets == 0


def test_a_tenant_may_have_a_rate_of_its_own() -> None:
    own = {"big": TenantLimits(messages=Rate(1, 5)), "free": TenantLimits(messages=Rate(0, 1))}
    limits = RateLimits(device=NO_LIMIT, tenant=Rate(1, 1), of_tenant=own.get)
    counts = {tenant: sum(admitted(limits, START_NS, tenant) for _ in range(20)) for tenant in ("small", "big", "free")}
    assert counts == {"small": 1, "big": 5, "free": 20}


def test_buckets_that_are_full_again_are_forgotten() -> None:
    """Ten thousand devices a second, each of which is full again after 2 s: never more than 2 × 2 s of them."""
    limits = RateLimits(device=Rate(1, 2), tenant=NO_LIMIT)
    most = 0
    for number in range(100_000):
        limits.admit("acme", f"d{number}", START_NS + number * NS_PER_S // 10_000)
        most = max(most, limits.buckets)
    assert most <= 40_001
    limits.admit("acme", "last", START_NS + 60 * NS_PER_S)
    assert limits.buckets == 1


@given(st.integers(2, 20), st.integers(0, 3))
def test_forgetting_never_gives_a_sender_more(burst: int, others: int) -> None:
    """The generations turn over while one sender keeps at its bucket."""
    rate = Rate(10, burst)
    limits = RateLimits(device=rate, tenant=NO_LIMIT)
    count = 0
    for tick in range(20 * burst):
        now = START_NS + tick * NS_PER_S // 20
        count += admitted(limits, now)
        for number in range(others):
            admitted(limits, now, device_id=f"{tick}-{number}")
    assert count <= burst + 10 * burst


def test_a_change_of_a_tenants_limits_holds_from_the_next_message_on() -> None:
    """From a bucket that an hour would fill to a quick one, to another, and back to the settings."""
    own: dict[str, TenantLimits] = {}
    limits = RateLimits(device=NO_LIMIT, tenant=Rate(1, 2), of_tenant=own.get)

    def admitted_of(count: int, now: int) -> int:
        return sum(admitted(limits, now) for _ in range(count))

    assert admitted_of(10, START_NS) == 2
    own["acme"] = TenantLimits(messages=Rate(0.001, 4))
    assert admitted_of(10, START_NS) == 4
    own["acme"] = TenantLimits(messages=Rate(1000, 1))
    assert admitted_of(10, START_NS) == 1
    assert admitted_of(10, START_NS + NS_PER_S // 1000) == 1
    own["acme"] = TenantLimits(messages=Rate(1000, 1))
    assert admitted_of(10, START_NS + NS_PER_S // 1000) == 0
    del own["acme"]
    assert admitted_of(10, START_NS + NS_PER_S) == 1


def test_the_buckets_of_limits_that_were_taken_away_are_forgotten_though_their_tenant_is_silent() -> None:
    """Two thousand tenants, 256 of which are looked at each second; their buckets would be full in an hour."""
    own = {f"t{number}": TenantLimits(messages=Rate(1, 3600)) for number in range(2000)}
    limits = RateLimits(device=NO_LIMIT, tenant=NO_LIMIT, of_tenant=own.get)
    for tenant in own:
        limits.admit(tenant, "d", START_NS)
    assert limits.buckets == 2000
    own.clear()
    for second in range(1, 12):
        limits.admit("other", "d", START_NS + second * NS_PER_S)
    assert limits.buckets == 0


def test_the_buckets_of_a_silent_tenant_with_limits_of_its_own_are_forgotten_once_they_are_full() -> None:
    own = {"quick": TenantLimits(messages=Rate(1, 5)), "slow": TenantLimits(messages=Rate(1, 3600))}
    limits = RateLimits(device=NO_LIMIT, tenant=NO_LIMIT, of_tenant=own.get)
    for tenant in own:
        limits.admit(tenant, "d", START_NS)
    assert limits.buckets == 2
    for second in range(1, 10):
        limits.admit("other", "d", START_NS + second * NS_PER_S)
    assert limits.buckets == 1


@given(st.integers(2, 20), st.integers(1, 40))
def test_forgetting_never_gives_a_tenant_with_limits_of_its_own_more(burst: int, silence_s: int) -> None:
    """It is silent for a while, in which others send, and comes back."""
    own = {"acme": TenantLimits(messages=Rate(1, burst))}
    limits = RateLimits(device=NO_LIMIT, tenant=Rate(1, 100), of_tenant=own.get)
    assert sum(admitted(limits, START_NS) for _ in range(100)) == burst
    for second in range(1, silence_s + 1):
        limits.admit("other", "d", START_NS + second * NS_PER_S)
    assert sum(admitted(limits, START_NS + silence_s * NS_PER_S) for _ in range(100)) == min(burst, silence_s)


def test_a_tenant_may_have_a_rate_of_its_own_for_each_device() -> None:
    own = {"acme": TenantLimits(device_messages=Rate(1, 3))}
    limits = RateLimits(device=Rate(1, 1), tenant=Rate(1, 5), of_tenant=own.get)
    counts = [sum(admitted(limits, START_NS, device_id=device) for _ in range(10)) for device in ("a", "b")]
    assert counts == [3, 2]
    assert sum(admitted(limits, START_NS, "other") for _ in range(10)) == 1


@pytest.mark.parametrize("rate", [Rate(0, 1), Rate(0.001, 1), Rate(1_000_000, 1_000_000_000)])
def test_a_rate_within_bounds_is_taken(rate: Rate) -> None:
    assert check_rate(rate, field="messages") is rate


@pytest.mark.parametrize(
    ("rate", "field"),
    [
        (Rate(-1, 1), "messages.per_s"),
        (Rate(1e-9, 1), "messages.per_s"),
        (Rate(1e9, 1), "messages.per_s"),
        (Rate(math.nan, 1), "messages.per_s"),
        (Rate(1, 0), "messages.burst"),
        (Rate(1, 2**31), "messages.burst"),
    ],
)
def test_a_rate_out_of_bounds_is_refused_with_its_field(rate: Rate, field: str) -> None:
    with pytest.raises(Refusal) as refused:
        check_rate(rate, field="messages")
    assert refused.value.field == field
