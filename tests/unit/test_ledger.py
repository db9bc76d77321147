"""Positions and sets of them, against Python's own sets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.ledger import EPOCH_MAX, SEQUENCE_MAX, PositionSet, position, sequence_of

members = st.sets(st.integers(min_value=0, max_value=60))


@given(members, members)
def test_algebra_is_that_of_sets(left: set[int], right: set[int]) -> None:
    a, b = PositionSet.of(left), PositionSet.of(right)
    assert a | b == PositionSet.of(left | right)
    assert a & b == PositionSet.of(left & right)
    assert a - b == PositionSet.of(left - right)
    assert len(a) == len(left)
    assert bool(a) == bool(left)
    assert [at for at in range(62) if at in a] == sorted(left)


@given(members)
def test_text_form_reads_back(some: set[int]) -> None:
    as_set = PositionSet.of(some)
    assert PositionSet.parse(str(as_set)) == as_set


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60))))
def test_ranges_are_sorted_disjoint_and_never_adjacent(ranges: list[tuple[int, int]]) -> None:
    result = PositionSet(ranges).ranges
    assert all(low < high for low, high in result)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(result))


def test_text_form_is_that_of_postgresql() -> None:
    assert str(PositionSet.of([1, 2, 3, 7])) == "{[1,4),[7,8)}"
    assert str(PositionSet()) == "{}"
    assert PositionSet.parse("{}") == PositionSet()


@given(st.integers(1, EPOCH_MAX), st.integers(1, SEQUENCE_MAX))
def test_a_position_fits_a_bigint_and_keeps_its_sequence(epoch: int, sequence: int) -> None:
    at = position(epoch, sequence)
    assert 0 < at < 2**63
    assert sequence_of(at) == sequence


@given(st.tuples(st.integers(1, 99), st.integers(1, 2**40)), st.tuples(st.integers(1, 99), st.integers(1, 2**40)))
def test_positions_are_in_the_order_of_epoch_then_sequence(a: tuple[int, int], b: tuple[int, int]) -> None:
    assert (position(*a) < position(*b)) == (a < b)


@pytest.mark.parametrize(("epoch", "sequence"), [(0, 1), (EPOCH_MAX + 1, 1), (1, 0), (1, SEQUENCE_MAX + 1)])
def test_what_would_overflow_into_another_epoch_is_a_bug(epoch: int, sequence: int) -> None:
    with pytest.raises(AssertionError):
        position(epoch, sequence)
