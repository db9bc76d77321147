"""When two NATS subjects can match the same message.

Tokens are separated by dots; `*` stands for exactly one token and `>`, at the end, for one or more.
"""

from __future__ import annotations


def overlap(one: str, other: str) -> bool:
    """Whether some subject matches both."""
    left, right = one.split("."), other.split(".")
    for a, b in zip(left, right, strict=False):
        if ">" in (a, b):
            return True
        if a != b and "*" not in (a, b):
            return False
    return len(left) == len(right)
