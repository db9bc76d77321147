"""Positions: which message of which making of a stream, and sets of them.

A position is one 63-bit number that grows with the stream:

    62            46 45                                             0
    +---------------+------------------------------------------------+
    |     epoch     |                stream sequence                 |
    +---------------+------------------------------------------------+
      131,071 times a stream was made     70 trillion messages each (100,000 a second for 22 years)

A stream that was deleted and made again counts its sequences from 1, so each making has an epoch of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

SEQUENCE_BITS = 46
SEQUENCE_MAX = (1 << SEQUENCE_BITS) - 1
EPOCH_MAX = (1 << (63 - SEQUENCE_BITS)) - 1


def position(epoch: int, sequence: int) -> int:
    """The position of `sequence` in `epoch`."""
    assert 0 < epoch <= EPOCH_MAX, f"epoch {epoch} is outside 1..{EPOCH_MAX}"
    assert 0 < sequence <= SEQUENCE_MAX, f"sequence {sequence} is outside 1..{SEQUENCE_MAX}"
    return epoch << SEQUENCE_BITS | sequence


def positions(epoch: int, sequences: Sequence[int]) -> list[int]:
    """The position of each of `sequences`, of which there is at least one, in `epoch`."""
    position(epoch, max(sequences))
    base = position(epoch, min(sequences)) - min(sequences)
    return [base + sequence for sequence in sequences]


def epoch_of(at: int) -> int:
    """The epoch of a position."""
    return at >> SEQUENCE_BITS


def sequence_of(at: int) -> int:
    """The stream sequence of a position."""
    return at & SEQUENCE_MAX


Range = tuple[int, int]


class PositionSet:
    """An immutable set of positions as sorted, disjoint, non-adjacent half-open ranges.

    Its text form is PostgreSQL's `int8multirange`: `{[1,4),[7,8)}`.
    """

    __slots__ = ("ranges",)

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self.ranges: tuple[Range, ...] = tuple(_merged(sorted(ranges)))

    @classmethod
    def of(cls, positions: Iterable[int]) -> PositionSet:
        """The set of single positions, in any order; quick where they follow one another without a gap."""
        made = cls()
        unique = set(positions)
        if unique and max(unique) - min(unique) < len(unique):
            made.ranges = ((min(unique), max(unique) + 1),)
        else:
            made.ranges = tuple(_runs(sorted(unique)))
        return made

    @classmethod
    def parse(cls, text: str) -> PositionSet:
        """Read PostgreSQL's canonical output of an `int8multirange`."""
        inner = text.removeprefix("{").removesuffix("}")
        if not inner:
            return cls()
        bounds = (part.split(",") for part in inner.strip("[)").split("),["))
        return cls((int(low), int(high)) for low, high in bounds)

    def __str__(self) -> str:
        return "{" + ",".join(f"[{low},{high})" for low, high in self.ranges) + "}"

    def __repr__(self) -> str:
        return f"PositionSet({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PositionSet) and self.ranges == other.ranges

    def __hash__(self) -> int:
        return hash(self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __len__(self) -> int:
        return sum(high - low for low, high in self.ranges)

    def __contains__(self, at: int) -> bool:
        low_index, high_index = 0, len(self.ranges)
        while low_index < high_index:
            middle = (low_index + high_index) // 2
            if self.ranges[middle][1] <= at:
                low_index = middle + 1
            else:
                high_index = middle
        return low_index < len(self.ranges) and self.ranges[low_index][0] <= at

    def __or__(self, other: PositionSet) -> PositionSet:
        return PositionSet((*self.ranges, *other.ranges))

    def __and__(self, other: PositionSet) -> PositionSet:
        return PositionSet(_intersection(self.ranges, other.ranges))

    def __sub__(self, other: PositionSet) -> PositionSet:
        return PositionSet(_difference(self.ranges, other.ranges))


def _runs(ascending: Sequence[int]) -> Iterator[Range]:
    """The ranges of positions, each there once; a quarter of the time of merging a range for each."""
    if not ascending:
        return
    low = before = ascending[0]
    for at in ascending:
        if at - before > 1:
            yield (low, before + 1)
            low = at
        before = at
    yield (low, before + 1)


def _merged(ranges: Iterable[Range]) -> Iterator[Range]:
    current: Range | None = None
    for low, high in ranges:
        if low >= high:
            continue
        if current is None:
            current = (low, high)
        elif low <= current[1]:
            current = (current[0], max(current[1], high))
        else:
            yield current
            current = (low, high)
    if current is not None:
        yield current


def _intersection(left: Sequence[Range], right: Sequence[Range]) -> Iterator[Range]:
    i = j = 0
    while i < len(left) and j < len(right):
        low, high = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if low < high:
            yield (low, high)
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1


def _difference(left: Sequence[Range], right: Sequence[Range]) -> Iterator[Range]:
    j = 0
    for low, high in left:
        start = low
        while j < len(right) and right[j][1] <= start:
            j += 1
        k = j
        while k < len(right) and right[k][0] < high:
            if right[k][0] > start:
                yield (start, right[k][0])
            start = max(start, right[k][1])
            k += 1
        if start < high:
            yield (start, high)
