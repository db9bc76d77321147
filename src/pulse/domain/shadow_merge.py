"""Merge patches that may come in any order: each place of a section remembers which message has the last word there.

What a section is follows from the positions of its messages alone, not from the order in which they came: as if each
patch (RFC 7396) had been merged in its turn. For that a place keeps two positions:

    cleared    of the last message that set a value here, or deleted it: nothing older counts here or below
    needed     of the last message that named something below, so that an object has to be here

    needed < cleared     a value, or nothing where it was deleted
    needed >= cleared    an object, of members that are no older than `cleared`

Of two words at one position that holds which came last: people speak at the position of the last message taken in.
Nothing here looks at the depth of a patch: whoever reads it bounds that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import msgspec

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Object: TypeAlias = "Mapping[str, Json]"
Times: TypeAlias = "Mapping[str, int | Times]"
"""Mirrors an Object: for each attribute when it was last set, in ms since the epoch."""

NEVER = -1
DELETED_MAX = 100
"""Deleted places that are remembered, so that an older message does not bring them back."""
DELETED_BYTES_MAX = 8192
"""Of their names, all together."""


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """What is remembered of one place; `at_ms` is when it was cleared, `members` are the places below."""

    cleared: int = 0
    at_ms: int = 0
    needed: int = NEVER
    members: Mapping[str, Mark] = {}


Place: TypeAlias = "tuple[Json, Mark]"
"""A value and its mark; None is a place without a value, for no place holds null."""
NOWHERE: Place = (None, Mark())


def merged(place: Place, patch: Json, *, at: int, at_ms: int) -> Place:
    """`place` after the message at `at` has said `patch` about it."""
    value, mark = place
    if at < mark.cleared:
        return place
    if not isinstance(patch, Mapping):
        return _set(place, patch, at=at, at_ms=at_ms)
    state = dict(value) if isinstance(value, Mapping) else {}
    members = dict(mark.members)
    for name, inner in patch.items():
        before = (state.pop(name, None), members.get(name, NOWHERE[1]))
        after, members[name] = merged(before, inner, at=at, at_ms=at_ms)
        if after is not None:
            state[name] = after
    return state, Mark(mark.cleared, mark.at_ms, max(mark.needed, at), members)


def times(value: Object, mark: Mark) -> Times:
    """When each attribute of `value`, an object at the place of `mark`, was last set."""
    return {
        name: times(inner, mark.members[name]) if isinstance(inner, Mapping) else mark.members[name].at_ms
        for name, inner in value.items()
    }


def forgetting(place: Place) -> tuple[Place, int]:
    """`place` with as many deleted places as may be remembered, the last ones, and the position of the last forgotten.

    A message that is older than that cannot be merged any more; NEVER where nothing was forgotten.
    """
    room, forgotten = DELETED_BYTES_MAX, NEVER
    deleted = sorted(_deleted(place), reverse=True)
    beyond: list[Sequence[str]] = []
    for index, (cleared, path) in enumerate(deleted):
        room -= sum(map(len, path))
        if room < 0 or index >= DELETED_MAX:
            forgotten = max(forgotten, cleared)
            beyond.append(path)
    return (place[0], _without(place[1], beyond) if beyond else place[1]), forgotten


def _set(place: Place, value: Json, *, at: int, at_ms: int) -> Place:
    """`place` cleared for `value`, None deletes it; what is younger below it stays."""
    before, mark = place
    if mark.needed <= at:
        return value, Mark(at, at_ms)
    state, members = _younger(before, mark, at)
    return state, Mark(at, at_ms, mark.needed, members)


def _younger(value: Json, mark: Mark, at: int) -> tuple[Object, Mapping[str, Mark]]:
    """The members of an object that were set, deleted or needed after `at`."""
    assert isinstance(value, Mapping)
    state: dict[str, Json] = {}
    members: dict[str, Mark] = {}
    for name, member in mark.members.items():
        if max(member.cleared, member.needed) <= at:
            continue
        inner, members[name] = value.get(name), member
        if member.needed >= member.cleared:
            inner, below = _younger(inner, member, at)
            members[name] = msgspec.structs.replace(member, members=below)
        if inner is not None:
            state[name] = inner
    return state, members


def _deleted(place: Place, path: tuple[str, ...] = ()) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The position and path of each place below that has a mark and no value."""
    value, mark = place
    assert isinstance(value, Mapping)
    for name, member in mark.members.items():
        inner = value.get(name)
        if isinstance(inner, Mapping):
            yield from _deleted((inner, member), (*path, name))
        elif inner is None:
            yield member.cleared, (*path, name)


def _without(mark: Mark, paths: Sequence[Sequence[str]]) -> Mark:
    """`mark` without what is at these paths, all at once: one patch may delete thousands of places."""
    members = dict(mark.members)
    below: dict[str, list[Sequence[str]]] = {}
    for name, *rest in paths:
        if rest:
            below.setdefault(name, []).append(rest)
        else:
            del members[name]
    for name, left in below.items():
        members[name] = _without(members[name], left)
    return msgspec.structs.replace(mark, members=members)
