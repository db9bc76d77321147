"""The supervisor over members that are no processes: order, restarts, limits."""

from __future__ import annotations

import threading

import pytest

from pulse.adapters.embedded.process import wait_until
from pulse.adapters.embedded.supervisor import Backoff, Event, EventKind, Supervisor
from pulse.domain.errors import Outage

LIMIT_S = 10.0
QUICK = Backoff(delay_s_min=0.001, delay_s_max=0.01)


class FakeMember:
    """Dies when told; fails to start while `refusals` last."""

    def __init__(self, name: str, history: list[str]) -> None:
        self.name = name
        self.alive = False
        self.pid: int | None = None
        self.refusals = 0
        self.starts = 0
        self.stop_limit_s: float | None = None
        self.starting = threading.Event()
        self.may_start = threading.Event()
        self.may_start.set()
        self._history = history

    def start(self) -> None:
        self.starting.set()
        assert self.may_start.wait(LIMIT_S)
        if self.refusals:
            self.refusals -= 1
            raise Outage(self.name, "does not start")
        self.starts += 1
        self.pid = self.starts
        self.alive = True
        self._history.append(f"start {self.name}")

    def stop(self, limit_s: float) -> None:
        if self.alive:
            self.stop_limit_s = limit_s
            self._history.append(f"stop {self.name}")
        self.alive = False

    def kill(self) -> None:
        self.alive = False

    def describe_exit(self) -> str:
        return "SIGKILL"


@pytest.fixture
def history() -> list[str]:
    return []


@pytest.mark.parametrize(
    ("failures", "delay_s"), [(0, 0.1), (1, 0.2), (2, 0.4), (6, 6.4), (7, 10.0), (100, 10.0), (100_000, 10.0)]
)
def test_the_delay_doubles_up_to_its_bound(failures: int, delay_s: float) -> None:
    assert Backoff().delay_s(failures) == pytest.approx(delay_s)


def test_stages_start_in_order_and_stop_in_reverse(history: list[str]) -> None:
    with Supervisor(stop_s_max=LIMIT_S) as supervisor:
        for name in ("nats", "ingest", "gateway"):
            supervisor.start(FakeMember(name, history))
    starts = ["start nats", "start ingest", "start gateway"]
    assert history == [*starts, "stop gateway", "stop ingest", "stop nats"]


def test_the_members_of_a_stage_start_together(history: list[str]) -> None:
    """The first waits for the second, so one after the other would never be ready."""
    first, second = FakeMember("first", history), FakeMember("second", history)
    first.may_start.clear()
    second_start = second.start

    def start_and_release() -> None:
        second_start()
        first.may_start.set()

    second.start = start_and_release  # type: ignore[method-assign]
    with Supervisor(stop_s_max=LIMIT_S) as supervisor:
        supervisor.start(first, second)
        assert history == ["start second", "start first"]


def test_a_member_that_dies_is_restarted_and_it_is_told(history: list[str]) -> None:
    events: list[Event] = []
    member = FakeMember("nats", history)
    with Supervisor(stop_s_max=LIMIT_S, tell=events.append, backoff=QUICK) as supervisor:
        supervisor.start(member)
        member.kill()
        assert wait_until(lambda: len(events) >= 2, limit_s=LIMIT_S)
        assert member.alive
        assert supervisor.restarts() == {"nats": 1}
    assert [(event.kind, event.member) for event in events] == [
        (EventKind.DIED, "nats"),
        (EventKind.RESTARTED, "nats"),
    ]
    assert events[0].detail == "SIGKILL"


def test_a_restart_is_tried_until_it_works(history: list[str]) -> None:
    events: list[Event] = []
    member = FakeMember("nats", history)
    with Supervisor(stop_s_max=LIMIT_S, tell=events.append, backoff=QUICK) as supervisor:
        supervisor.start(member)
        member.refusals = 3
        member.kill()
        assert wait_until(lambda: bool(events) and events[-1].kind is EventKind.RESTARTED, limit_s=LIMIT_S)
    assert [event.kind for event in events[1:-1]] == [EventKind.NOT_RESTARTED] * 3


def test_a_member_that_keeps_dying_is_restarted_more_and_more_slowly(history: list[str]) -> None:
    events: list[Event] = []
    member = FakeMember("nats", history)
    backoff = Backoff(delay_s_min=0.001, delay_s_max=0.004)
    with Supervisor(stop_s_max=LIMIT_S, tell=events.append, backoff=backoff) as supervisor:
        supervisor.start(member)
        for deaths in range(1, 5):
            member.kill()
            assert wait_until(lambda deaths=deaths: len(events) == 2 * deaths, limit_s=LIMIT_S)  # type: ignore[misc]
    assert [event.retry_in_s for event in events if event.kind is EventKind.DIED] == [0.001, 0.002, 0.004, 0.004]


def test_a_first_start_that_fails_is_raised_and_the_others_are_stopped(history: list[str]) -> None:
    nats, gateway = FakeMember("nats", history), FakeMember("gateway", history)
    gateway.refusals = 1
    with Supervisor(stop_s_max=LIMIT_S) as supervisor:
        supervisor.start(nats)
        with pytest.raises(Outage, match="does not start"):
            supervisor.start(gateway)
    assert history == ["start nats", "stop nats"]


def test_nothing_is_restarted_while_stopping(history: list[str]) -> None:
    events: list[Event] = []
    member = FakeMember("nats", history)
    with Supervisor(stop_s_max=LIMIT_S, tell=events.append, backoff=QUICK) as supervisor:
        supervisor.start(member)
    assert (member.alive, events) == (False, [])


def test_the_limit_is_shared_by_the_stages(history: list[str]) -> None:
    nats, gateway = FakeMember("nats", history), FakeMember("gateway", history)
    with Supervisor(stop_s_max=5.0, stage_reserve_s=2.0) as supervisor:
        supervisor.start(nats)
        supervisor.start(gateway)
    assert gateway.stop_limit_s is not None
    assert nats.stop_limit_s is not None
    assert gateway.stop_limit_s <= 3.0 < nats.stop_limit_s <= 5.0


def test_a_member_whose_start_outlasts_the_stop_is_ended_when_it_comes_up(history: list[str]) -> None:
    member = FakeMember("nats", history)
    supervisor = Supervisor(stop_s_max=0.05, backoff=QUICK)
    supervisor.start(member)
    member.may_start.clear()
    member.starting.clear()
    member.kill()
    assert member.starting.wait(LIMIT_S)
    supervisor.stop()
    member.may_start.set()
    assert wait_until(lambda: member.starts == 2 and not member.alive, limit_s=LIMIT_S)


def test_a_bug_in_a_keeper_ends_the_wait(history: list[str]) -> None:
    member = FakeMember("nats", history)
    with Supervisor(stop_s_max=LIMIT_S, backoff=QUICK) as supervisor:
        supervisor.start(member)
        member.describe_exit = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        member.kill()
        with pytest.raises(ZeroDivisionError):
            supervisor.wait(threading.Event())


def test_wait_returns_when_told_to_stop(history: list[str]) -> None:
    stop = threading.Event()
    stop.set()
    with Supervisor(stop_s_max=LIMIT_S) as supervisor:
        supervisor.start(FakeMember("nats", history))
        supervisor.wait(stop)
