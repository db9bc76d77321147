"""Shadows: merge patch, delta, versions, times and bounds, against the RFC's own table and against naive ones."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from pulse.domain import shadow_merge
from pulse.domain.errors import LimitExceeded, Reason, Refusal, VersionConflict
from pulse.domain.shadow import (
    Section,
    Sections,
    Shadow,
    ShadowBounds,
    ShadowKey,
    Update,
    apply,
    delete,
    delta,
    depth,
    read_update,
    same,
)
from pulse.domain.shadow_merge import Mark

KEY = ShadowKey("acme", "d-1")
BOUNDS = ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8)

names = st.sampled_from(["a", "b", "c", "d"])
leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, "x", ""])
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))
objects: st.SearchStrategy[dict[str, Any]] = st.dictionaries(names, values, max_size=4)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2, as it is written there."""
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = merge_patch(target.get(name), value)
    return target


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """What a section can be: the result of a patch, so that no object holds a null."""
    state = merge_patch({}, draw(objects))
    assert isinstance(state, dict)
    return state


# RFC 7396, appendix A.
@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_does_what_the_rfc_lists(target: Any, patch: Any, result: Any) -> None:
    before = copy.deepcopy((target, patch))
    assert merge_patch(target, patch) == result
    assert (target, patch) == before, "neither is changed"


@given(states(), objects)
def test_a_patch_twice_is_a_patch_once(state: dict[str, Any], patch: dict[str, Any]) -> None:
    once = merge_patch(state, patch)
    assert same(merge_patch(once, patch), once)


@given(states(), states())
def test_reporting_the_delta_leaves_none(desired: dict[str, Any], reported: dict[str, Any]) -> None:
    difference = delta(desired, reported)
    followed = merge_patch(reported, difference)
    assert isinstance(followed, dict)
    assert delta(desired, followed) == {}
    assert reported.keys() <= followed.keys(), "what is not desired is left alone"


@given(states(), states())
def test_the_delta_names_just_what_differs(desired: dict[str, Any], reported: dict[str, Any]) -> None:
    def naive(wanted: dict[str, Any], actual: dict[str, Any]) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for name, value in wanted.items():
            if isinstance(value, dict) and isinstance(actual.get(name), dict):
                found |= {(name, *path) for path in naive(value, actual[name])}
            elif name not in actual or not same(value, actual[name]):
                found.add((name,))
        return found

    def named(difference: Any, wanted: Any, actual: Any) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for name, value in difference.items():
            if isinstance(value, dict) and isinstance(wanted[name], dict) and isinstance(actual.get(name), dict):
                found |= {(name, *path) for path in named(value, wanted[name], actual[name])}
            else:
                assert same(value, wanted[name])
                found.add((name,))
        return found

    assert named(delta(desired, reported), desired, reported) == naive(desired, reported)


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [(1, 1.0, True), (True, 1, False), ([True], [1], False), ({"a": 0}, {"a": False}, False), ("1", 1, False)],
)
def test_equality_is_that_of_json(left: Any, right: Any, equal: bool) -> None:
    assert same(left, right) is equal
    assert (delta({"x": left}, {"x": right}) == {}) is equal


def sections_of(shadow: Shadow) -> list[Section]:
    return [shadow.desired, shadow.reported]


patches = st.one_of(st.just(UNSET), st.none(), objects)


@given(st.lists(st.tuples(patches, patches), max_size=8))
def test_versions_rise_by_one_and_every_attribute_has_its_time(steps: list[tuple[Any, Any]]) -> None:
    shadow = Shadow()
    for at_ms, (desired, reported) in enumerate(steps, start=1):
        before, shadow = shadow, apply(shadow, Update(Sections(desired, reported)), at_ms=at_ms, bounds=BOUNDS)
        assert (shadow.version, shadow.updated_ms, shadow.exists) == (before.version + 1, at_ms, True)
        for old, new, patch in zip(sections_of(before), sections_of(shadow), (desired, reported), strict=True):
            _check_times(new.state, new.times)
            if patch is UNSET:
                assert new is old


def _check_times(state: Any, times: Any) -> None:
    assert times.keys() == state.keys()
    for name, value in state.items():
        if isinstance(value, dict):
            _check_times(value, times[name])
        else:
            assert type(times[name]) is int


def test_only_what_a_patch_names_gets_a_new_time() -> None:
    first = apply(Shadow(), read_update(b'{"state":{"reported":{"a":1,"b":{"c":2,"d":3}}}}'), at_ms=1, bounds=BOUNDS)
    second = apply(first, read_update(b'{"state":{"reported":{"b":{"c":2}}}}'), at_ms=2, bounds=BOUNDS)
    assert second.reported.times == {"a": 1, "b": {"c": 2, "d": 1}}


few = st.sampled_from(["a", "b"])
small: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(few, st.none() | st.integers(0, 3), max_size=2),
    lambda inner: st.dictionaries(few, inner | st.none() | st.integers(0, 3) | st.just([]), max_size=2),
    max_leaves=4,
)
"""Patches that meet one another: two names, few values."""
asked = st.one_of(st.just(UNSET), st.none(), small, patches)


@settings(max_examples=500)
@given(st.lists(st.tuples(asked, asked), min_size=1, max_size=7), st.randoms())
def test_messages_in_any_order_make_what_they_make_in_theirs(steps: list[tuple[Any, Any]], random: Random) -> None:
    messages = [(position, Update(Sections(*sections))) for position, sections in enumerate(steps, start=1)]
    messages = [(position, update) for position, update in messages if update.patch]
    assume(messages)
    in_order = Shadow()
    naive: dict[str, Any] = {"desired": {}, "reported": {}}
    for position, update in messages:
        in_order = apply(in_order, update, at_ms=position * 10, bounds=BOUNDS, position=position)
        naive |= {name: merge_patch(naive[name], patch) or {} for name, patch in update.patch.items()}
    assert {"desired": in_order.desired.state, "reported": in_order.reported.state} == naive
    random.shuffle(messages)
    shadow = Shadow()
    for position, update in messages:
        shadow = apply(shadow, update, at_ms=position * 10, bounds=BOUNDS, position=position)
        # as it comes back from the database
        desired, reported = (
            Section(section.state, msgspec.json.decode(msgspec.json.encode(section.mark), type=Mark))
            for section in sections_of(shadow)
        )
        shadow = msgspec.structs.replace(shadow, desired=desired, reported=reported)
    for section, expected in zip(sections_of(shadow), sections_of(in_order), strict=True):
        assert (section.state, section.times) == (expected.state, expected.times)
    assert (shadow.version, shadow.position, shadow.exists) == (in_order.version, in_order.position, True)


@settings(max_examples=300)
@given(st.lists(st.tuples(small, st.sampled_from(["device", "person", "deletion"])), min_size=1, max_size=7), st.data())
def test_a_late_message_comes_before_what_people_said_after_what_followed_it(
    steps: list[tuple[Any, Any]], data: st.DataObject
) -> None:
    """One message is delivered late; people speak after all that was taken in when they did."""
    late = data.draw(st.integers(0, len(steps) - 1))
    said: list[tuple[int, Any]] = []
    position = 0
    shadow, held = Shadow(), None
    for index, (patch, who) in enumerate(steps):
        update = Update(Sections(reported=patch))
        if who == "device" or index == late:
            position += 1
            said.append((position, update))
            if index == late:
                held = (position, update)
                continue
            shadow = apply(shadow, update, at_ms=1, bounds=BOUNDS, position=position)
        elif who == "person":
            said.append((shadow.position, update))
            shadow = apply(shadow, update, at_ms=1, bounds=BOUNDS)
        elif shadow.exists:
            said.append((shadow.position, None))
            shadow = delete(shadow, at_ms=1)
    assert held is not None
    shadow = apply(shadow, held[1], at_ms=1, bounds=BOUNDS, position=held[0])
    expected: Any = {}
    exists = False
    for _, update in sorted(said, key=lambda each: each[0]):  # stable: who spoke later at one position comes later
        expected = {} if update is None else merge_patch(expected, update.patch["reported"]) or {}
        exists = update is not None
    assert (shadow.reported.state, shadow.exists) == (expected, exists)


def test_a_thousand_deletions_are_not_remembered_and_what_came_before_them_is_refused() -> None:
    shadow = apply(Shadow(), read_update(b'{"state":{"reported":{"kept":1}}}'), at_ms=1, bounds=BOUNDS, position=10)
    for number in range(1000):
        patch = {f"n{number}": None, "o": {f"n{number}": None}}
        shadow = apply(shadow, Update(Sections(reported=patch)), at_ms=1, bounds=BOUNDS, position=100 + number)
    assert len(msgspec.json.encode(shadow.reported.mark)) < 5000
    assert shadow.reported.state == {"kept": 1, "o": {}}
    with pytest.raises(Refusal, match="so late") as raised:
        apply(shadow, Update(Sections(reported={"n7": 1})), at_ms=1, bounds=BOUNDS, position=50)
    assert raised.value.reason is Reason.CONFLICT
    late = apply(shadow, Update(Sections(reported={"n999": 1, "x": 2})), at_ms=1, bounds=BOUNDS, position=1098)
    assert late.reported.state == {"kept": 1, "o": {}, "x": 2}, "what was deleted later stays deleted"
    long = apply(shadow, Update(Sections(reported={"x" * 60_000: None})), at_ms=1, bounds=BOUNDS, position=2000)
    assert len(msgspec.json.encode(long.reported.mark)) < 5000


def test_thousands_of_places_that_one_patch_deletes_are_forgotten_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, each a copy of all, a patch of 64 KB would take a third of a second of whoever checks it."""
    copies: list[Mark] = []
    without = shadow_merge._without

    def counted(mark: Mark, paths: Any) -> Mark:
        copies.append(mark)
        return without(mark, paths)

    monkeypatch.setattr(shadow_merge, "_without", counted)
    patch: dict[str, Any] = {f"n{number:04}": None for number in range(3000)}
    update = Update(Sections(reported=patch | {"o": {"p": dict(patch)}, "kept": 1}))
    shadow = apply(Shadow(), update, at_ms=1, bounds=BOUNDS, position=5)
    assert len(copies) == 3, "one for each object"
    assert shadow.reported.state == {"kept": 1, "o": {"p": {}}}
    assert shadow.forgotten == 5
    assert len(msgspec.json.encode(shadow.reported.mark)) < 5000


def test_an_update_for_another_version_is_refused_with_the_one_there_is() -> None:
    shadow = apply(Shadow(), read_update(b'{"state":{"desired":{"a":1}},"version":0}'), at_ms=1, bounds=BOUNDS)
    for version in (0, 2):
        update = read_update(b'{"state":{"desired":{"a":2}},"version":%d}' % version)
        with pytest.raises(VersionConflict) as raised:
            apply(shadow, update, at_ms=2, bounds=BOUNDS)
        assert (raised.value.version, raised.value.reason) == (1, Reason.CONFLICT)


def test_a_shadow_made_again_goes_on_counting() -> None:
    shadow = apply(Shadow(), read_update(b'{"state":{"desired":{"a":1}}}'), at_ms=1, bounds=BOUNDS)
    gone = delete(shadow, at_ms=2)
    assert (gone.exists, gone.desired.state, gone.version) == (False, {}, 2)
    with pytest.raises(Refusal, match="no such shadow"):
        delete(gone, at_ms=3)
    with pytest.raises(VersionConflict):
        delete(shadow, at_ms=3, version=7)
    again = apply(gone, read_update(b'{"state":{"reported":{"b":1}}}'), at_ms=3, bounds=BOUNDS)
    assert (again.exists, again.version, again.desired.state) == (True, 3, {})


@pytest.mark.parametrize(
    ("payload", "reason", "field"),
    [
        (b"5", Reason.INVALID_PAYLOAD, ""),
        (b"[]", Reason.INVALID_PAYLOAD, ""),
        (b"", Reason.INVALID_JSON, ""),
        (b"{}", Reason.INVALID_PAYLOAD, "state"),
        (b'{"state":{}}', Reason.INVALID_PAYLOAD, "state"),
        (b'{"state":[]}', Reason.INVALID_PAYLOAD, "state"),
        (b'{"state":{"reported":5}}', Reason.INVALID_PAYLOAD, "state.reported"),
        (b'{"state":{"delta":{}}}', Reason.INVALID_PAYLOAD, "state.delta"),
        (b'{"state":{"reported":{}},"version":"1"}', Reason.INVALID_PAYLOAD, "version"),
        (b'{"state":{"reported":{}},"version":-1}', Reason.INVALID_PAYLOAD, "version"),
        (b'{"state":{"reported":{}},"clientToken":""}', Reason.INVALID_PAYLOAD, "clientToken"),
        (b'{"state":{"reported":{"a":[{"b":"\\u0000"}]}}}', Reason.INVALID_PAYLOAD, "state.reported.a[0].b"),
        (b'{"state":{"reported":{"a":99999999999999999999}}}', Reason.INVALID_PAYLOAD, "state.reported.a"),
        (b'{"state":{"reported":{"a":NaN}}}', Reason.INVALID_JSON, ""),
        (b'{"state":{"reported":' + b'{"a":' * 5000 + b"1" + b"}" * 5002, Reason.INVALID_JSON, ""),
    ],
)
def test_what_is_no_update_is_refused_by_its_path(payload: bytes, reason: Reason, field: str) -> None:
    with pytest.raises(Refusal) as raised:
        read_update(payload)
    assert (raised.value.reason, raised.value.field) == (reason, field)


def test_a_section_that_would_outgrow_its_bounds_is_refused() -> None:
    shadow = apply(Shadow(), Update(Sections(reported={"a": "x" * 5000})), at_ms=1, bounds=BOUNDS)
    with pytest.raises(LimitExceeded) as raised:
        apply(shadow, Update(Sections(reported={"b": "x" * 5000})), at_ms=2, bounds=BOUNDS)
    assert (raised.value.limit, raised.value.field) == ("shadow_bytes_max", "state.reported")
    nested: dict[str, Any] = {}
    for _ in range(7):
        nested = {"a": nested}
    assert depth(nested) == 8
    assert apply(Shadow(), Update(Sections(nested)), at_ms=1, bounds=BOUNDS).desired.state == nested
    with pytest.raises(LimitExceeded) as raised:
        apply(Shadow(), Update(Sections({"a": nested})), at_ms=1, bounds=BOUNDS)
    assert (raised.value.limit, raised.value.field) == ("shadow_depth_max", "state.desired")
