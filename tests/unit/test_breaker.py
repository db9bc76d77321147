"""The circuit breaker: opens after failures in a row, lets probes through, and never hangs in a state."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pulse.domain.breaker import Breaker, BreakerPolicy, Circuit, Permit, admit, failed, open_s, released, succeeded

POLICY = BreakerPolicy(failures_to_open=3, open_s_min=5.0, open_s_max=60.0, probes=1, probe_s_max=30.0)


def opened(times: int = 1) -> Breaker:
    breaker = Breaker()
    for _ in range(POLICY.failures_to_open):
        breaker, permit = admit(breaker, now_s=0.0, policy=POLICY)
        assert permit is not None
        breaker = failed(breaker, permit, now_s=0.0, policy=POLICY)
    for _ in range(times - 1):
        breaker, permit = admit(breaker, now_s=breaker.until_s, policy=POLICY)
        assert permit is not None
        breaker = failed(breaker, permit, now_s=breaker.until_s, policy=POLICY)
    assert breaker.circuit is Circuit.OPEN
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_does_not_count() -> None:
    breaker = Breaker()
    for fails in (True, True, False, True, True):
        breaker, permit = admit(breaker, now_s=0.0, policy=POLICY)
        assert permit is not None
        breaker = failed(breaker, permit, now_s=0.0, policy=POLICY) if fails else succeeded(breaker, permit)
    assert breaker.circuit is Circuit.CLOSED
    assert opened().until_s == 5.0


def test_open_admits_nobody_until_its_time_is_up_and_then_one_probe() -> None:
    breaker = opened()
    assert admit(breaker, now_s=4.9, policy=POLICY) == (breaker, None)
    breaker, permit = admit(breaker, now_s=5.0, policy=POLICY)
    assert permit is not None
    assert permit.probe
    assert breaker.circuit is Circuit.HALF_OPEN
    breaker, second = admit(breaker, now_s=5.1, policy=POLICY)
    assert second is None
    assert succeeded(breaker, permit).circuit is Circuit.CLOSED
    assert failed(breaker, permit, now_s=6.0, policy=POLICY).until_s == 6.0 + 10.0


def test_a_probe_that_never_comes_back_opens_it_again() -> None:
    breaker, permit = admit(opened(), now_s=5.0, policy=POLICY)
    assert permit is not None
    breaker, none = admit(breaker, now_s=36.0, policy=POLICY)
    assert none is None
    assert breaker.circuit is Circuit.OPEN
    assert succeeded(breaker, permit) == breaker, "the probe was given up"


def test_a_probe_that_says_nothing_makes_room_for_another() -> None:
    breaker, permit = admit(opened(), now_s=5.0, policy=POLICY)
    assert permit is not None
    breaker, again = admit(released(breaker, permit), now_s=5.0, policy=POLICY)
    assert again is not None


def test_what_was_begun_before_it_opened_says_nothing_any_more() -> None:
    _, old = admit(Breaker(), now_s=0.0, policy=POLICY)
    assert old is not None
    breaker = opened()
    assert succeeded(breaker, old) == breaker
    assert failed(breaker, old, now_s=9.0, policy=POLICY) == breaker


def test_each_time_in_a_row_it_stays_open_for_twice_as_long() -> None:
    assert [open_s(times, POLICY) for times in range(1, 7)] == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    assert open_s(10**9, POLICY) == 60.0
    assert opened(3).times_opened == 3


class Machine(RuleBasedStateMachine):
    """Any order of events: at most `probes` probes, and after long enough somebody is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker()
        self.now_s = 0.0
        self.permits: list[Permit] = []

    @rule()
    def asks(self) -> None:
        self.breaker, permit = admit(self.breaker, now_s=self.now_s, policy=POLICY)
        if permit is not None:
            self.permits.append(permit)

    @rule(seconds=st.floats(0, 100))
    def waits(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(what=st.sampled_from(["good", "bad", "nothing", "lost"]), which=st.integers(0, 5))
    def ends(self, what: str, which: int) -> None:
        if not self.permits:
            return
        permit = self.permits.pop(which % len(self.permits))
        if what == "good":
            self.breaker = succeeded(self.breaker, permit)
        elif what == "bad":
            self.breaker = failed(self.breaker, permit, now_s=self.now_s, policy=POLICY)
        elif what == "nothing":
            self.breaker = released(self.breaker, permit)

    @invariant()
    def no_more_probes_than_allowed(self) -> None:
        current = [each for each in self.permits if each.probe and each.generation == self.breaker.generation]
        assert len(current) <= self.breaker.probing <= POLICY.probes

    @invariant()
    def somebody_gets_through_in_the_end(self) -> None:
        breaker, now_s = self.breaker, self.now_s
        for _ in range(3):
            breaker, permit = admit(breaker, now_s=now_s, policy=POLICY)
            if permit is not None:
                return
            now_s += POLICY.open_s_max + POLICY.probe_s_max
        raise AssertionError("nobody was let through")


TestBreaker = Machine.TestCase


@given(st.integers(1, 10_000))
def test_the_wait_never_ends_the_bound(times: int) -> None:
    assert POLICY.open_s_min <= open_s(times, POLICY) <= POLICY.open_s_max
