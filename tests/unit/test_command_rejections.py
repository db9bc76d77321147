"""What a device hears of an answer that cannot be taken, and how long a gateway remembers it."""

from __future__ import annotations

from itertools import product

import msgspec
import pytest

from pulse.domain.command import ANSWERS, Event, State
from pulse.domain.command_rejections import contradiction, named_command, rejected, unknown_command
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.services import rejections
from pulse.services.rejections import Rejections

OVERTAKEN = {
    (state, event)
    for state, event in (
        (State.SUCCEEDED, Event.SUCCEED), (State.FAILED, Event.FAIL), (State.REJECTED, Event.REJECT),
        (State.SUCCEEDED, Event.ACKNOWLEDGE), (State.FAILED, Event.ACKNOWLEDGE), (State.REJECTED, Event.ACKNOWLEDGE),
    )
}  # fmt: skip
"""What an answer that came twice, or late, looks like."""


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_an_answer_is_rejected_where_the_command_has_ended_otherwise_and_never_for_coming_again(
    state: State, event: Event
) -> None:
    refusal = contradiction(state, event)
    expected = event in ANSWERS.values() and state.final and (state, event) not in OVERTAKEN
    assert (refusal is not None) is expected
    if refusal:
        assert (refusal.reason, str(state) in refusal.message) == (Reason.CONFLICT, True)


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (unknown_command("d1", "c1"), 404),
        (Refusal(Reason.CONFLICT, "over"), 409),
        (Refusal(Reason.INVALID_JSON, "no"), 400),
        (Refusal(Reason.INVALID_PAYLOAD, "no", field="state"), 422),
        (LimitExceeded(Reason.TOO_LARGE, "no", limit="body_bytes_max", value=1), 413),
        (Refusal(Reason.INVALID_ENCODING, "no"), 400),
    ],
)
def test_a_rejection_has_a_code_and_a_message_and_names_the_command(refusal: Refusal, code: int) -> None:
    said = rejected("acme", "d1", "c1", refusal, at_ms=7)
    assert said.full_topic == "tenant/acme/device/d1/commands/ack/rejected"
    assert said.kind == "commands", "the postman of commands takes it"
    message = f"{refusal.field}: {refusal.message}" if refusal.field else refusal.message
    assert msgspec.json.decode(said.body) == {"code": code, "message": message, "commandId": "c1", "timestamp": 7}


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (b'{"commandId":"c-1","state":7}', "c-1"),
        (b'{"commandId":"c 1"}', None),
        (b'{"commandId":7}', None),
        (b"[]", None),
        (b"{", None),
        (b"", None),
        (b"\xff", None),
        (b"[" * 5000, None),
    ],
)
def test_the_command_is_named_as_far_as_the_answer_can_be_read(payload: bytes, named: str | None) -> None:
    assert named_command(payload) == named
    said = rejected("acme", "d1", named, Refusal(Reason.INVALID_JSON, "no"), at_ms=0)
    assert ("commandId" in msgspec.json.decode(said.body)) is (named is not None)


def test_a_gateway_hands_out_a_rejection_once_to_its_device_and_forgets_it_after_a_while() -> None:
    now = [0.0]
    kept = Rejections(clock=lambda: now[0])
    kept.put(("acme", "d1"), b"1")
    now[0] = rejections.KEPT_S
    kept.put(("acme", "d1"), b"2")
    kept.put(("acme", "d2"), b"3")
    assert kept.take(("beta", "d1")) == []
    assert kept.take(("acme", "d1")) == [b"1", b"2"]
    assert kept.take(("acme", "d1")) == []
    now[0] = 2 * rejections.KEPT_S + 0.1
    assert kept.take(("acme", "d2")) == []
    assert len(kept) == 0


def test_what_a_gateway_remembers_is_bounded_and_the_oldest_makes_room() -> None:
    kept = Rejections()
    for number in range(rejections.EACH_MAX + 3):
        kept.put(("acme", "loud"), b"%d" % number)
    assert kept.take(("acme", "loud")) == [b"%d" % number for number in range(3, rejections.EACH_MAX + 3)]
    for number in range(rejections.DEVICES_MAX + 1):
        kept.put(("acme", f"d{number}"), b"x")
    assert len(kept) == rejections.DEVICES_MAX
    assert kept.take(("acme", "d0")) == []
    assert kept.take(("acme", "d1")) == [b"x"]
