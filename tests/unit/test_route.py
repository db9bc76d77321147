"""Routes: checked with the path of what is at fault, found by an index, and their jobs carry no secret."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.envelope import wrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.limits import Rate
from pulse.domain.route import (
    DEVICES_NAMED_MAX,
    DeviceFilter,
    Match,
    Republish,
    Route,
    Webhook,
    check_route,
    decode_route,
    encode_route,
    encode_route_for_edge,
    make_job,
    message_id,
    read_job,
)
from pulse.domain.route_index import Candidate, RouteIndex, wanting
from pulse.domain.routed import RoutedMessage
from pulse.domain.subjects import MessageType

URL = "https://hooks.example.com/pulse"
HOOK = Webhook(url=URL)


def route(route_id: str = "r-1", **changes: Any) -> Route:
    return Route(**{"tenant_id": "acme", "route_id": route_id, "destination": HOOK, **changes})


def filtered(**devices: Any) -> Match:
    return Match(devices=DeviceFilter(**devices))


GOOD = [
    route(),
    route(destination=Republish(topic="alerts/${device.id}"), template='{"t": "${metrics.temp}"}'),
    route(match=Match(message_types=(MessageType.HEARTBEAT, MessageType.SHADOW), expression="metrics.temp > 1.0")),
    route(match=filtered(ids=("t-1", "t-2"), prefix="t-", attributes={"site": "roof", "n": 1, "ok": True, "x": 1.5})),
    route(name="hot", enabled=False, rate=Rate(10.0, 5), ordered=True, revision=7),
    route(destination=Webhook(url=URL, headers={"Authorization": "Bearer x", "X-Key": "1"}, timeout_s=3.0)),
]


@pytest.mark.parametrize("good", GOOD)
def test_a_good_route_passes_and_is_the_same_after_its_json(good: Route) -> None:
    assert check_route(good) is good
    assert decode_route(encode_route(good)) == good


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (route(tenant_id="a b"), "tenant_id"),
        (route("r.1"), "route_id"),
        (route(name="x\x00"), "name"),
        (route(match=Match(message_types=())), "match.message_types"),
        (route(match=Match(message_types=(MessageType.TELEMETRY,) * 2)), "match.message_types"),
        (route(match=Match(message_types=(MessageType.SHADOW_GET,))), "match.message_types[0]"),
        (
            route(match=Match(message_types=(MessageType.TELEMETRY, MessageType.COMMANDS_SENT))),
            "match.message_types[1]",
        ),
        (route(match=filtered(ids=("t-1", "t/2"))), "match.devices.ids[1]"),
        (route(match=filtered(ids=("t",) * (DEVICES_NAMED_MAX + 1))), "match.devices.ids"),
        (route(match=filtered(prefix="t*")), "match.devices.prefix"),
        (route(match=filtered(attributes={"site": float("nan")})), "match.devices.attributes.site"),
        (route(match=Match(expression="a" * 1025)), "match.expression"),
        (route(template="{"), "template"),
        (route(template='{"a": "${nobody}"}'), "template.a"),
        (route(destination=Webhook(url="http://127.0.0.1/")), "destination.url"),
        (route(destination=Webhook(url=URL, headers={"Host": "x"})), "destination.headers"),
        (route(destination=Webhook(url=URL, headers={"webhook-id": "x"})), "destination.headers"),
        (route(destination=Webhook(url=URL, headers={"Content-Length": "1"})), "destination.headers"),
        (route(destination=Webhook(url=URL, headers={"a b": "x"})), "destination.headers"),
        (route(destination=Webhook(url=URL, headers={"X-A": "1", "x-a": "2"})), "destination.headers"),
        (route(destination=Webhook(url=URL, headers={f"X-{n}": "" for n in range(17)})), "destination.headers"),
        (route(destination=Webhook(url=URL, headers={"X-A": "a\r\nHost: b"})), "destination.headers.X-A"),
        (route(destination=Webhook(url=URL, headers={"X-A": "ä"})), "destination.headers.X-A"),
        (route(destination=Republish(topic="a/#")), "destination.topic"),
        (route(rate=Rate(1e9, 1)), "rate.per_s"),
    ],
)
def test_what_is_wrong_is_named(bad: Route, field: str) -> None:
    with pytest.raises(Refusal) as caught:
        check_route(bad)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b"{}", "tenant_id"),
        (b'{"tenant_id":"a","route_id":"r","destination":{"kind":"smtp"}}', "destination"),
        (b'{"tenant_id":"a","route_id":"r","destination":{"kind":"webhook","url":"u","timeout_s":90}}', "destination"),
        (b'{"tenant_id":"a","route_id":"r","destination":{"kind":"webhook","url":"u","secret":"x"}}', "destination"),
    ],
)
def test_what_is_no_route_is_refused_with_its_path(text: bytes, field: str) -> None:
    with pytest.raises(Refusal) as caught:
        decode_route(text)
    assert caught.value.field.startswith(field)


def test_headers_of_a_webhook_stay_away_from_the_edge() -> None:
    secret = route(destination=Webhook(url=URL, headers={"Authorization": "Bearer geheim"}))
    assert b"geheim" not in encode_route_for_edge(secret)
    assert decode_route(encode_route_for_edge(secret)).match == secret.match


PAYLOAD = b'{"metrics":{"temp":21.50},"seq":1e2}'


def envelope(tenant_id: str = "acme", payload: bytes = PAYLOAD) -> bytes:
    return wrap(
        tenant_id=tenant_id,
        device_id="t-1",
        message_type=MessageType.TELEMETRY,
        received_ms=1_790_000_000_000,
        source="mqtt",
        payload=payload,
    )


def test_a_job_holds_the_device_s_own_bytes_and_whose_it_is() -> None:
    job = read_job("routes.acme", make_job(envelope(), route_id="r-1", position=2**40 + 7, hops=1))
    assert bytes(job.payload) == PAYLOAD
    assert (job.tenant_id, job.device_id, job.msg_type, job.hops) == ("acme", "t-1", "telemetry", 1)
    assert job.message_id == message_id(2**40 + 7, "r-1") == "1099511627783:r-1"


@pytest.mark.parametrize(
    ("subject", "body"),
    [
        ("routes.evil", make_job(envelope(), route_id="r", position=1)),
        ("routes.acme", envelope()),
        ("routes.acme", make_job(envelope(), route_id="r.x", position=1)),
        ("routes.acme", make_job(envelope(), route_id="r", position=0)),
        ("routes.acme", make_job(envelope(), route_id="r", position=1, hops=-1)),
        ("routes.acme", b'{"test":1}'),
        ("routes.acme", b"\xff"),
        ("routes.acme", b"[" * 100_000),
        ("routes.a b", make_job(envelope("a b"), route_id="r", position=1)),
    ],
)
def test_what_is_no_job_is_refused(subject: str, body: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        read_job(subject, body)
    assert caught.value.reason is Reason.INVALID_ENVELOPE


def test_a_payload_cannot_pass_for_the_job_around_it() -> None:
    payload = b'{"route_id":"other","position":9,"a":"}\\",\\"route_id\\":\\"x"}'
    assert read_job("routes.acme", make_job(envelope(payload=payload), route_id="r", position=1)).route_id == "r"


def said(device_id: str = "t-1", attributes: dict[str, Any] | None = None, **metrics: Any) -> RoutedMessage:
    return RoutedMessage(
        tenant_id="acme",
        device_id=device_id,
        message_type=MessageType.TELEMETRY,
        source="http",
        ts_ms=1,
        payload={"metrics": metrics},
        attributes=attributes or {},
    )


def near(routes: list[Route], device_id: str, attributes: dict[str, Any] | None = None) -> list[str]:
    index = RouteIndex()
    index.replace("acme", [Candidate(each, None) for each in routes])
    found = index.near("acme", MessageType.TELEMETRY, device_id, attributes or {})
    return sorted(each.route.route_id for each in found)


FILTERS = [
    route("all"),
    route("id", match=filtered(ids=("t-1", "t-1", "u-1"))),
    route("prefix", match=filtered(prefix="t-")),
    route("longer", match=filtered(prefix="t-1")),
    route("both", match=filtered(ids=("t-1", "u-1"), prefix="u")),
    route("site", match=filtered(attributes={"site": "roof", "floor": 3})),
    route("true", match=filtered(attributes={"on": True})),
    route("one", match=filtered(attributes={"on": 1})),
    route("off", enabled=False),
    route("heartbeat", match=Match(message_types=(MessageType.HEARTBEAT,))),
]


@pytest.mark.parametrize(
    ("device_id", "attributes", "wanted"),
    [
        ("t-1", {}, ["all", "id", "longer", "prefix"]),
        ("t-2", {}, ["all", "prefix"]),
        ("u-1", {}, ["all", "both", "id"]),
        ("x", {"site": "roof", "floor": 3}, ["all", "site"]),
        ("x", {"site": "roof"}, ["all"]),
        ("x", {"site": "roof", "floor": "3"}, ["all"]),
        ("x", {"on": True}, ["all", "true"]),
        ("x", {"on": 1}, ["all", "one"]),
        ("x", {"on": [1], "site": None}, ["all"]),
    ],
)
def test_the_index_finds_the_routes_of_a_device(device_id: str, attributes: dict[str, Any], wanted: list[str]) -> None:
    assert near(FILTERS, device_id, attributes) == wanted


ids = st.text("ab", min_size=1, max_size=3)
filters = st.builds(
    DeviceFilter,
    ids=st.lists(ids, max_size=2).map(tuple),
    prefix=st.text("ab", max_size=2),
    attributes=st.dictionaries(st.sampled_from("xy"), st.sampled_from([1, True, 0, False, "a", 1.0]), max_size=2),
)


@given(st.lists(filters, max_size=8), ids, st.dictionaries(st.sampled_from("xy"), st.sampled_from([1, True, 0, "a"])))
def test_the_index_finds_what_a_look_at_each_route_finds(
    devices: list[DeviceFilter], device_id: str, attributes: dict[str, Any]
) -> None:
    def holds(each: DeviceFilter) -> bool:
        return (
            (not each.ids or device_id in each.ids)
            and device_id.startswith(each.prefix)
            and all(
                name in attributes
                and attributes[name] == value
                and isinstance(attributes[name], bool) is isinstance(value, bool)
                for name, value in each.attributes.items()
            )
        )

    routes = [route(f"r-{number}", match=Match(devices=each)) for number, each in enumerate(devices)]
    assert near(routes, device_id, attributes) == sorted(each.route_id for each in routes if holds(each.match.devices))


def test_a_tenant_without_routes_concerns_nobody_and_replaced_routes_are_gone() -> None:
    index = RouteIndex()
    assert not index.concerns("acme", MessageType.TELEMETRY)
    index.replace("acme", [Candidate(route(), None)])
    assert index.concerns("acme", MessageType.TELEMETRY)
    assert not index.concerns("acme", MessageType.HEARTBEAT)
    assert not index.concerns("other", MessageType.TELEMETRY)
    index.replace("acme", [Candidate(route(enabled=False), None)])
    assert not index.concerns("acme", MessageType.TELEMETRY)
    assert len(index) == 0


def test_a_message_is_handed_over_once_and_an_expression_that_many_routes_have_asked_once() -> None:
    scoped: list[RoutedMessage] = []
    asked: list[str] = []

    def scopes(message: RoutedMessage) -> object:
        scoped.append(message)
        return message

    def candidate(route_id: str, text: str) -> Candidate:
        def predicate(_: object) -> bool:
            asked.append(text)
            return text == "yes"

        return Candidate(route(route_id, match=Match(expression=text)), predicate)

    candidates = [candidate("b", "yes"), candidate("a", "yes"), candidate("c", "no"), Candidate(route("d"), None)]
    assert [each.route_id for each in wanting(candidates, said(), scopes)] == ["a", "b", "d"]
    assert len(scoped) == 1
    assert asked == ["yes", "no"]
    assert wanting([Candidate(route("d"), None)], said(), scopes) == [route("d")]
    assert len(scoped) == 1, "nobody asked"


def test_a_route_s_json_has_no_more_than_it_says() -> None:
    assert msgspec.json.decode(encode_route(route()))["destination"] == {
        "kind": "webhook",
        "url": URL,
        "headers": {},
        "timeout_s": 10.0,
    }
