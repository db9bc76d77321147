"""Starts services, stops them in order, and lets nothing live on half dead.

    started     sinks first, so that a source never waits for its sink
    told        stop (SIGTERM, SIGINT): sources first; the next one is told when the one before has drained
    cancelled   what has not drained within `drain_s_max`: a redelivery, and nothing else
    killed      what does not even end when it is cancelled, CANCEL_S_MAX later

A service that raises, or returns before it was told to stop, is a bug (or a configuration that cannot work): the others
are drained, and the exception ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import structlog

log = structlog.get_logger()

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
CANCEL_S_MAX = 1.0
"""How long a cancelled service may take to end; a stop takes at most `drain_s_max` and this."""


class Service(Protocol):
    """One running part of a process."""

    @property
    def name(self) -> str:
        """What logs and tasks call it."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then drain; returns only when drained. An outage is waited out inside."""


class StoppedUnasked(RuntimeError):
    """A service ended though nobody had told it to: a bug."""


class _Running:
    """One service, its own stop event, and how it ended."""

    def __init__(self, service: Service) -> None:
        self.name = service.name
        self.stop = asyncio.Event()
        self.failure: Exception | None = None
        self.cancelled_by_us = False
        self._service = service

    async def run(self) -> None:
        try:
            await self._service.run(self.stop)
        except asyncio.CancelledError:
            if not self.cancelled_by_us:
                self.failure = StoppedUnasked(f"{self.name} was cancelled from inside")
            raise
        except Exception as error:  # noqa: BLE001 - kept, so that the others drain before it ends the process
            self.failure = _innermost(error)
        else:
            if not self.stop.is_set():
                self.failure = StoppedUnasked(f"{self.name} returned before it was told to stop")


def _innermost(error: Exception) -> Exception:
    """What the service's own TaskGroup wraps where one of its tasks alone has failed."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def run_services(services: Sequence[Service], *, stop: asyncio.Event, drain_s_max: float) -> None:
    """Run `services`, given sinks first, until `stop` is set; returns when all are drained or cancelled.

    Where `stop` is set already, nothing is started. Raises what the first failing service raised, after the drain; a
    service that ends untold raises StoppedUnasked.
    """
    if stop.is_set():
        return
    running = [_Running(service) for service in services]
    assert len({each.name for each in running}) == len(running), "two services of one name"
    async with asyncio.TaskGroup() as group:
        tasks = {each.name: group.create_task(each.run(), name=each.name) for each in running}
        told = group.create_task(stop.wait(), name="stop")
        await asyncio.wait([told, *tasks.values()], return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        failed_first = next((each for each in running if each.failure), None)
        if failed_first is not None:
            log.error("service failed, stopping the others", service=failed_first.name)
        await _drain(running, tasks, drain_s_max)
    failures = [each for each in running if each.failure]
    failures.sort(key=lambda each: each is not failed_first)
    for each in failures[1:]:
        log.error("service failed while stopping", service=each.name, exc_info=each.failure)
    for each in failures[:1]:
        assert each.failure is not None
        raise each.failure


async def _drain(running: Sequence[_Running], tasks: dict[str, asyncio.Task[None]], drain_s_max: float) -> None:
    started_at = time.monotonic()
    try:
        async with asyncio.timeout(drain_s_max):
            for each in reversed(running):
                each.stop.set()
                await asyncio.wait([tasks[each.name]])
    except TimeoutError:
        await _cancel([each for each in running if not tasks[each.name].done()], tasks)
    log.info("stopped", drain_s=round(time.monotonic() - started_at, 3))


async def _cancel(late: Sequence[_Running], tasks: dict[str, asyncio.Task[None]]) -> None:
    for each in late:
        log.warning("not drained in time, what it holds will be redelivered", service=each.name)
        each.cancelled_by_us = True
        each.stop.set()
        tasks[each.name].cancel()
    deadline = time.monotonic() + CANCEL_S_MAX
    while (stuck := [each.name for each in late if not tasks[each.name].done()]) and time.monotonic() < deadline:
        await asyncio.wait([tasks[name] for name in stuck], timeout=deadline - time.monotonic())
    if stuck:
        log.critical("ignores its cancellation, killing the process", services=stuck)
        _kill_this_process()


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; the same signal once more kills the process at once.

    The second one is left to the kernel, so it works while the event loop is blocked. It has to be the *same* signal:
    on Ctrl-C a child gets SIGINT from the terminal and SIGTERM from its parent, and may still drain. To be entered
    inside a running loop, on the main thread; leaves the handlers as they were.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def ask_to_stop(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
        if not stop.is_set():
            log.info("stopping; the same signal again stops at once", signal=number.name)
        stop.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, ask_to_stop, number)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
