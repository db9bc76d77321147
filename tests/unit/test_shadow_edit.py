"""What somebody who edits a whole document asks for: a merge patch that makes the one of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.errors import Refusal
from pulse.domain.shadow import same
from pulse.domain.shadow_edit import patch_between, read_desired

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a"]),
    lambda inner: (
        st.lists(inner.filter(lambda one: one is not None), max_size=2)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def without_nulls(value: object) -> Any:
    """As a shadow holds it."""
    if not isinstance(value, Mapping):
        return value
    return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}


def merged(target: object, patch: object) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(target) if isinstance(target, Mapping) else {}
    for name, inner in patch.items():
        result.pop(name, None) if inner is None else result.update({name: merged(result.get(name), inner)})
    return result


@given(DOCUMENTS, DOCUMENTS)
def test_the_patch_makes_of_what_was_there_what_was_typed(before: dict[str, Any], after: dict[str, Any]) -> None:
    there = without_nulls(before)
    assert same(merged(there, patch_between(there, after)), without_nulls(after))


@given(DOCUMENTS)
def test_nothing_is_asked_for_where_nothing_is_changed(document: dict[str, Any]) -> None:
    there = without_nulls(document)
    assert patch_between(there, there) == {}


def test_only_what_differs_is_asked_for() -> None:
    before = {"light": {"red": 1, "blue": 2}, "power": "on", "mode": "eco"}
    assert patch_between(before, {"light": {"red": 1, "blue": 3}, "power": "on"}) == {
        "light": {"blue": 3},
        "mode": None,
    }


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"a":1}x', '{"a":"\\u0000"}', '{"a":' * 600 + "1" + "}" * 600])
def test_what_is_no_document_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(Refusal) as raised:
        read_desired(text)
    assert raised.value.field.startswith("desired")


def test_nothing_typed_is_an_empty_document() -> None:
    assert read_desired(" \n") == {}
