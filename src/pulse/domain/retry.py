"""How long to wait before trying again: exponential backoff with jitter.

    attempt   1     2     3     4     5     6     7
    ceiling   0.1   0.2   0.4   0.8   1.6   3.2   5.0  (s, with the defaults 0.1 and 5.0)

The wait is drawn from [half the ceiling, ceiling], so that workers that lost the same server do
not come back in step.
"""

from __future__ import annotations


def delay_s(attempt: int, *, minimum_s: float, maximum_s: float, random: float) -> float:
    """The wait before retry number `attempt` (from 1); `random` is uniform in [0, 1)."""
    ceiling = min(maximum_s, minimum_s * 2.0 ** min(attempt - 1, 30))
    return ceiling * (0.5 + 0.5 * random)
