"""How much one destination gets at a time, and when the rest comes again."""

from __future__ import annotations

import pytest

from pulse.domain.breaker import BreakerPolicy, Circuit
from pulse.domain.delivery import Attempted, Failure
from pulse.domain.gate import Gate, GatePolicy, Standing

POLICY = GatePolicy(
    concurrency_max=8, horizon_s=10.0, breaker=BreakerPolicy(failures_to_open=3, open_s_min=5.0, open_s_max=5.0)
)
WELL = Attempted(status=200, elapsed_s=0.01)
SLOW = Attempted(status=200, elapsed_s=3.0)
UNWELL = Attempted(failure=Failure.TIMEOUT, elapsed_s=2.0)


def attempt(gate: Gate, attempted: Attempted, now_s: float = 0.0) -> None:
    permit = gate.admit(now_s)
    assert permit is not None
    gate.ended(permit, attempted, now_s)


def test_a_destination_of_which_nothing_is_known_gets_one_attempt_at_a_time() -> None:
    gate = Gate(POLICY)
    assert gate.standing is Standing.NEW
    assert gate.admit(0.0) is not None
    assert gate.admit(0.0) is None


def test_one_that_answers_well_gets_more_and_more_up_to_the_bound() -> None:
    gate = Gate(POLICY)
    limits = []
    for _ in range(5):
        attempt(gate, WELL)
        limits.append(gate.limit)
    assert limits == [2, 4, 8, 8, 8]
    assert gate.standing is Standing.QUICK


def test_one_that_is_slow_gets_no_more_and_is_poor() -> None:
    gate = Gate(POLICY)
    attempt(gate, SLOW)
    assert (gate.limit, gate.standing) == (1, Standing.POOR)


def test_one_failure_takes_all_but_one_away_and_a_success_gives_them_back() -> None:
    gate = Gate(POLICY)
    for _ in range(5):
        attempt(gate, WELL)
    attempt(gate, UNWELL)
    assert (gate.limit, gate.standing) == (1, Standing.POOR)
    assert not gate.may_wait(0, 0.0)
    attempt(gate, WELL)
    assert (gate.limit, gate.standing) == (2, Standing.QUICK)


def test_failures_in_a_row_open_its_circuit_and_what_comes_is_sent_for_when_it_is_tried_again() -> None:
    gate = Gate(POLICY)
    for _ in range(3):
        attempt(gate, UNWELL)
    assert gate.breaker.circuit.value == "open"
    assert gate.admit(1.0) is None
    times = [gate.come_again_s(1.0) for _ in range(4)]
    assert times[0] == 5.0
    assert times == sorted(set(times))
    probe = gate.admit(5.0)
    assert probe is not None
    assert probe.probe
    assert gate.admit(5.0) is None
    gate.ended(probe, WELL, 5.1)
    assert gate.breaker.circuit is Circuit.CLOSED


def test_what_comes_again_is_never_put_off_beyond_the_horizon() -> None:
    gate = Gate(POLICY)
    attempt(gate, SLOW)
    times = [gate.come_again_s(0.0) for _ in range(1000)]
    assert max(times) <= POLICY.pause_s_min + POLICY.horizon_s
    assert min(times) >= POLICY.pause_s_min


@pytest.mark.parametrize(("waiting", "may"), [(0, True), (20, True), (1000, False)])
def test_a_few_may_wait_where_that_is_for_moments(waiting: int, may: bool) -> None:
    gate = Gate(POLICY)
    for _ in range(5):
        attempt(gate, WELL)
    assert gate.may_wait(waiting, 0.0) is may


def test_a_destination_that_says_when_to_come_back_is_left_alone_until_then() -> None:
    gate = Gate(POLICY)
    attempt(gate, Attempted(status=429, retry_after="7", elapsed_s=0.01), 100.0)
    assert gate.breaker.circuit is Circuit.CLOSED
    assert gate.admit(106.9) is None
    assert gate.come_again_s(101.0) == 107.0
    assert gate.admit(107.0) is not None


def test_an_attempt_that_was_never_made_leaves_everything_as_it_was() -> None:
    gate = Gate(POLICY)
    permit = gate.admit(0.0)
    assert permit is not None
    gate.withdrawn(permit)
    assert (gate.running, gate.standing) == (0, Standing.NEW)
    assert gate.is_forgettable
