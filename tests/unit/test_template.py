"""Templates: what is rendered is JSON, says what the message said, and is bounded; a topic never leaves its tenant."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.identity import is_id
from pulse.domain.route_topic import HOPS_MAX, LEVELS_MAX, next_hop, read_hops, read_topic_template
from pulse.domain.routed import MISSING, RoutedMessage, read_path
from pulse.domain.subjects import MessageType
from pulse.domain.template import DEPTH_MAX, PLACES_MAX, TEMPLATE_BYTES_MAX, read_template
from pulse.domain.topics import parse_topic

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), children, max_size=4)
    ),
    max_leaves=12,
)


def message(payload: dict[str, Any], *, tenant_id: str = "acme", device_id: str = "t-1") -> RoutedMessage:
    return RoutedMessage(
        tenant_id=tenant_id,
        device_id=device_id,
        message_type=MessageType.TELEMETRY,
        source="mqtt",
        ts_ms=1_790_000_000_000,
        payload=payload,
        attributes={"site": "roof"},
    )


SAID = message({"metrics": {"temp": 21.5, "door": 'a "b"\n', "temp.inside": 3, "ok": True}, "list": [1, {"x": None}]})


def rendered(text: str, said: RoutedMessage = SAID) -> Any:
    return msgspec.json.decode(read_template(text).render(said, bytes_max=100_000))


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{}", {}),
        ("[]", []),
        ('"text"', "text"),
        ("17", 17),
        ('"${metrics.temp}"', 21.5),
        ('"${ metrics.temp }"', 21.5),
        ('"${metrics.ok}"', True),
        ('"at ${metrics.temp} C"', "at 21.5 C"),
        ('"${metrics.temp}${metrics.ok}"', "21.5true"),
        ('{"a": ["${device.id}", "${tenant}", "${msg_type}", "${source}", "${ts}"]}',
         {"a": ["t-1", "acme", "telemetry", "mqtt", 1_790_000_000_000]}),
        ('"${device.attributes.site}"', "roof"),
        ('"${metrics[\\"temp.inside\\"]}"', 3),
        ('"${payload.list[1]}"', {"x": None}),
        ('"${payload.list[1].x}"', None),
        ('"x${payload.list[1].x}"', "xnull"),
        ('"${payload.list[7]}"', None),
        ('"x${payload.nope.deeper}y"', "xy"),
        ('"${metrics.temp.deeper}"', None),
        ('"<${metrics.door}>"', '<a "b"\n>'),
        ('"${payload.list}!"', '[1,{"x":null}]!'),
        ('"$${metrics.temp}"', "${metrics.temp}"),
        ('"$$${metrics.temp}"', "$${metrics.temp}"),
        ('"$ { } {metrics} $1"', "$ { } {metrics} $1"),
        ('{"a":{"b":[{"c":"${ts}"}],"d":{}}}', {"a": {"b": [{"c": 1_790_000_000_000}], "d": {}}}),
    ],
)  # fmt: skip
def test_a_template_is_rendered(template: str, wanted: object) -> None:
    assert rendered(template) == wanted


@pytest.mark.parametrize(
    ("template", "field"),
    [
        ("", "template"),
        ("{", "template"),
        ("${metrics.temp}", "template"),
        ('"${"', "template"),
        ('"${}"', "template"),
        ('"${metrics.temp"', "template"),
        ('"${nobody.temp}"', "template"),
        ('"${metrics..a}"', "template"),
        ('"${metrics.a b}"', "template"),
        ('"${metrics[}"', "template"),
        ('"${metrics[-1]}"', "template"),
        ('"${a${tenant}}"', "template"),
        ('"${__class__}"', "template"),
        ('"${metrics.a | upper}"', "template"),
        ('{"a": {"b": ["x", "${nobody}"]}}', "template.a.b[1]"),
        ('{"${tenant}": 1}', "template.${tenant}"),
        ('{"a": 1, "a": 2}', "template"),
        ('"\ud800"', "template"),
    ],
)
def test_what_is_no_template_is_refused_with_its_path(template: str, field: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_template(template)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.field == field


@pytest.mark.parametrize(
    "template",
    [
        '"' + "a" * TEMPLATE_BYTES_MAX + '"',
        '"' + "${tenant}-" * (PLACES_MAX + 1) + '"',
        "[" * (DEPTH_MAX + 2) + "]" * (DEPTH_MAX + 2),
    ],
)
def test_a_template_has_bounds(template: str) -> None:
    with pytest.raises(LimitExceeded):
        read_template(template)


def test_what_is_rendered_is_bounded() -> None:
    template = read_template('"' + "${payload}" * PLACES_MAX + '"')
    said = message({"s": "x" * 1000})
    assert len(template.render(said, bytes_max=100_000)) > 64_000
    with pytest.raises(LimitExceeded) as caught:
        template.render(said, bytes_max=64_000)
    assert caught.value.reason is Reason.TOO_LARGE


@given(json_values, st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_whatever_a_device_says_the_result_is_json_and_says_it(value: Any, text: str) -> None:
    said = message({"value": value, "text": text})
    template = '{"whole": "${payload.value}", "text": "<${payload.text}>", "all": "${payload}"}'
    assert rendered(template, said) == {"whole": value, "text": f"<{text}>", "all": {"value": value, "text": text}}


@given(json_values)
def test_a_template_without_places_is_what_it_is(document: Any) -> None:
    text = msgspec.json.encode(document).decode()
    if "${" not in text:
        assert rendered(text) == document


@given(st.text(max_size=40))
def test_any_text_is_a_template_or_is_refused(text: str) -> None:
    for template in (text, msgspec.json.encode(text.encode("utf-8", "replace").decode()).decode()):
        try:
            read = read_template(template)
        except Refusal:
            continue
        msgspec.json.decode(read.render(SAID, bytes_max=10_000))


@given(st.text(max_size=40))
def test_any_text_is_a_path_or_is_refused(text: str) -> None:
    for path in (text, f"metrics{text}", f'payload["{text}"]'):
        try:
            found = SAID.find(read_path(path, field="f"))
        except Refusal:
            continue
        assert found is MISSING or msgspec.json.encode(found)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("alerts", "tenant/acme/route/alerts"),
        ("alerts/${device.id}/${metrics.level}", "tenant/acme/route/alerts/t-1/high"),
        ("v${metrics.n}-${tenant}", "tenant/acme/route/v7-acme"),
    ],
)
def test_a_topic_is_rendered(template: str, wanted: str) -> None:
    assert read_topic_template(template).topic(message({"metrics": {"level": "high", "n": 7}})) == wanted


@pytest.mark.parametrize(
    "template",
    ["", "/", "a//b", "/a", "a/", "a/#", "+/a", "$SYS/a", "a b", "a.b", "é", "..", "../b", "${nobody}", "a/${",
     "${tenant}/", "a\x00", "a/" * LEVELS_MAX + "a", "a" * 257, "$${a}"],
)  # fmt: skip
def test_what_is_no_topic_template_is_refused(template: str) -> None:
    with pytest.raises(Refusal):
        read_topic_template(template)


@given(json_values, st.sampled_from(["${payload.v}", "x/${payload.v}", "${payload.v}${payload.v}/y", "${payload}"]))
def test_no_value_takes_a_topic_out_of_its_tenant_nor_to_where_devices_publish(value: Any, template: str) -> None:
    try:
        topic = read_topic_template(template).topic(message({"v": value}))
    except Refusal:
        return
    first, second, third, *levels = topic.split("/")
    assert (first, second, third) == ("tenant", "acme", "route")
    assert levels
    assert all(map(is_id, levels))
    with pytest.raises(Refusal):
        parse_topic(topic)


@pytest.mark.parametrize("value", ["", "a/b", "../x", "+", "#", "$SYS", "a b", "ä", "x" * 65, None, [1], {"a": 1}, 1.5])
def test_a_value_that_is_no_level_is_refused(value: object) -> None:
    with pytest.raises(Refusal, match="level 2 would be") as caught:
        read_topic_template("a/${payload.v}").topic(message({"v": value}))
    assert caught.value.reason is Reason.INVALID_TOPIC


def test_hops_are_counted_and_end() -> None:
    hops = 0
    for _ in range(HOPS_MAX):
        hops = next_hop(hops)
    with pytest.raises(LimitExceeded):
        next_hop(hops)


@pytest.mark.parametrize(
    ("text", "hops"),
    [("", 0), ("0", 0), ("2", 2), ("99", HOPS_MAX), ("-1", HOPS_MAX), ("x", HOPS_MAX), ("٢", HOPS_MAX)],
)
def test_hops_that_were_tampered_with_are_the_end(text: str, hops: int) -> None:
    assert read_hops(text) == hops
