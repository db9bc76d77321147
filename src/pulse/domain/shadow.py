"""A device's shadow: what it should be (desired), what it says it is (reported), and the difference (delta).

    {"state": {"desired": {…}, "reported": {…}}, "version": 7, "clientToken": "…"}     an update

All but `state` and one of its sections may be left out. A section of an update is a JSON Merge Patch (RFC 7396): what
it names is set, null deletes, null for a whole section empties it. Each accepted update makes the next version; an
update that names a version is accepted at that one alone.
A deleted shadow keeps its version, so that what was said to the old one is never taken for the new one.
Field names are those of the AWS IoT Device Shadow service's documents, which device libraries know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.json_text import read_json

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Object: TypeAlias = "Mapping[str, Json]"
Times: TypeAlias = "Mapping[str, int | Times]"
"""Mirrors an Object: for each attribute when it was last set, in ms since the epoch."""

INTEGER_MAX = 2**63 - 1
"""What devices, browsers and PostgreSQL's bigint can hold; a larger one is refused, not rounded."""


class ShadowBounds(msgspec.Struct, frozen=True, kw_only=True):
    """How large each section may become: bytes as compact JSON, and objects and arrays within one another."""

    shadow_bytes_max: int
    shadow_depth_max: int


class ShadowKey(msgspec.Struct, frozen=True, order=True):
    """Which shadow of which device; the unnamed one has an empty name."""

    tenant_id: str
    device_id: str
    name: str = ""


class Sections(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The patches of an update; None empties a section."""

    desired: dict[str, Any] | UnsetType | None = UNSET
    reported: dict[str, Any] | UnsetType | None = UNSET


class Update(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """What a device or a person asks of a shadow; `client_token` comes back in the answer."""

    state: Sections
    version: Annotated[int, Meta(ge=0, le=INTEGER_MAX)] | UnsetType = UNSET
    client_token: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET

    @property
    def patch(self) -> Object:
        """The sections that are asked for."""
        sections = {"desired": self.state.desired, "reported": self.state.reported}
        return {name: patch for name, patch in sections.items() if patch is not UNSET}


class Section(msgspec.Struct, frozen=True):
    """Half of a shadow; `times` mirrors `state`."""

    state: Object = {}
    times: Times = {}


class Shadow(msgspec.Struct, frozen=True):
    """One shadow; version 0 is one that never was. `updated_ms` is when it became what it is.

    `position` is that of the last message of its device that it has taken in, 0 where there was none.
    """

    desired: Section = Section()
    reported: Section = Section()
    version: int = 0
    updated_ms: int = 0
    exists: bool = False
    position: int = 0

    @property
    def delta(self) -> Object:
        """What the device has yet to do: desired less reported."""
        return delta(self.desired.state, self.reported.state)


class Change(msgspec.Struct, frozen=True):
    """What made a version of a shadow: who (`device`, or whose API key) asked for it, and for what.

    `patch` is the sections as they were asked for, None where the shadow was deleted; `position` is that of the
    device's message, 0 where it was not a device; `behind` is the shadow's position before.
    """

    key: ShadowKey
    version: int
    at_ms: int
    who: str
    patch: Object | None
    position: int = 0
    behind: int = 0


class VersionConflict(Refusal):
    """The update was meant for another version than the shadow has: `version`."""

    def __init__(self, version: int) -> None:
        super().__init__(Reason.CONFLICT, f"the shadow is at version {version}", field="version")
        self.version = version


_decoder = msgspec.json.Decoder(Update)
_encoder = msgspec.json.Encoder()


def read_update(payload: bytes | msgspec.Raw) -> Update:
    """An update from its JSON; Refusal with the path or position of what is at fault."""
    return check_update(read_json(_decoder, payload))


def check_update(update: Update) -> Update:
    """`update`, if it says anything and all that it says can be stored; else Refusal with the path."""
    if not update.patch:
        raise Refusal(Reason.INVALID_PAYLOAD, "names neither desired nor reported", field="state")
    for name, patch in update.patch.items():
        _check_values(patch, f"state.{name}")
    return update


def apply(
    shadow: Shadow,
    update: Update,
    *,
    at_ms: int,
    bounds: ShadowBounds,
    position: int = 0,
    later: Sequence[Change] = (),
) -> Shadow:
    """The shadow after `update`. Raises VersionConflict, and LimitExceeded where a section would outgrow `bounds`.

    A message that was delivered late is taken in as if it had come in time: `later` are the changes that should have
    come after it, which are made once more, as a patch may be. Only its version is that of its coming.
    """
    if update.version is not UNSET and update.version != shadow.version:
        raise VersionConflict(shadow.version)
    after = _made(shadow, update.patch, at_ms)
    for change in later:
        after = _made(after, change.patch, change.at_ms)
    for name, section in (("desired", after.desired), ("reported", after.reported)):
        _check_bounds(section.state, bounds, f"state.{name}")
    return msgspec.structs.replace(
        after, version=shadow.version + 1, updated_ms=at_ms, position=max(position, shadow.position)
    )


def later_than(position: int, log: Sequence[Change]) -> Sequence[Change] | None:
    """The changes that should have come after the message at `position`, in the order in which they should have come.

    `log` is the last changes, oldest first; None where one that is no longer among them should have come after, too.
    What was not a device's came when it came: after all that the shadow had taken in.
    """
    if log and log[0].behind > position:
        return None
    placed = [(change.position or change.behind, change.position == 0, change.version, change) for change in log]
    return [change for place, _, _, change in sorted(placed, key=lambda each: each[:3]) if place > position]


def delete(shadow: Shadow, *, at_ms: int, version: int | None = None) -> Shadow:
    """The shadow without its state. Raises VersionConflict, and Refusal NOT_FOUND where there is none."""
    if not shadow.exists:
        raise Refusal(Reason.NOT_FOUND, "there is no such shadow")
    if version is not None and version != shadow.version:
        raise VersionConflict(shadow.version)
    return Shadow(version=shadow.version + 1, updated_ms=at_ms, exists=False, position=shadow.position)


def delta(desired: Object, reported: Object) -> Object:
    """What a merge patch must say to `reported` so that it has all that `desired` has.

    Arrays are compared and replaced whole; what `reported` has and `desired` never names is the device's own business.
    """
    difference: dict[str, Json] = {}
    for name, wanted in desired.items():
        if name not in reported:
            difference[name] = wanted
            continue
        actual = reported[name]
        if isinstance(wanted, Mapping) and isinstance(actual, Mapping):
            if inner := delta(wanted, actual):
                difference[name] = inner
        elif not same(wanted, actual):
            difference[name] = wanted
    return difference


def merge_patch(target: Json, patch: Json) -> Json:
    """`target` after `patch`, neither of them changed. Source: RFC 7396, section 2."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def same(left: Json, right: Json) -> bool:
    """Equality of JSON: 1 is 1.0, and neither is true."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _made(shadow: Shadow, patch: Object | None, at_ms: int) -> Shadow:
    """`shadow` with the sections that `patch` names patched; None deletes it."""
    if patch is None:
        return msgspec.structs.replace(shadow, desired=Section(), reported=Section(), exists=False)
    sections: dict[str, Section] = {name: _patched(getattr(shadow, name), patch[name], at_ms) for name in patch}
    return msgspec.structs.replace(shadow, **sections, exists=True)


def _patched(section: Section, patch: Json, at_ms: int) -> Section:
    if patch is None:
        return Section()
    assert isinstance(patch, Mapping)
    state = merge_patch(section.state, patch)
    assert isinstance(state, Mapping)
    return Section(state, _stamped(section.times, patch, at_ms))


def _stamped(times: Times, patch: Object, at_ms: int) -> Times:
    """`times` after `patch` was merged into what they mirror."""
    stamped = dict(times)
    for name, value in patch.items():
        if value is None:
            stamped.pop(name, None)
        elif isinstance(value, Mapping):
            before = stamped.get(name)
            stamped[name] = _stamped(before if isinstance(before, Mapping) else {}, value, at_ms)
        else:
            stamped[name] = at_ms
    return stamped


def _check_values(value: Json, path: str) -> None:
    """Refuse what PostgreSQL's jsonb, or a device's JSON, cannot hold; the depth is the decoder's to bound."""
    if isinstance(value, str) and "\x00" in value:
        raise Refusal(Reason.INVALID_PAYLOAD, "U+0000 cannot be stored", field=path)
    if isinstance(value, int) and not -INTEGER_MAX - 1 <= value <= INTEGER_MAX:
        raise Refusal(Reason.INVALID_PAYLOAD, "the integer is beyond 64 bits", field=path)
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if "\x00" in name:
                raise Refusal(Reason.INVALID_PAYLOAD, "U+0000 cannot be stored", field=path)
            _check_values(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_values(inner, f"{path}[{index}]")


def _check_bounds(state: Object, bounds: ShadowBounds, path: str) -> None:
    size = len(_encoder.encode(state))
    if size > bounds.shadow_bytes_max:
        raise LimitExceeded(
            Reason.TOO_LARGE,
            f"would have {size} bytes, of {bounds.shadow_bytes_max} that it may have",
            limit="shadow_bytes_max",
            value=bounds.shadow_bytes_max,
            field=path,
        )
    if depth(state) > bounds.shadow_depth_max:
        raise LimitExceeded(
            Reason.TOO_LARGE,
            f"would have more than {bounds.shadow_depth_max} levels",
            limit="shadow_depth_max",
            value=bounds.shadow_depth_max,
            field=path,
        )


def depth(value: Json) -> int:
    """How many objects and arrays are within one another; 0 for a value that is neither."""
    if isinstance(value, Mapping):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0
