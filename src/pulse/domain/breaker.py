"""The circuit breaker of one destination, without a clock of its own: a table of what moves it.

                 a failure                     a success          the time is up
    closed       the n-th in a row: open       counts from 0      –
    open         –                             –                  half-open
    half-open    open, for twice as long       closed             a probe that never came back: open again

While it is open nothing is attempted; half-open lets `probes` attempts through at a time. An attempt holds the permit
that let it through: what was begun before the circuit last changed says nothing about it any more.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Circuit(StrEnum):
    """The states; the value stands in metrics."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When it opens, and for how long; `probe_s_max` is longer than any attempt takes."""

    failures_to_open: int = 5
    open_s_min: float = 5.0
    open_s_max: float = 300.0
    probes: int = 1
    probe_s_max: float = 60.0


class Permit(msgspec.Struct, frozen=True):
    """Leave for one attempt, given while the circuit was in its `generation`."""

    generation: int
    probe: bool = False


class Breaker(msgspec.Struct, frozen=True):
    """The state: `until_s` is when open ends, or when probes are given up; `times_opened` in a row doubles the wait."""

    circuit: Circuit = Circuit.CLOSED
    generation: int = 0
    failures: int = 0
    times_opened: int = 0
    until_s: float = 0.0
    probing: int = 0


def admit(breaker: Breaker, *, now_s: float, policy: BreakerPolicy) -> tuple[Breaker, Permit | None]:
    """What the breaker is now, and leave for one attempt, or None; every permit is given back by one of the below."""
    if breaker.circuit is Circuit.CLOSED:
        return breaker, Permit(breaker.generation)
    if now_s >= breaker.until_s:
        if breaker.circuit is Circuit.HALF_OPEN and breaker.probing:
            return _opened(breaker, now_s=now_s, policy=policy), None
        breaker = _moved(breaker, Circuit.HALF_OPEN, until_s=now_s + policy.probe_s_max)
    if breaker.circuit is Circuit.OPEN or breaker.probing >= policy.probes:
        return breaker, None
    until_s = now_s + policy.probe_s_max
    probing = msgspec.structs.replace(breaker, probing=breaker.probing + 1, until_s=until_s)
    return probing, Permit(breaker.generation, probe=True)


def succeeded(breaker: Breaker, permit: Permit) -> Breaker:
    """After an attempt that went well."""
    if permit.generation != breaker.generation:
        return breaker
    if breaker.circuit is Circuit.CLOSED:
        return breaker if not breaker.failures else msgspec.structs.replace(breaker, failures=0)
    return Breaker(generation=breaker.generation + 1)


def failed(breaker: Breaker, permit: Permit, *, now_s: float, policy: BreakerPolicy) -> Breaker:
    """After an attempt that speaks against the destination."""
    if permit.generation != breaker.generation:
        return breaker
    failures = breaker.failures + 1
    if breaker.circuit is Circuit.HALF_OPEN or failures >= policy.failures_to_open:
        return _opened(breaker, now_s=now_s, policy=policy)
    return msgspec.structs.replace(breaker, failures=failures)


def released(breaker: Breaker, permit: Permit) -> Breaker:
    """After an attempt that was never made, or says nothing about the destination: another may take its place."""
    if permit.generation != breaker.generation or not permit.probe or not breaker.probing:
        return breaker
    return msgspec.structs.replace(breaker, probing=breaker.probing - 1)


def open_s(times_opened: int, policy: BreakerPolicy) -> float:
    """How long it stays open the n-th time in a row (from 1)."""
    return min(policy.open_s_max, policy.open_s_min * 2.0 ** min(times_opened - 1, 30))


def _opened(breaker: Breaker, *, now_s: float, policy: BreakerPolicy) -> Breaker:
    times = breaker.times_opened + 1
    return _moved(breaker, Circuit.OPEN, until_s=now_s + open_s(times, policy), times_opened=times)


def _moved(breaker: Breaker, circuit: Circuit, *, until_s: float, times_opened: int | None = None) -> Breaker:
    times = breaker.times_opened if times_opened is None else times_opened
    return Breaker(circuit, breaker.generation + 1, 0, times, until_s)
