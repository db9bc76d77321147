"""Shadows: merge patch, delta, versions, times and bounds, against the RFC's own table and against naive ones."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.shadow import (
    Change,
    Section,
    Sections,
    Shadow,
    ShadowBounds,
    ShadowKey,
    Update,
    VersionConflict,
    apply,
    delete,
    delta,
    depth,
    later_than,
    merge_patch,
    read_update,
    same,
)

KEY = ShadowKey("acme", "d-1")
BOUNDS = ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8)

names = st.sampled_from(["a", "b", "c", "d"])
leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, "x", ""])
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))
objects: st.SearchStrategy[dict[str, Any]] = st.dictionaries(names, values, max_size=4)


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


@given(st.lists(st.tuples(patches, patches), min_size=1, max_size=7), st.randoms())
def test_messages_that_come_late_are_taken_in_as_if_in_time(steps: list[tuple[Any, Any]], random: Random) -> None:
    """Whatever order they come in, the states and the times are those of the order of their positions."""
    messages = [(position, Update(Sections(*sections))) for position, sections in enumerate(steps, start=1)]
    messages = [(position, update) for position, update in messages if update.patch]
    in_order = Shadow()
    for position, update in messages:
        in_order = apply(in_order, update, at_ms=position, bounds=BOUNDS, position=position)
    random.shuffle(messages)
    shadow, log = Shadow(), list[Change]()
    for position, update in messages:
        later = later_than(position, log)
        assert later is not None
        behind = shadow.position
        shadow = apply(shadow, update, at_ms=position, bounds=BOUNDS, position=position, later=later)
        log.append(Change(KEY, shadow.version, position, "device", update.patch, position, behind))
    assert (shadow.desired, shadow.reported) == (in_order.desired, in_order.reported)
    assert (shadow.version, shadow.position) == (in_order.version, in_order.position)


def test_what_came_before_the_log_begins_cannot_be_put_in_its_place() -> None:
    def made(version: int, position: int, behind: int) -> Change:
        return Change(KEY, version, version, "device", {"reported": {"a": version}}, position, behind)

    third, fourth, by_key, fifth = made(3, 50, 30), made(4, 40, 50), made(5, 0, 50), made(6, 60, 50)
    log = [third, fourth, by_key, fifth]
    assert later_than(29, log) is None
    assert later_than(31, log) == [fourth, third, by_key, fifth]
    assert later_than(45, log) == [third, by_key, fifth]
    assert later_than(55, log) == [fifth]
    assert later_than(61, log) == []


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
    assert (gone.exists, gone.desired, gone.version) == (False, Section(), 2)
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
