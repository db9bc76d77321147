"""Lines: whoever takes one, loses it or dies, nothing is sent before what stands ahead of it has had its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.ledger import SEQUENCE_MAX, position
from pulse.domain.line import InLine, Line, LineKey, Patience, Turn

KEY = LineKey("acme", "r", "d1", 1)
JOBS = 5
TAKEN = 3


def job(sequence: int, attempts: int = 0) -> InLine:
    at = position(1, sequence)
    return InLine(tenant_id="acme", route_id="r", device_id="d1", position=at, body=b"", since_ms=0, attempts=attempts)


@dataclass
class World:
    """A line in a store that anybody may take at any time, as if every lease were over at once."""

    waiting: dict[int, int] = field(default_factory=lambda: {position(1, each + 1): 0 for each in range(JOBS)})
    claim: int = 0
    turns: dict[int, Turn] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    sent: list[int] = field(default_factory=list)

    def take(self, worker: int) -> None:
        self.claim += 1
        jobs = [job(at & SEQUENCE_MAX, attempts) for at, attempts in sorted(self.waiting.items())[:TAKEN]]
        self.turns[worker] = Turn(Line(KEY, self.claim, jobs))

    def send(self, worker: int, outcome: str) -> None:
        turn = self.turns.get(worker)
        if turn is None or (head := turn.head) is None:
            return
        if head.position not in self.sent:
            ahead = {at for at in (position(1, each + 1) for each in range(JOBS)) if at < head.position}
            assert ahead <= self.ended
        self.sent.append(head.position)
        if outcome == "waits":
            turn.waits(1.0, attempts=head.attempts + 1)
        else:
            self.ended.add(head.position)
            turn.passed()

    def settle(self, worker: int) -> None:
        turn = self.turns.pop(worker, None)
        if turn is None:
            return
        turned = turn.turned()
        for at in turned.gone:
            self.waiting.pop(at, None)
        if turned.head is not None and turned.head in self.waiting:
            self.waiting[turned.head] = max(self.waiting[turned.head], turned.attempts)

    def die(self, worker: int) -> None:
        self.turns.pop(worker, None)


WORKERS = st.integers(0, 2)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["take", "settle", "die"]), WORKERS),
        st.tuples(st.just("send"), WORKERS, st.sampled_from(["delivered", "dead", "waits"])),
    ),
    max_size=60,
)


@given(STEPS)
def test_nothing_is_sent_first_before_all_ahead_of_it_have_their_end(steps: list[tuple[str, int, str]]) -> None:
    world = World()
    for step, *arguments in steps:
        getattr(world, step)(*arguments)
    while world.waiting:  # whoever comes last sees it through
        world.take(9)
        while world.turns[9].head is not None:
            world.send(9, "delivered")
        world.settle(9)
    assert len(world.ended) == JOBS


def test_a_head_that_waits_keeps_its_place_and_holds_the_rest() -> None:
    turn = Turn(Line(KEY, 7, [job(1), job(2), job(3)]))
    turn.passed()
    turn.waits(12.5, attempts=2)
    assert turn.head is None
    turned = turn.turned()
    assert (turned.claim, turned.gone, turned.due_s) == (7, [position(1, 1)], 12.5)
    assert (turned.head, turned.attempts) == (position(1, 2), 2)


def test_a_line_that_does_not_wait_is_due_at_once() -> None:
    turn = Turn(Line(KEY, 1, [job(1)]))
    assert turn.turned().due_s == 0.0
    turn.passed()
    assert turn.head is None
    assert turn.turned().due_s == 0.0


def test_what_is_not_routed_yet_is_waited_for() -> None:
    patience = Patience(60.0)
    assert patience.upto(1, 0, unacked=1, now_s=0.0) == position(1, 1)
    assert patience.upto(1, 41, unacked=1, now_s=1.0) == position(1, 42)


def test_a_floor_that_stands_still_is_waited_for_once() -> None:
    patience = Patience(60.0)
    for now_s in range(60):
        assert patience.upto(1, 5, unacked=1, now_s=now_s) == position(1, 6)
    assert patience.upto(1, 5, unacked=1, now_s=60.0) == position(1, SEQUENCE_MAX)
    assert patience.upto(1, 6, unacked=1, now_s=61.0) == position(1, 7)


def test_a_stream_in_which_nothing_came_uses_up_no_patience() -> None:
    patience = Patience(60.0)
    for now_s in range(100):
        patience.upto(1, 5, unacked=0, now_s=now_s)
    assert patience.upto(1, 5, unacked=2, now_s=100.0) == position(1, 6)


def test_time_in_which_nobody_looked_uses_up_no_patience() -> None:
    patience = Patience(60.0)
    patience.upto(1, 5, unacked=1, now_s=0.0)
    assert patience.upto(1, 5, unacked=1, now_s=100.0) == position(1, 6)
