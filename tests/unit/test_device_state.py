"""A state is what all words say together, in whatever order and company they come, and however often."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain import device_state
from pulse.domain.device_state import DeviceState, Value, Word, needed, outdates, state_of
from pulse.domain.presence import Presence, PresenceAfter
from pulse.domain.settlement import Row, SignOfLife


def row(position: int, *, seen_us: int = 0, ts_us: int = 0, **metrics: int) -> Row:
    return Row(position, ts_us, "t", "d", None, None, msgspec.json.encode(metrics), seen_us, tuple(metrics))


@st.composite
def words(draw: st.DrawFn) -> list[Word]:
    """Of one device, each position once; few times and names, so that they meet."""
    times = st.integers(1, 6)
    said: list[Word] = []
    for position in range(1, draw(st.integers(1, 12)) + 1):
        names = draw(st.lists(st.sampled_from("abc"), unique=True, max_size=3))
        if names:
            metrics = {name: position * 10 + at for at, name in enumerate(names)}
            said.append(row(position, seen_us=draw(times), ts_us=draw(times), **metrics))
        else:
            said.append(SignOfLife(position, "t", "d", draw(times)))
    return said


def naive(said: list[Word]) -> DeviceState:
    """One metric at a time, as the definition says."""
    latest: dict[str, Value] = {}
    for word in said:
        for name, value in msgspec.json.decode(word.metrics).items():
            told = Value(value, word.ts_us, word.position)
            if name not in latest or (told.ts_us, told.position) > (latest[name].ts_us, latest[name].position):
                latest[name] = told
    return DeviceState(max(word.seen_us for word in said), latest)


@given(words(), st.randoms())
def test_order_and_repetition_change_nothing(said: list[Word], chance: random.Random) -> None:
    heard = [*said, *chance.choices(said, k=3)]
    chance.shuffle(heard)
    assert state_of(heard) == naive(said)


@given(words(), st.randoms())
def test_the_words_that_are_needed_say_all(said: list[Word], chance: random.Random) -> None:
    heard = [*said, *chance.choices(said, k=3)]
    kept = needed(heard)
    assert state_of(kept) == naive(said)
    assert len({word.position for word in kept}) == len(kept) <= 4, "one a name, and who was heard last"


@given(words())
def test_a_word_that_outdates_another_says_all_of_it(said: list[Word]) -> None:
    for word in said:
        for other in said:
            if outdates(word, other):
                assert naive([word, other]) == naive([word])
                assert needed([other, word]) == [word]


def test_the_next_message_of_a_device_outdates_the_last() -> None:
    first, then = row(1, seen_us=5, ts_us=5, a=1, b=2), row(2, seen_us=6, ts_us=6, a=3, b=4)
    assert outdates(then, first)
    assert not outdates(first, then)
    assert not outdates(row(2, seen_us=6, ts_us=6, a=3), first), "b was said by the first alone"
    assert not outdates(row(2, seen_us=6, ts_us=4, a=3, b=4), first), "a backlog"
    assert not outdates(row(2, seen_us=4, ts_us=6, a=3, b=4), first), "the first was heard later"


@given(words())
def test_of_too_many_names_the_last_said_are_kept(said: list[Word]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(device_state, "METRICS_MAX", 2)
        kept = state_of(said).latest
    by_age = sorted(
        naive(said).latest.items(), key=lambda item: (item[1].ts_us, item[1].position, item[0]), reverse=True
    )
    assert kept == dict(by_age[:2])


@pytest.mark.parametrize(
    ("silent_s", "expected"),
    [
        (None, "offline"),
        (-5.0, "online"),
        (0.0, "online"),
        (9.9, "online"),
        (10.0, "stale"),
        (99.9, "stale"),
        (100.0, "offline"),
    ],
)
def test_presence_is_by_how_long_a_device_has_been_silent(silent_s: float | None, expected: str) -> None:
    assert PresenceAfter(stale_s=10, offline_s=100).of(silent_s) is Presence(expected)
