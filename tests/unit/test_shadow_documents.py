"""What devices hear of their shadows."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from pulse.domain.downward import Downward
from pulse.domain.errors import Reason, Refusal, VersionConflict
from pulse.domain.shadow import Shadow, ShadowBounds, ShadowKey, apply, delta, read_update
from pulse.domain.shadow_documents import announced, asked, rejected, updated

BOUNDS = ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8)
KEY = ShadowKey("acme", "d-1")


def said(messages: list[Downward]) -> dict[str, Any]:
    return {message.topic: json.loads(message.body) for message in messages}


def after(shadow: Shadow, update: dict[str, Any], at_ms: int) -> tuple[Shadow, dict[str, Any]]:
    read = read_update(json.dumps(update).encode())
    changed = apply(shadow, read, at_ms=at_ms, bounds=BOUNDS)
    return changed, said(updated(KEY, read, shadow, changed))


def test_a_device_hears_what_was_accepted_and_what_is_left_to_do() -> None:
    shadow, heard = after(Shadow(), {"state": {"desired": {"led": "on", "fan": {"rpm": 900}}}, "clientToken": "t"}, 1)
    assert heard == {
        "shadow/update/accepted": {
            "state": {"desired": {"led": "on", "fan": {"rpm": 900}}},
            "version": 1,
            "timestamp": 1,
            "clientToken": "t",
        },
        "shadow/update/delta": {
            "state": {"led": "on", "fan": {"rpm": 900}},
            "metadata": {"led": 1, "fan": {"rpm": 1}},
            "version": 1,
            "timestamp": 1,
        },
    }
    shadow, heard = after(shadow, {"state": {"reported": {"led": "on"}}}, 2)
    assert heard["shadow/update/delta"]["state"] == {"fan": {"rpm": 900}}
    assert heard["shadow/update/delta"]["metadata"] == {"fan": {"rpm": 1}}
    shadow, heard = after(shadow, {"state": {"reported": {"temperature": 21}}}, 3)
    assert list(heard) == ["shadow/update/accepted"], "a delta that is the one before is not said again"
    shadow, heard = after(shadow, {"state": {"reported": {"fan": {"rpm": 900}}}}, 4)
    assert list(heard) == ["shadow/update/accepted"], "nothing is left"


def test_a_get_is_answered_with_the_whole_shadow_or_that_there_is_none() -> None:
    none = asked(KEY, Shadow(), "t")
    assert (none.topic, json.loads(none.body)) == (
        "shadow/get/rejected",
        {"code": 404, "message": "there is no such shadow", "timestamp": 0, "clientToken": "t"},
    )
    shadow, _ = after(Shadow(), {"state": {"desired": {"a": 1}, "reported": {"a": 2, "b": 3}}}, 5)
    named = asked(ShadowKey("acme", "d-1", "config"), shadow, UNSET)
    assert (named.tenant_id, named.device_id, named.topic) == ("acme", "d-1", "shadow/name/config/get/accepted")
    assert json.loads(named.body) == {
        "state": {"desired": {"a": 1}, "reported": {"a": 2, "b": 3}, "delta": {"a": 1}},
        "metadata": {"desired": {"a": 5}, "reported": {"a": 5, "b": 5}},
        "version": 1,
        "timestamp": 5,
    }


def test_a_rejection_has_a_code_the_path_and_after_a_conflict_the_version() -> None:
    conflict = rejected(KEY, "update", VersionConflict(7), "t", 9)
    assert (conflict.topic, json.loads(conflict.body)) == (
        "shadow/update/rejected",
        {
            "code": 409,
            "message": "version: the shadow is at version 7",
            "version": 7,
            "timestamp": 9,
            "clientToken": "t",
        },
    )
    wrong = rejected(KEY, "get", Refusal(Reason.INVALID_PAYLOAD, "must be text", field="clientToken"), UNSET, 9)
    assert json.loads(wrong.body) == {"code": 422, "message": "clientToken: must be text", "timestamp": 9}


sections = st.dictionaries(
    st.sampled_from("abc"), st.integers(0, 2) | st.dictionaries(st.sampled_from("xy"), st.integers(0, 2))
)


@given(st.lists(st.tuples(sections, sections), max_size=6))
def test_whoever_hears_every_delta_knows_what_to_do(steps: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """The last delta said is the present one, as long as something is left to do."""
    shadow, last = Shadow(), {}
    for at_ms, (desired, reported) in enumerate(steps, start=1):
        before = shadow
        update = read_update(json.dumps({"state": {"desired": desired, "reported": reported}}).encode())
        shadow = apply(shadow, update, at_ms=at_ms, bounds=BOUNDS)
        for message in announced(KEY, before, shadow):
            last = json.loads(message.body)["state"]
        left = delta(shadow.desired.state, shadow.reported.state)
        assert not left or last == left
