"""The grammar of MQTT topics, against an oracle that spells everything out."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pulse.domain.errors import Reason, Refusal
from pulse.domain.subjects import SUBJECT_PREFIX, MessageType
from pulse.domain.topics import FILTERS, UPWARD, Topic, identity_in, parse_topic

ID_CHARACTERS = set(string.ascii_letters + string.digits + "_-")
IDS = st.text(st.sampled_from("aZ9_-"), min_size=1, max_size=64)
LEVELS = st.one_of(
    IDS,
    st.sampled_from(
        ["tenant", "device", "telemetry", "heartbeat", "shadow", "update", "reported", "get", "name", "commands", "ack"]
    ),
    st.sampled_from(["", "+", "#", "$share", "é", "a b", "a\n", "\x00", "x" * 65, "accepted", "{name}"]),
)
TOPICS = st.one_of(
    st.lists(LEVELS, max_size=9).map("/".join),
    st.tuples(LEVELS, LEVELS, st.lists(LEVELS, max_size=4)).map(
        lambda parts: "/".join(["tenant", parts[0], "device", parts[1], *parts[2]])
    ),
    st.text(max_size=40),
)


def is_id(text: str) -> bool:
    return 1 <= len(text) <= 64 and set(text) <= ID_CHARACTERS


def naive(topic: str) -> Topic | None:
    """The grammar once more, level by level."""
    match topic.split("/"):
        case ["tenant", tenant, "device", device, "telemetry"]:
            kind, name = "telemetry", "-"
        case ["tenant", tenant, "device", device, "heartbeat"]:
            kind, name = "heartbeat", "-"
        case ["tenant", tenant, "device", device, "shadow", ("update" | "reported" | "get") as what]:
            kind, name = f"shadow/{what}", "-"
        case ["tenant", tenant, "device", device, "shadow", "name", name, ("update" | "reported" | "get") as what]:
            kind = f"shadow/name/{{name}}/{what}"
        case ["tenant", tenant, "device", device, "commands", "ack"]:
            kind, name = "commands/ack", "-"
        case _:
            return None
    if not (is_id(tenant) and is_id(device) and is_id(name)):
        return None
    return Topic(tenant, device, kind, "" if name == "-" and "name" not in kind else name)


@given(TOPICS)
@example("tenant/a/device/b/shadow/name/c/update")
@example("tenant/a/device/b/shadow/name/-/update")
@example("tenant/a/device/b/shadow/name/{name}/update")
@example("tenant/a/device/b/shadow/name//update")
@example("tenant//device//telemetry")
@example("tenant/a/device/b/telemetry/")
@example("/tenant/a/device/b/telemetry")
@example("tenant/a/device/b/telemetry\n")
def test_the_grammar_and_a_naive_oracle_agree(topic: str) -> None:
    expected = naive(topic)
    if expected is not None:
        assert parse_topic(topic) == expected
        return
    with pytest.raises(Refusal) as refused:
        parse_topic(topic)
    assert refused.value.reason in (Reason.INVALID_TOPIC, Reason.INVALID_IDENTITY)


@given(IDS, IDS, IDS)
def test_every_kind_is_read_back(tenant_id: str, device_id: str, name: str) -> None:
    for kind in UPWARD:
        shadow_name = name if "{name}" in kind else ""
        topic = f"tenant/{tenant_id}/device/{device_id}/{kind.replace('{name}', name)}"
        assert parse_topic(topic) == Topic(tenant_id, device_id, kind, shadow_name)
        assert identity_in(topic) == (tenant_id, device_id)


@pytest.mark.parametrize(
    ("topic", "field"),
    [
        ("tenant//device/d/telemetry", "tenant_id"),
        ("tenant/+/device/d/telemetry", "tenant_id"),
        ("tenant/t/device//telemetry", "device_id"),
        ("tenant/t/device/#/telemetry", "device_id"),
        ("tenant/t/device/d/shadow/name//get", "name"),
        ("tenant/t/device/d/anything", "topic"),
        ("telemetry", "topic"),
        ("", "topic"),
    ],
)
def test_a_refusal_names_the_level_at_fault(topic: str, field: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse_topic(topic)
    assert refused.value.field == field


@given(TOPICS)
def test_the_ids_of_any_text_are_ids_or_none(topic: str) -> None:
    for found in identity_in(topic):
        assert found is None or is_id(found)


def test_what_is_said_to_devices_is_not_subscribed_to() -> None:
    down = ["shadow/update/accepted", "shadow/update/delta", "shadow/get/rejected", "commands"]
    for said in down:
        levels = f"tenant/t/device/d/{said}".split("/")
        for each in FILTERS:
            pattern = each.split("/")
            matches = len(pattern) == len(levels) and all(
                p in ("+", level) for p, level in zip(pattern, levels, strict=True)
            )
            assert not matches, (said, each)


def test_served_kinds_go_where_their_message_type_goes() -> None:
    for kind in UPWARD.values():
        assert kind.subject_prefix == SUBJECT_PREFIX[kind.message_type]
        assert kind.stream == kind.subject_prefix.upper()


def test_what_a_device_says_is_never_our_own_word() -> None:
    assert MessageType.COMMANDS_SENT not in {kind.message_type for kind in UPWARD.values()}
    assert all("sent" not in each for each in FILTERS)


@pytest.mark.parametrize("kind", UPWARD)
def test_only_reported_topics_are_for_what_is_reported_alone(kind: str) -> None:
    topic = parse_topic(f"tenant/t/device/reported/{kind.replace('{name}', 'reported')}")
    assert UPWARD[topic.kind].reported_only == kind.endswith("/reported")
