"""Who may do what at an MQTT broker: the decision, against naive oracles and by table."""

from __future__ import annotations

import re
import secrets
from importlib import resources
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pulse.domain.identity import Device, Tenant, TokenDigest, digest, make_token
from pulse.domain.mqtt_access import (
    DOWN,
    DOWN_NAMED,
    UP,
    UP_NAMED,
    Action,
    bridge_may,
    contains,
    device_of,
    down_filters,
    is_own_client_id,
    may,
    prefix,
    session_end_ms,
    takes_away,
    up_filters,
    user_name,
)
from pulse.domain.registry import Record
from pulse.domain.topics import FILTERS

NOW_MS = 1_800_000_000_000
ids = st.text("abcXYZ019_-", min_size=1, max_size=64)
WORDS = """
    tenant device acme beta t-1 t-2 telemetry shadow update get name main delta commands ack heartbeat reported accepted
    + # $share pulse .. a.b * >
"""
levels = st.sampled_from([*WORDS.split(), ""])
topics = st.lists(levels, min_size=1, max_size=10).map("/".join)
words = st.sampled_from(["a", "b", "+", "#"])


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a topic name is matched, level by level. Source: MQTT 5.0, 4.7.1."""
    wanted, said = topic_filter.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted = wanted[:-1]
        return len(said) >= len(wanted) and all(w in ("+", s) for w, s in zip(wanted, said, strict=False))
    return len(wanted) == len(said) and all(w in ("+", s) for w, s in zip(wanted, said, strict=True))


@given(tenant_id=ids, device_id=ids)
def test_a_user_name_is_read_as_it_is_written(tenant_id: str, device_id: str) -> None:
    assert device_of(user_name(tenant_id, device_id)) == (tenant_id, device_id)


@pytest.mark.parametrize("name", ["", "acme", "acme/", "/t-1", "acme/t-1/", "a/b/c", "a b/c", "acme/t\n", "ä/b", "+/#"])
def test_what_is_no_user_name_of_a_device(name: str) -> None:
    assert device_of(name) is None


@given(outer=st.lists(words, min_size=1, max_size=3), inner=st.lists(words, min_size=1, max_size=3))
@example(["+"], ["#"])
@example(["a", "+"], ["a", "#"])
@example(["a", "#"], ["a"])
@example(["a", "#"], ["#"])
@example(["a", "#"], ["+", "a"])
@example(["a", "b", "#"], ["a", "#"])
def test_a_filter_contains_another_where_every_topic_of_it_is_its_own(outer: list[str], inner: list[str]) -> None:
    if "#" in inner[:-1] + outer[:-1]:
        return
    everything = ["/".join(each) for length in range(1, 5) for each in product("abc", repeat=length)]
    theirs = {topic for topic in everything if matches("/".join(inner), topic)}
    ours = {topic for topic in everything if matches("/".join(outer), topic)}
    assert contains("/".join(outer), "/".join(inner)) == (theirs <= ours)


@given(topic=topics, action=st.sampled_from(Action))
@example("tenant/acme/device/t-1/telemetry", Action.PUBLISH)
@example("tenant/acme/device/t-1/shadow/name/main/update/delta", Action.SUBSCRIBE)
@example("tenant/acme/device/t-1/+", Action.SUBSCRIBE)
def test_a_device_stays_below_its_own_prefix(topic: str, action: Action) -> None:
    if may("acme", "t-1", action, topic):
        assert not may("beta", "t-1", action, topic)
        if action is Action.SUBSCRIBE and topic.startswith("tenant/acme/route"):
            return
        assert topic.startswith(prefix("acme", "t-1"))
        assert "#" not in topic
        assert not may("acme", "t-2", action, topic)


@given(rest=st.lists(levels, max_size=4))
def test_every_device_of_a_tenant_hears_what_its_routes_republish_and_says_nothing_there(rest: list[str]) -> None:
    topic = "/".join(["tenant/acme/route", *rest])
    assert may("acme", "t-1", Action.SUBSCRIBE, topic)
    assert may("acme", "t-2", Action.SUBSCRIBE, topic)
    assert not may("beta", "t-1", Action.SUBSCRIBE, topic)
    assert not may("acme", "t-1", Action.PUBLISH, topic)


@pytest.mark.parametrize("topic", ["tenant/acme/+/#", "tenant/+/route/#", "tenant/acme/#", "#", "tenant/acme/routes/a"])
def test_no_filter_that_is_wider_than_the_routes_of_the_tenant_is_theirs(topic: str) -> None:
    assert not may("acme", "t-1", Action.SUBSCRIBE, topic)


@given(topic=topics)
def test_what_a_device_may_publish_is_what_the_bridge_listens_to(topic: str) -> None:
    allowed = may("acme", "t-1", Action.PUBLISH, topic)
    if allowed:
        assert any(matches(each, topic) for each in FILTERS)
        assert any(matches(each, topic) for each in up_filters("acme", "t-1", named=True))
        assert "+" not in topic


@given(tenant_id=ids, device_id=ids, name=ids)
def test_every_topic_of_its_own_is_allowed(tenant_id: str, device_id: str, name: str) -> None:
    for kind in UP + UP_NAMED:
        assert may(tenant_id, device_id, Action.PUBLISH, prefix(tenant_id, device_id) + kind.replace("+", name))
    for each in down_filters(tenant_id, device_id, named=True):
        assert may(tenant_id, device_id, Action.SUBSCRIBE, each)
        assert may(tenant_id, device_id, Action.SUBSCRIBE, each.replace("+", name).replace("#", name))


def test_nothing_goes_both_ways() -> None:
    """A device that heard itself would take its own words for ours."""
    for up, down in product(UP + UP_NAMED, DOWN + DOWN_NAMED):
        assert not matches(down, up.replace("+", "main"))


def test_where_named_shadows_are_not_bounded_no_filter_has_a_wildcard() -> None:
    """Each topic and filter of a device costs the broker something that all devices share."""
    filters = [*up_filters("acme", "t-1", named=False), *down_filters("acme", "t-1", named=False)]
    filters.remove("tenant/acme/route/#")  # bounded by what one session may have there: see GUARANTEES.md
    assert not [each for each in filters if "+" in each or "/name/" in each]
    assert len(filters) == len(UP) + len(DOWN)


def test_the_bridges_user_at_our_own_listener_may_say_all_that_devices_listen_to() -> None:
    """Its permissions stand in a file, which nothing else compares with the list."""
    config = (resources.files("pulse.adapters.embedded") / "nats_mqtt.conf").read_text("utf-8")
    allowed = [each.replace(".", "/").replace("*", "+") for each in re.findall(r'"(tenant\.\*\.device[^">]+)"', config)]
    for topic in DOWN + DOWN_NAMED:
        said = prefix("acme", "t-1") + topic.replace("+", "main")
        assert any(matches(each, said) for each in allowed), topic
        assert bridge_may(Action.PUBLISH, said)


def test_every_named_topic_has_an_unnamed_twin() -> None:
    twins = [each.replace("name/+/", "") for each in (*UP_NAMED, *DOWN_NAMED)]
    assert sorted(twins) == sorted(each for each in (*UP, *DOWN) if each.startswith("shadow/"))


@given(topic=topics)
@example("$share/pulse/tenant/+/device/+/telemetry")
def test_our_own_user_hears_devices_and_speaks_only_to_them(topic: str) -> None:
    real = topic.split("/", 2)[2] if topic.startswith("$share/") and topic.count("/") >= 2 else topic
    if bridge_may(Action.SUBSCRIBE, topic):
        assert real.startswith("tenant/")
    if bridge_may(Action.PUBLISH, topic) and topic.split("/")[2] != "route":
        _, tenant_id, _, device_id, *_ = topic.split("/")
        assert may(tenant_id, device_id, Action.SUBSCRIBE, topic)
        assert not any(matches(each, topic) for each in FILTERS)


@pytest.mark.parametrize(
    ("action", "topic", "allowed"),
    [
        *((Action.SUBSCRIBE, f"$share/pulse/{each}", True) for each in FILTERS),
        *((Action.SUBSCRIBE, each, True) for each in FILTERS),
        (Action.SUBSCRIBE, "$share/pulse/tenant/#", True),
        (Action.SUBSCRIBE, "#", False),
        (Action.SUBSCRIBE, "$share/pulse/#", False),
        (Action.SUBSCRIBE, "$share/+/tenant/#", False),
        (Action.SUBSCRIBE, "$SYS/#", False),
        (Action.PUBLISH, "tenant/acme/device/t-1/commands", True),
        (Action.PUBLISH, "tenant/acme/device/t-1/shadow/update/delta", True),
        (Action.PUBLISH, "tenant/acme/device/t-1/shadow/name/main/get/accepted", True),
        (Action.PUBLISH, "tenant/acme/device/t-1/shadow/name/+/get/accepted", False),
        (Action.PUBLISH, "tenant/acme/device/t-1/telemetry", False),
        (Action.PUBLISH, "tenant/+/device/t-1/commands", False),
        (Action.PUBLISH, "tenant/acme/device/t-1/shadow/update/+", False),
        (Action.PUBLISH, "tenant/acme/route/alerts/t-1", True),
        (Action.PUBLISH, "tenant/acme/route", False),
        (Action.PUBLISH, "tenant/acme/route/alerts/#", False),
        (Action.PUBLISH, "tenant/+/route/alerts", False),
        (Action.PUBLISH, "elsewhere", False),
    ],
)
def test_what_our_own_user_may(action: Action, topic: str, allowed: bool) -> None:
    assert bridge_may(action, topic) is allowed


@pytest.mark.parametrize(
    ("client_id", "own"),
    [
        ("acme/t-1", True),
        ("acme/t-1/console", False),
        ("A1b2C3d4E5f6G7h8I9j0K1", False),
        ("HpRE6PAs0QJVbjd3Ubiy", False),
        ("", False),
        ("acme/t-10", False),
        ("acme/t-2", False),
        ("beta/t-1", False),
        ("pulse-bridge", False),
        ("mosq-abc", False),
        ("A1b2C3d4E5f6G7h8I9j0K1x", False),
        ("A1b2C3d4E5f6G7h8I9j0-_", False),
        ("acme/t-1/" + "x" * 300, False),
    ],
)
def test_a_client_id_is_the_user_name(client_id: str, own: bool) -> None:
    assert is_own_client_id("acme", "t-1", client_id) is own


TOKEN, OTHER = (make_token(secrets.token_bytes(32)) for _ in range(2))


def device(*ends: tuple[str, int | None], enabled: bool = True) -> Device:
    return Device("acme", "t-1", enabled, tuple(TokenDigest(digest(token), end_ms) for token, end_ms in ends))


@pytest.mark.parametrize(
    ("tokens", "end_ms"),
    [
        ([(TOKEN, None)], NOW_MS + 1000),
        ([(TOKEN, NOW_MS + 400)], NOW_MS + 400),
        ([(TOKEN, NOW_MS + 4000)], NOW_MS + 1000),
        ([(TOKEN, None), (OTHER, NOW_MS + 1)], NOW_MS + 1000),
    ],
)
def test_a_session_ends_after_its_time_or_with_its_token(tokens: list[tuple[str, int | None]], end_ms: int) -> None:
    assert session_end_ms(device(*tokens), TOKEN, now_ms=NOW_MS, longest_ms=1000) == end_ms


@pytest.mark.parametrize(
    ("before", "after", "gone"),
    [
        (None, device((TOKEN, None)), False),
        (device((TOKEN, None)), None, True),
        (device((TOKEN, None), enabled=False), None, False),
        (device((TOKEN, None)), device((TOKEN, None)), False),
        (device((TOKEN, None)), device((TOKEN, None), enabled=False), True),
        (device((TOKEN, None), enabled=False), device((TOKEN, None)), False),
        (device((TOKEN, None)), device((OTHER, None)), True),
        (device((TOKEN, None)), device((OTHER, None), (TOKEN, None)), False),
        (device((TOKEN, None)), device((OTHER, None), (TOKEN, NOW_MS + 1)), True),
        (device((TOKEN, NOW_MS + 9)), device((TOKEN, NOW_MS + 5)), True),
        (device((TOKEN, NOW_MS + 5)), device((TOKEN, NOW_MS + 9)), False),
        (device((TOKEN, NOW_MS + 5)), device((TOKEN, None)), False),
        (device((TOKEN, None), (OTHER, NOW_MS - 1)), device((TOKEN, None)), False),
        (Tenant("acme", enabled=True), Tenant("acme", enabled=False), True),
        (Tenant("acme", enabled=True), None, True),
        (Tenant("acme", enabled=True), Tenant("acme", enabled=True), False),
        (Tenant("acme", enabled=False), Tenant("acme", enabled=True), False),
    ],
)
def test_what_takes_something_away_from_a_device(before: Record | None, after: Record | None, gone: bool) -> None:
    assert takes_away(before, after, NOW_MS) is gone
