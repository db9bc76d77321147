"""Time ends commands, but does not run ahead of what their devices have said."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pulse.domain.command import State
from pulse.services.command_sweep import BACKLOG_MS_MAX, Sweep
from pulse.services.maintenance import Turn

NOW_MS = 10_000_000


class Store:
    def __init__(self, ended: Mapping[State, int]) -> None:
        self.ended = ended
        self.due_ms = 0

    async def end(self, *, due_ms: int, at_ms: int) -> Mapping[State, int]:
        assert at_ms == NOW_MS
        self.due_ms = due_ms
        return self.ended

    async def say_again(self, *, pause_ms: int, at_ms: int) -> tuple[int, bool]:
        assert (pause_ms, at_ms) == (1500, NOW_MS)
        return 3, True


class Metrics:
    def __init__(self) -> None:
        self.states: Mapping[State, int] = {}
        self.again = 0

    def moved(self, states: Mapping[State, int]) -> None:
        self.states = states

    def said_again(self, count: int) -> None:
        self.again = count


def sweep(store: Store, metrics: Metrics, heard_ms: int | None) -> Sweep:
    async def heard() -> int | None:
        return heard_ms

    return Sweep(store=store, heard_ms=heard, metrics=metrics, resend_s=1.5, now_ms=lambda: NOW_MS)


@pytest.mark.parametrize(
    ("heard_ms", "due_ms"),
    [
        (None, NOW_MS),
        (NOW_MS - 5000, NOW_MS - 5000),
        (NOW_MS + 9, NOW_MS),
        (0, NOW_MS - BACKLOG_MS_MAX),
    ],
    ids=["all is heard", "a backlog", "a clock ahead of ours", "a worker that is away for long"],
)
async def test_what_was_due_when_the_oldest_unheard_word_came_is_ended(heard_ms: int | None, due_ms: int) -> None:
    store = Store({})
    assert await sweep(store, Metrics(), heard_ms).run_once() is None
    assert store.due_ms == due_ms


async def test_it_has_its_next_turn_at_once_where_it_ended_something_and_counts_what() -> None:
    metrics = Metrics()
    assert await sweep(Store({State.EXPIRED: 2}), metrics, None).run_once() is Turn.MORE
    assert (metrics.states, metrics.again) == ({State.EXPIRED: 2}, 3)
