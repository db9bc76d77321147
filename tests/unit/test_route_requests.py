"""Changes to routes: merge patches, what a replacement keeps, and values of headers that never go elsewhere."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pulse.domain.errors import LimitExceeded, Reason, Refusal, VersionConflict
from pulse.domain.route import Route, Webhook
from pulse.domain.route_requests import check_revision, masked, new_route, patched, replaced
from pulse.domain.webhook_url import PUBLIC

URL = "https://hooks.example.com/a"
ASKED: dict[str, Any] = {
    "name": "hot",
    "match": {"devices": {"attributes": {"site": "north", "floor": 2}}, "expression": "metrics.t > 1.0"},
    "destination": {"kind": "webhook", "url": URL, "headers": {"X-Key": "k", "X-Site": "s"}},
    "template": "{}",
    "rate": {"per_s": 5.0, "burst": 10},
}


def made(**more: Any) -> Route:
    return new_route({**ASKED, **more}, tenant_id="acme", route_id="r-1", allowed=PUBLIC)


def headers(route: Route) -> dict[str, str]:
    assert isinstance(route.destination, Webhook)
    return dict(route.destination.headers)


def test_a_patch_changes_what_it_names_and_null_removes() -> None:
    after = patched(made(), {"match": {"devices": {"attributes": {"floor": None}}}, "rate": None}, allowed=PUBLIC)
    assert after.match.devices.attributes == {"site": "north"}
    assert (after.match.expression, after.rate, after.template, after.name) == ("metrics.t > 1.0", None, "{}", "hot")
    assert headers(after) == {"X-Key": "k", "X-Site": "s"}
    emptied = patched(made(), {"match": None, "name": None}, allowed=PUBLIC)
    assert (emptied.match.expression, emptied.name) == ("", "")


def test_a_replacement_keeps_nothing_but_values_of_headers() -> None:
    to = {"kind": "webhook", "url": f"{URL}/b", "headers": {"X-Site": None, "X-New": "n"}}
    after = replaced(made(), {"destination": to}, allowed=PUBLIC)
    assert headers(after) == {"X-Key": "k", "X-New": "n"}
    assert (after.name, after.match.expression, after.template, after.rate) == ("", "", None, None)


@pytest.mark.parametrize(
    "url", ["https://evil.example.com/", "http://hooks.example.com/a", "https://hooks.example.com:444/"]
)
def test_values_of_headers_do_not_go_to_another_destination(url: str) -> None:
    for change in (patched, replaced):
        with pytest.raises(Refusal) as raised:
            change(made(), {"destination": {"kind": "webhook", "url": url}}, allowed=PUBLIC)
        assert raised.value.field in ("destination.headers.X-Key", "destination.url")
    again = {"X-Key": "another", "X-Site": "other"}
    if "444" not in url:
        assert headers(patched(made(), {"destination": {"url": url, "headers": again}}, allowed=PUBLIC)) == again


def test_a_destination_of_another_kind_is_taken_whole() -> None:
    after = patched(made(), {"destination": {"kind": "mqtt", "topic": "a"}}, allowed=PUBLIC)
    assert msgspec.to_builtins(after.destination) == {"kind": "mqtt", "topic": "a"}
    with pytest.raises(Refusal, match="topic"):
        patched(made(), {"destination": {"kind": "mqtt"}}, allowed=PUBLIC)


def test_what_is_at_fault_is_named_by_its_path() -> None:
    for wrong, field in (
        ({"route_id": "x"}, "route_id"),
        ({"revision": 7}, "revision"),
        ({"match": {"devices": {"ids": [1]}}}, "match.devices.ids[0]"),
        ({"destination": {"url": "ftp://a"}}, "destination.url"),
        ({"destination": "x"}, "destination"),
        ({"match": {"devices": {"attributes": {"a": {"b": 1}}}}}, "match.devices.attributes[...]"),
    ):
        with pytest.raises(Refusal) as raised:
            patched(made(), wrong, allowed=PUBLIC)
        assert (raised.value.reason, raised.value.field) == (Reason.INVALID_REQUEST, field), wrong


def test_what_is_too_long_is_at_fault_and_not_the_request() -> None:
    with pytest.raises(LimitExceeded) as raised:
        made(match={"expression": "x" * 2000})
    assert (raised.value.reason, raised.value.limit) == (Reason.INVALID_REQUEST, "route_expression_length_max")


def test_a_revision_is_compared_where_one_is_expected() -> None:
    check_revision(made(), None)
    check_revision(made(), 1)
    with pytest.raises(VersionConflict, match="the route is at version 1"):
        check_revision(made(), 2)


def test_the_log_of_changes_has_no_value_of_a_header() -> None:
    asked = {"destination": {"url": URL, "headers": {"X-Key": "k", "X-Old": None}}, "name": "n"}
    assert masked(asked) == {
        "destination": {"url": URL, "headers": {"X-Key": "********", "X-Old": None}}, "name": "n",
    }  # fmt: skip
    for plain in ({"name": "n"}, {"destination": None}, {"destination": {"headers": 5}}):
        assert masked(plain) == plain
