"""What may be asked as a command: checked alike for the control API and the command line."""

from __future__ import annotations

import msgspec
import pytest

from pulse.domain.command_documents import cursor, fleet_document, instant, read_cursor
from pulse.domain.command_requests import Asked, CommandBounds, new_command, new_fleet
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.fleet import Filter, Fleet, Stage
from pulse.runtime.settings import Settings

BOUNDS = msgspec.convert(Settings(), CommandBounds, from_attributes=True)


def asked(**given: object) -> Asked:
    return Asked(**({"name": "reboot", "payload": {}} | given))  # type: ignore[arg-type]


def test_what_is_not_said_is_as_the_settings_have_it() -> None:
    new = new_command(asked(), tenant_id="t", device_id="d", ordered=True, bounds=BOUNDS)
    assert (new.ttl_ms, new.timeout_ms, new.payload, new.ordered) == (86_400_000, 300_000, b"{}", True)
    new = new_command(
        asked(ttl_s=1, timeout_s=2.5, payload=[1, None, {"a": 1.5}]),
        tenant_id="t", device_id="d", ordered=False, bounds=BOUNDS,
    )  # fmt: skip
    assert (new.ttl_ms, new.timeout_ms, new.payload) == (1000, 2500, b'[1,null,{"a":1.5}]')


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "a\n"}, "name"),
        ({"ttl_s": 0.999}, "ttl_s"),
        ({"ttl_s": float("nan")}, "ttl_s"),
        ({"ttl_s": 2_592_001}, "ttl_s"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"payload": {"a": ["\x00"]}}, "payload.a[0]"),
        ({"payload": 2**63}, "payload"),
        ({"payload": "x" * 8191}, "payload"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "a b"}, "idempotency_key"),
        ({"idempotency_key": "x" * 129}, "idempotency_key"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_path(given: dict[str, object], field: str) -> None:
    with pytest.raises(Refusal) as one:
        new_command(asked(**given), tenant_id="t", device_id="d", ordered=False, bounds=BOUNDS)
    with pytest.raises(Refusal) as many:
        new_fleet(asked(**given), tenant_id="t", wanted=Filter(all=True), bounds=BOUNDS)
    assert (one.value.field, one.value.reason) == (many.value.field, many.value.reason)
    assert one.value.field == field


def test_a_payload_as_deep_as_it_may_be_is_taken_and_no_deeper() -> None:
    payload: object = 1
    for _ in range(32):
        payload = [payload]
    assert new_command(asked(payload=payload), tenant_id="t", device_id="d", ordered=False, bounds=BOUNDS)
    for _ in range(2000):
        payload = [payload]
        with pytest.raises(LimitExceeded) as refused:
            new_command(asked(payload=payload), tenant_id="t", device_id="d", ordered=False, bounds=BOUNDS)
        assert (refused.value.reason, refused.value.limit) == (Reason.TOO_LARGE, "command_payload_depth_max")


def test_attributes_that_json_or_int64_cannot_hold_are_refused() -> None:
    for value in (2**63, "\x00"):
        with pytest.raises(Refusal) as refused:
            new_fleet(asked(), tenant_id="t", wanted=Filter(attributes={"site": value}), bounds=BOUNDS)
        assert refused.value.field == "filter.attributes.site"


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (Filter(), "filter"),
        (Filter(all=True, prefix="a"), "filter.all"),
        (Filter(attributes={"": 1}), "filter.attributes"),
        (Filter(attributes={"x" * 129: 1}), "filter.attributes"),
        (Filter(devices=("a.b",)), "filter.devices"),
        (Filter(prefix="a*"), "filter.prefix"),
    ],
)
def test_a_filter_that_the_store_could_not_read_again_is_refused(wanted: Filter, field: str) -> None:
    with pytest.raises(Refusal) as refused:
        new_fleet(asked(), tenant_id="t", wanted=wanted, bounds=BOUNDS)
    assert refused.value.field.startswith(field)


def test_a_cursor_is_read_as_it_was_told() -> None:
    for identifier in ("a", "a_b-c", "_"):
        assert read_cursor(cursor(1_700_000_000_000, identifier)) == (1_700_000_000_000, identifier)
    assert read_cursor(None) is None
    for text in ("", "1", "_a", "1_", "1_a.b", "-1_a", "9" * 16 + "_a", "1_a\n"):
        with pytest.raises(Refusal):
            read_cursor(text)


def test_a_fleet_is_told_as_json_has_it() -> None:
    fleet = Fleet(
        tenant_id="t", fleet_id="f", name="n", payload=b"[1]", filter=Filter(devices=("a",)), stage=Stage.EXPANDED,
        created_ms=1, expires_ms=2, timeout_ms=1500, created_by="me", devices=1, counts={},
    )  # fmt: skip
    told = fleet_document(fleet)
    assert (told["payload"], told["filter"], told["timeout_s"]) == ([1], {"devices": ["a"]}, 1.5)
    assert told["created_at"] == instant(1)
