"""Commands: a machine walks the table at random beside a naive book of what may happen."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pulse.domain.command import ANSWERS, FINAL, OPEN, TABLE, Event, State, after, read_answer
from pulse.domain.errors import Reason, Refusal


class Walk(RuleBasedStateMachine):
    """One command, anything that can happen to it in any order, and what is known of it by other means."""

    @initialize()
    def queue(self) -> None:
        self.state = State.QUEUED
        self.ended: State | None = None
        self.heard = False

    @rule(event=st.sampled_from(Event))
    def happen(self, event: Event) -> None:
        before, moved = self.state, after(self.state, event)
        self.state = moved or before
        if self.ended:
            assert moved is None, "an end is an end"
            return
        if moved and moved.final:
            self.ended = moved
        if event in {Event.SUCCEED, Event.FAIL, Event.REJECT, Event.CANCEL}:
            assert moved in FINAL, "while it is open, a device's last word counts, and so does a person's"
        if event is Event.EXPIRE:
            assert (moved is State.EXPIRED) is (not self.heard), "who was heard of has not expired"
        if event is Event.TIME_OUT:
            assert (moved is State.TIMED_OUT) is self.heard, "only who has begun can take too long"
        if event is Event.SEND and self.heard:
            assert moved is None, "what a device has acknowledged is not sent again"
        if event is Event.ACKNOWLEDGE:
            self.heard = True
            assert moved is State.ACKNOWLEDGED

    @invariant()
    def never_leaves_its_end(self) -> None:
        assert self.ended is None or self.state is self.ended
        assert self.state.final is (self.ended is not None)


TestWalk = Walk.TestCase


def test_every_state_can_be_reached_and_every_open_one_can_end() -> None:
    reached, edge = {State.QUEUED}, {State.QUEUED}
    while edge:
        edge = {to for state in edge for to in TABLE.get(state, {}).values()} - reached
        reached |= edge
    assert reached == set(State)
    assert set(OPEN) | FINAL == set(State)
    for state in OPEN:
        assert {after(state, Event.EXPIRE), after(state, Event.TIME_OUT)} & FINAL, "time alone ends it"


def test_an_answer_names_its_command_and_one_of_four_states() -> None:
    answer = read_answer(b'{"commandId":"c-1","state":"failed","error":"jammed","result":{"angle":3}}')
    assert (answer.command_id, answer.event, answer.error) == ("c-1", Event.FAIL, "jammed")
    assert bytes(answer.result) == b'{"angle":3}'  # type: ignore[arg-type]
    assert {read_answer(b'{"commandId":"c","state":"%b"}' % state.encode()).event for state in ANSWERS} == set(
        ANSWERS.values()
    )


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b"[]", ""),
        (b"{}", "commandId"),
        (b'{"commandId":"","state":"failed"}', "commandId"),
        (b'{"commandId":"c","state":"sent"}', "state"),
        (b'{"commandId":"c","state":7}', "state"),
        (b'{"commandId":"c","state":"failed","extra":1}', "extra"),
    ],
)
def test_what_is_no_answer_is_refused_by_its_path(payload: bytes, field: str) -> None:
    with pytest.raises(Refusal) as raised:
        read_answer(payload)
    assert (raised.value.reason, raised.value.field) == (Reason.INVALID_PAYLOAD, field)
