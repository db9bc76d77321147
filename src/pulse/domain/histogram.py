"""What a histogram of a metric says of the values behind it."""

from __future__ import annotations

from collections.abc import Mapping


def quantile(cumulative: Mapping[float, int], fraction: float) -> float | None:
    """The upper bound of the bucket that holds it, refined linearly; None where nothing was counted."""
    bounds = sorted(cumulative)
    total = cumulative[bounds[-1]] if bounds else 0
    if total <= 0 or any(count < 0 for count in cumulative.values()):
        return None
    wanted, low, below = fraction * total, 0.0, 0
    for bound in bounds:
        count = cumulative[bound]
        if count >= wanted:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - below) / max(1, count - below)
        low, below = bound, count
    return None
