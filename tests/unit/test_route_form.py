"""The editor's form of a route: what it asks for is the route again, and a refusal finds its field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pulse.domain.errors import Reason, Refusal
from pulse.domain.limits import Rate
from pulse.domain.route import DeviceFilter, Match, Republish, Route, Webhook
from pulse.domain.route_requests import new_route, replaced
from pulse.domain.subjects import MessageType
from pulse.domain.webhook_url import PUBLIC
from pulse.ui.route_form import LABELS, NEW, asked_of, field_of, values_of_route

PLAIN = Route(tenant_id="acme", route_id="hot", destination=Webhook(url="https://hooks.test/pulse"))
FULL = msgspec.structs.replace(
    PLAIN,
    name="Too hot",
    match=Match(
        message_types=(MessageType.TELEMETRY, MessageType.COMMANDS_ACK),
        devices=DeviceFilter(
            ids=("a", "b"), prefix="boiler-", attributes={"site": "a=b", "floor": 3, "height": 2.5, "old": True}
        ),
        expression="metrics.temp > 80.0",
    ),
    template='{"t": "${metrics.temp}"}',
    rate=Rate(2.5, 10),
)


@pytest.mark.parametrize(
    "route",
    [
        PLAIN,
        FULL,
        msgspec.structs.replace(FULL, destination=Republish(topic="alerts/${device.id}"), enabled=False),
        msgspec.structs.replace(PLAIN, rate=Rate(0, 1)),
    ],
)
def test_a_form_that_nobody_touched_asks_for_the_route_that_there_is(route: Route) -> None:
    asked = asked_of(values_of_route(route))
    assert new_route(asked, tenant_id="acme", route_id="hot", allowed=PUBLIC) == route
    assert replaced(route, asked, allowed=PUBLIC) == route


def test_a_new_form_asks_for_telemetry_and_is_enabled() -> None:
    asked = asked_of({**NEW, "url": "https://hooks.test/pulse"})
    assert new_route(asked, tenant_id="acme", route_id="hot", allowed=PUBLIC) == PLAIN


def test_headers_that_are_removed_are_null_and_what_is_typed_is_given() -> None:
    asked = asked_of({**NEW, "url": "https://h.test/", "headers": "A: 1: 2\n\n B:3"}, removed=["C"])
    assert asked["destination"]["headers"] == {"A": "1: 2", "B": "3", "C": None}


def test_a_rate_without_a_burst_lets_a_second_of_it_through_at_once() -> None:
    assert asked_of({**NEW, "per_s": "2.5"})["rate"] == {"per_s": 2.5, "burst": 3}
    assert asked_of({**NEW, "per_s": "0.1"})["rate"] == {"per_s": 0.1, "burst": 1}


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("match.message_types[1]", "types"),
        ("match.devices.ids[3]", "devices"),
        ("match.devices.attributes.site", "attributes"),
        ("destination.headers.Authorization", "headers"),
        ("rate.per_s", "per_s"),
        ("rate.burst", "burst"),
        ("template.a[0]", "template"),
        ("template", "template"),
        ("name", "name"),
        ("version", ""),
        ("", ""),
    ],
)
def test_a_refusal_is_shown_at_its_field(path: str, field: str) -> None:
    assert field_of(Refusal(Reason.INVALID_REQUEST, "no", field=path)) == field
    assert field in {*LABELS, ""}


@pytest.mark.parametrize(
    "wrong",
    [{"attributes": "a"}, {"attributes": "=b"}, {"attributes": "a:=b"}, {"attributes": "a:=null"}, {"headers": "A"},
     {"per_s": "x"}, {"per_s": "inf"}, {"per_s": "1", "burst": "²"}, {"timeout_s": "x"}],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_with_its_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refused:
        asked_of({**NEW, **wrong})
    assert field_of(refused.value) in {*wrong}
