"""How much one destination gets at a time, and when the rest is to come again; no clock of its own.

    an attempt ends            attempts at a time
    well, and quickly          twice as many, up to `concurrency_max`
    well, and slowly           as many
    it speaks against it       one

A destination is `new` until an attempt has ended, `poor` while the last one failed or they take long, else `quick`.
What cannot begin at once waits here as long as that is for moments (`wait_s_max`), by how long attempts take. The rest
is to come again later, spaced as the destination takes it, so that what has gathered for a slow one, or for one whose
circuit is open, neither waits in memory nor comes back all at once.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from pulse.domain.breaker import Breaker, BreakerPolicy, Circuit, Permit, admit, failed, released, succeeded
from pulse.domain.delivery import Attempted, is_unwell, retry_after_s


class GatePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of one destination; `horizon_s` is how far ahead what comes again is spread."""

    concurrency_max: int = 16
    wait_s_max: float = 0.25
    quick_s: float = 1.0
    new_s: float = 0.1
    spacing_s_min: float = 0.002
    pause_s_min: float = 0.25
    horizon_s: float = 300.0
    breaker: BreakerPolicy = BreakerPolicy()


class Standing(StrEnum):
    """What is known of a destination."""

    NEW = "new"
    QUICK = "quick"
    POOR = "poor"


class Gate:
    """One destination; whoever is admitted tells with `ended` or `withdrawn` that it is over."""

    __slots__ = ("_attempt_s", "_held_until_s", "_is_failing", "_next_s", "_policy", "breaker", "limit", "running")

    def __init__(self, policy: GatePolicy) -> None:
        self._policy = policy
        self.breaker = Breaker()
        self.limit = 1
        self.running = 0
        self._attempt_s: float | None = None
        self._is_failing = False
        self._held_until_s = 0.0
        self._next_s = 0.0

    @property
    def standing(self) -> Standing:
        """What is known of it."""
        if self._attempt_s is None:
            return Standing.NEW
        return Standing.POOR if self._is_failing or self._attempt_s > self._policy.quick_s else Standing.QUICK

    @property
    def is_forgettable(self) -> bool:
        """Whether one that is made anew would do as well."""
        return not self.running and self.breaker.circuit is Circuit.CLOSED and not self._is_failing

    def admit(self, now_s: float) -> Permit | None:
        """Leave for one attempt now, or None."""
        if self.running >= self.limit or now_s < self._held_until_s:
            return None
        self.breaker, permit = admit(self.breaker, now_s=now_s, policy=self._policy.breaker)
        if permit is not None:
            self.running += 1
        return permit

    def may_wait(self, waiting: int, now_s: float) -> bool:
        """Whether one more may wait for its turn behind `waiting` others: it would be for moments."""
        if self.breaker.circuit is not Circuit.CLOSED or now_s < self._held_until_s or self._is_failing:
            return False
        return (waiting + 1) * self._spacing_s <= self._policy.wait_s_max

    def come_again_s(self, now_s: float) -> float:
        """When one that was not admitted, and may not wait, is to come again."""
        earliest_s = max(now_s + self._policy.pause_s_min, self._held_until_s)
        if self.breaker.circuit is Circuit.OPEN:
            earliest_s = max(earliest_s, self.breaker.until_s)
        at_s = max(earliest_s, self._next_s)
        if at_s > earliest_s + self._policy.horizon_s:
            at_s = earliest_s
        self._next_s = at_s + max(self._policy.spacing_s_min, self._spacing_s)
        return at_s

    def ended(self, permit: Permit, attempted: Attempted, now_s: float) -> None:
        """An attempt is over, and what came of it."""
        self.running -= 1
        before_s, policy = self._attempt_s, self._policy
        self._attempt_s = attempted.elapsed_s if before_s is None else 0.8 * before_s + 0.2 * attempted.elapsed_s
        if is_unwell(attempted):
            self.breaker = failed(self.breaker, permit, now_s=now_s, policy=policy.breaker)
            self._is_failing, self.limit = True, 1
        else:
            was_open = self.breaker.circuit is not Circuit.CLOSED
            self.breaker = succeeded(self.breaker, permit)
            self._is_failing = False
            if attempted.elapsed_s <= policy.quick_s:
                self.limit = min(policy.concurrency_max, self.limit * 2)
            if was_open and self.breaker.circuit is Circuit.CLOSED:
                self._next_s = 0.0
        if attempted.retry_after and not 200 <= (attempted.status or 0) <= 299:
            asked_s = min(retry_after_s(attempted.retry_after, now_s=now_s), policy.horizon_s)
            self._held_until_s = max(self._held_until_s, now_s + asked_s)

    def withdrawn(self, permit: Permit) -> None:
        """An attempt was never made, or says nothing about the destination."""
        self.running -= 1
        self.breaker = released(self.breaker, permit)

    @property
    def _spacing_s(self) -> float:
        """How long until the next one ends, by and large."""
        attempt_s = self._policy.new_s if self._attempt_s is None else self._attempt_s
        return attempt_s / self.limit
