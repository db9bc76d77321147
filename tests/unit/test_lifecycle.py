"""The lifecycle: order, drain, and that nothing lives on half dead. No test here waits for a clock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable

import pytest
from structlog.testing import capture_logs

from pulse.domain.errors import ConfigurationError
from pulse.runtime import lifecycle
from pulse.runtime.lifecycle import StoppedUnasked, run_services, stop_on_signals

LONG = 60.0
"""A drain that no test reaches the end of."""


class Recorded:
    """A service that tells `journal` when it starts, is told to stop, and has drained."""

    def __init__(self, name: str, journal: list[str], *, drain: Callable[[], Awaitable[object]] | None = None) -> None:
        self.name = name
        self.started = asyncio.Event()
        self._journal = journal
        self._drain = drain

    async def run(self, stop: asyncio.Event) -> None:
        self._journal.append(f"{self.name} started as {getattr(asyncio.current_task(), 'get_name', str)()}")
        self.started.set()
        await stop.wait()
        self._journal.append(f"{self.name} told")
        if self._drain is not None:
            await self._drain()
        self._journal.append(f"{self.name} drained")


class Failing:
    """A service that does `act` once it is let."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self.name = name
        self.act_now = asyncio.Event()
        self._act = act

    async def run(self, stop: asyncio.Event) -> None:
        await self.act_now.wait()
        self._act()


def throw(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


async def forever() -> None:
    await asyncio.Event().wait()


async def test_sinks_start_first_and_sources_drain_first() -> None:
    journal: list[str] = []
    sink, middle, source = services = [Recorded(name, journal) for name in ("sink", "middle", "source")]
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(run_services(services, stop=stop, drain_s_max=LONG))
        for service in (sink, middle, source):
            await service.started.wait()
        stop.set()
        await running
    assert journal == [
        *(f"{name} started as {name}" for name in ("sink", "middle", "source")),
        *(f"{name} {step}" for name in ("source", "middle", "sink") for step in ("told", "drained")),
    ]


async def test_stop_requested_before_the_services_start_is_not_lost() -> None:
    journal: list[str] = []
    stop = asyncio.Event()
    stop.set()
    await run_services([Recorded("sink", journal)], stop=stop, drain_s_max=LONG)
    assert journal == []


async def test_stop_requested_before_a_service_had_its_first_step_is_not_lost() -> None:
    journal: list[str] = []
    stop = asyncio.Event()
    asyncio.get_running_loop().call_soon(stop.set)
    await run_services([Recorded("sink", journal)], stop=stop, drain_s_max=LONG)
    assert journal[-1] == "sink drained"


async def test_what_has_not_drained_in_time_is_cancelled_by_name() -> None:
    journal: list[str] = []
    source = Recorded("source", journal, drain=forever)
    sink = Recorded("sink", journal)
    stop = asyncio.Event()
    stop_when_started(source, stop)
    with capture_logs() as logs:
        await run_services([sink, source], stop=stop, drain_s_max=0.01)
    late = [line["service"] for line in logs if line["log_level"] == "warning"]
    assert late == ["sink", "source"]
    assert "source drained" not in journal


def stop_when_started(service: Recorded, stop: asyncio.Event) -> None:
    async def wait() -> None:
        await service.started.wait()
        stop.set()

    running = asyncio.ensure_future(wait())
    running.add_done_callback(lambda _: None)


async def test_what_ignores_its_cancellation_ends_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    killed: list[bool] = []

    def kill() -> None:
        killed.append(True)
        release.set()

    monkeypatch.setattr(lifecycle, "CANCEL_S_MAX", 0.01)
    monkeypatch.setattr(lifecycle, "_kill_this_process", kill)
    source = Recorded("source", [], drain=stubborn)
    stop = asyncio.Event()
    stop_when_started(source, stop)
    await run_services([source], stop=stop, drain_s_max=0.01)
    assert killed == [True]


async def test_a_bug_in_one_service_drains_the_others_and_propagates_with_its_trace() -> None:
    journal: list[str] = []
    bad = Failing("bad", throw(KeyError("bug")))
    bad.act_now.set()
    with pytest.raises(KeyError, match="bug") as raised:
        await run_services(
            [Recorded("sink", journal), bad, Recorded("source", journal)], stop=asyncio.Event(), drain_s_max=LONG
        )
    assert journal[-4:] == ["source told", "source drained", "sink told", "sink drained"]
    assert "act" in [entry.name for entry in raised.traceback]


async def test_a_configuration_error_propagates_as_itself() -> None:
    bad = Failing("bad", throw(ConfigurationError("port taken")))
    bad.act_now.set()
    with pytest.raises(ConfigurationError, match="port taken"):
        await run_services([bad], stop=asyncio.Event(), drain_s_max=LONG)


async def test_a_service_that_returns_untold_is_a_bug() -> None:
    idle = Failing("idle", lambda: None)
    idle.act_now.set()
    with pytest.raises(StoppedUnasked, match="idle returned"):
        await run_services([idle], stop=asyncio.Event(), drain_s_max=LONG)


def cancel_the_current_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


@pytest.mark.parametrize("cancel", [throw(asyncio.CancelledError()), cancel_the_current_task])
async def test_a_service_that_cancels_itself_is_a_bug(cancel: Callable[[], object]) -> None:
    class Cancelling(Failing):
        async def run(self, stop: asyncio.Event) -> None:
            await super().run(stop)
            await asyncio.sleep(0)

    odd = Cancelling("odd", cancel)
    odd.act_now.set()
    with pytest.raises(StoppedUnasked, match="odd was cancelled"):
        await run_services([odd], stop=asyncio.Event(), drain_s_max=LONG)


async def test_the_first_failure_propagates_and_a_later_one_is_logged() -> None:
    later = Failing("later", throw(ValueError("while stopping")))

    async def fail_later() -> None:
        later.act_now.set()

    first = Failing("first", throw(KeyError("first")))
    first.act_now.set()
    with capture_logs() as logs, pytest.raises(KeyError, match="first"):
        await run_services(
            [later, Recorded("source", [], drain=fail_later), first], stop=asyncio.Event(), drain_s_max=LONG
        )
    assert ("service failed while stopping", "later") in [(line["event"], line.get("service")) for line in logs]


async def test_cancelling_the_whole_cancels_every_service() -> None:
    journal: list[str] = []
    service = Recorded("sink", journal)
    running = asyncio.ensure_future(run_services([service], stop=asyncio.Event(), drain_s_max=LONG))
    await service.started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert journal == ["sink started as sink"]


@pytest.mark.parametrize("number", lifecycle.STOP_SIGNALS)
async def test_a_signal_sets_the_stop_and_the_handlers_come_back_after(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in lifecycle.STOP_SIGNALS]
    with stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        async with asyncio.timeout(30):
            await stop.wait()
        assert signal.getsignal(number) == signal.SIG_DFL
    assert [signal.getsignal(each) for each in lifecycle.STOP_SIGNALS] == before
