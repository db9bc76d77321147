"""A device's shadow: what it should be (desired), what it says it is (reported), and the difference (delta).

    {"state": {"desired": {…}, "reported": {…}}, "version": 7, "clientToken": "…"}     an update

All but `state` and one of its sections may be left out. A section of an update is a JSON Merge Patch (RFC 7396): what
it names is set, null deletes, null for a whole section empties it. Each accepted update makes the next version; an
update that names a version is accepted at that one alone.
A deleted shadow keeps its version, so that what was said to the old one is never taken for the new one.
Field names are those of the AWS IoT Device Shadow service's documents, which device libraries know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pulse.domain.device_state import Device
from pulse.domain.errors import LimitExceeded, Reason, Refusal, VersionConflict
from pulse.domain.json_text import INTEGER_MAX, check_storable, read_json
from pulse.domain.shadow_merge import NEVER, Json, Mark, Object, Times, forgetting, merged, times

UPDATE_DEPTH_MAX = 100
"""Objects and arrays within one another, of an update: above any `shadow_depth_max`, and no trouble to walk."""


class ShadowBounds(msgspec.Struct, frozen=True, kw_only=True):
    """How large each section may become: bytes as compact JSON, and objects and arrays within one another."""

    shadow_bytes_max: int
    shadow_depth_max: int


class ShadowKey(msgspec.Struct, frozen=True, order=True):
    """Which shadow of which device; the unnamed one has an empty name."""

    tenant_id: str
    device_id: str
    name: str = ""

    @property
    def device(self) -> Device:
        """Whose it is."""
        return self.tenant_id, self.device_id


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
    """Half of a shadow; `mark` is what is remembered of the messages that made it so (shadow_merge.py)."""

    state: Object = {}
    mark: Mark = Mark()

    @property
    def times(self) -> Times:
        """For each attribute when it was last set."""
        return times(self.state, self.mark)


class Shadow(msgspec.Struct, frozen=True):
    """One shadow; version 0 is one that never was. `updated_ms` is when it became what it is, and never goes back.

    `position` is that of the last message of its device that it has taken in, 0 where there was none. `deleted` is
    where it was deleted last, and a message below `forgotten` can no longer be put in its place; NEVER for neither.
    """

    desired: Section = Section()
    reported: Section = Section()
    version: int = 0
    updated_ms: int = 0
    exists: bool = False
    position: int = 0
    deleted: int = NEVER
    forgotten: int = NEVER

    @property
    def delta(self) -> Object:
        """What the device has yet to do: desired less reported."""
        return delta(self.desired.state, self.reported.state)


class Change(msgspec.Struct, frozen=True):
    """What made a version of a shadow: who (`device`, or whose API key) asked for it, and for what.

    `patch` is the sections as they were asked for, None where the shadow was deleted.
    """

    key: ShadowKey
    version: int
    at_ms: int
    who: str
    patch: Object | None


def check_room(names: int, names_max: int) -> None:
    """Raise LimitExceeded where a device with so many named shadows may have no more."""
    if names >= names_max:
        raise LimitExceeded(
            Reason.TOO_LARGE,
            f"the device has {names} named shadows, of {names_max} that it may have",
            limit="shadow_names_max",
            value=names_max,
            field="name",
        )


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
        check_storable(patch, f"state.{name}", depth_max=UPDATE_DEPTH_MAX, limit="UPDATE_DEPTH_MAX")
    return update


def apply(shadow: Shadow, update: Update, *, at_ms: int, bounds: ShadowBounds, position: int | None = None) -> Shadow:
    """The shadow after `update`: a device's message at `position`, or somebody's word after all that was taken in.

    A message that was delivered late is taken in as if it had come in time; only its version is that of its coming.
    Raises VersionConflict, LimitExceeded where a section would outgrow `bounds`, and Refusal CONFLICT where so much
    was deleted since that the message cannot be put in its place.
    """
    if update.version is not UNSET and update.version != shadow.version:
        raise VersionConflict(shadow.version)
    at = shadow.position if position is None else position
    if at < shadow.forgotten:
        raise Refusal(Reason.CONFLICT, "so late that it cannot be told what has changed since")
    sections = {name: _patched(getattr(shadow, name), patch, at, at_ms) for name, patch in update.patch.items()}
    for name, (section, _) in sections.items():
        _check_bounds(section.state, bounds, f"state.{name}")
    return msgspec.structs.replace(
        shadow,
        **{name: section for name, (section, _) in sections.items()},
        version=shadow.version + 1,
        updated_ms=max(at_ms, shadow.updated_ms),
        exists=shadow.exists or at >= shadow.deleted,
        position=max(at, shadow.position),
        forgotten=max([shadow.forgotten, *(forgotten for _, forgotten in sections.values())]),
    )


def delete(shadow: Shadow, *, at_ms: int, version: int | None = None) -> Shadow:
    """The shadow without its state. Raises VersionConflict, and Refusal NOT_FOUND where there is none."""
    if not shadow.exists:
        raise Refusal(Reason.NOT_FOUND, "there is no such shadow")
    if version is not None and version != shadow.version:
        raise VersionConflict(shadow.version)
    empty = Section({}, Mark(shadow.position, at_ms))
    return msgspec.structs.replace(
        shadow,
        desired=empty,
        reported=empty,
        version=shadow.version + 1,
        updated_ms=max(at_ms, shadow.updated_ms),
        exists=False,
        deleted=shadow.position,
    )


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


def same(left: Json, right: Json) -> bool:
    """Equality of JSON: 1 is 1.0, and neither is true."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _patched(section: Section, patch: Json, at: int, at_ms: int) -> tuple[Section, int]:
    """The section, and the position of the last message of which it has forgotten something."""
    place = merged((section.state, section.mark), patch, at=at, at_ms=at_ms)
    (state, mark), forgotten = forgetting((place[0] or {}, place[1]))
    assert isinstance(state, Mapping)
    return Section(state, mark), forgotten


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
