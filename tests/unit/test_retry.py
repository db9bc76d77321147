"""The wait grows, stays within its bounds, and never overflows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.retry import delay_s


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_the_wait_is_between_half_and_all_of_its_ceiling(attempt: int, random: float) -> None:
    ceiling = min(5.0, 0.1 * 2 ** min(attempt - 1, 30))
    assert ceiling / 2 <= delay_s(attempt, minimum_s=0.1, maximum_s=5.0, random=random) <= ceiling


def test_the_table_in_the_docstring_is_true() -> None:
    waits = [delay_s(attempt, minimum_s=0.1, maximum_s=5.0, random=1.0) for attempt in range(1, 8)]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
