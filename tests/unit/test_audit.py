"""The audit's equation, against a naive count of single messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.audit import StreamFacts, audit
from pulse.domain.ledger import PositionSet, position

EPOCH = 3


def positions(sequences: set[int]) -> PositionSet:
    return PositionSet.of(position(EPOCH, seq) for seq in sequences)


def facts(last: int, *, removed_below: int = 1, between: set[int] | None = None, **more: int) -> StreamFacts:
    return StreamFacts(
        stream="TELEMETRY",
        epoch=EPOCH,
        first=1,
        last=last,
        removed_below=removed_below,
        removed_between=positions(between or set()),
        delivered=more.get("delivered", 0),
        in_hand_max=more.get("in_hand_max", 0),
    )


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, set[int], set[int], set[int]]:
    last = draw(st.integers(0, 40))
    some = st.sets(st.integers(1, max(1, last))) if last else st.just(set())
    settled = draw(some)
    dead = draw(st.sets(st.sampled_from(sorted(settled)))) if settled else set()
    return last, draw(st.integers(1, last + 1)), draw(some), settled, dead


@given(histories(), st.integers(0, 40), st.integers(0, 40))
def test_each_accepted_message_is_counted_in_exactly_one_place(
    history: tuple[int, int, set[int], set[int], set[int]], delivered: int, in_hand_max: int
) -> None:
    last, removed_below, between, settled, dead = history
    known = facts(last, removed_below=removed_below, between=between, delivered=delivered, in_hand_max=in_hand_max)
    result = audit(known, positions(settled), positions(dead))
    removed = {seq for seq in range(1, last + 1) if seq < removed_below or seq in between} - settled
    held = min(in_hand_max, len({seq for seq in removed if seq <= delivered}))
    assert result.accepted == last
    assert result.stored == len(settled - dead)
    assert result.dead == len(dead)
    assert result.expired == len(removed) - held
    assert result.in_flight == last - len(settled) - result.expired
    assert result.balanced


def test_an_empty_stream_balances() -> None:
    result = audit(facts(0), PositionSet(), PositionSet())
    assert result.balanced
    assert result.total == 0


def test_what_the_stream_removed_unprocessed_has_expired() -> None:
    result = audit(facts(10, removed_below=6), positions({1, 2}), PositionSet())
    assert (result.stored, result.expired, result.in_flight) == (2, 3, 5)


def test_a_removed_message_in_a_workers_hand_has_not_expired() -> None:
    result = audit(facts(10, removed_below=6, delivered=4, in_hand_max=9), positions({1, 2}), PositionSet())
    assert (result.expired, result.in_flight) == (1, 7)


def test_a_making_that_is_gone_has_lost_what_it_did_not_settle() -> None:
    gone = StreamFacts(
        stream="TELEMETRY",
        epoch=EPOCH,
        first=1,
        last=10,
        removed_below=0,
        removed_between=PositionSet(),
        delivered=0,
        in_hand_max=0,
        gone=True,
    )
    assert audit(gone, positions({1, 2}), PositionSet()).expired == 8


def test_a_ledger_that_settles_what_was_never_accepted_does_not_balance() -> None:
    assert not audit(facts(3), positions({1, 2, 3, 4}), PositionSet()).balanced
