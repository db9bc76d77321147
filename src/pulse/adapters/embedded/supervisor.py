"""Keeps a set of servers and processes running: starts them in stages, restarts what dies, stops all within a limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

import structlog

from pulse.domain.errors import PulseError

log = structlog.get_logger()

DEATH_POLL_S = 0.1
STOP_POLL_S = 0.05


class Member(Protocol):
    """What can be supervised: ManagedProcess, NatsServer, PostgresServer."""

    @property
    def name(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    @property
    def pid(self) -> int | None: ...
    def start(self) -> None: ...
    def stop(self, limit_s: float) -> None: ...
    def kill(self) -> None: ...
    def describe_exit(self) -> str: ...


class EventKind(StrEnum):
    """What happened to a member; the value is also the log's event."""

    DIED = "process died"
    NOT_RESTARTED = "process could not be restarted"
    RESTARTED = "process restarted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`detail` says how it ended or why it did not start; `retry_in_s` is 0 where nothing is to be retried."""

    kind: EventKind
    member: str
    detail: str
    restarts: int
    retry_in_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """The delay before restart n (from 0): `min(delay_s_max, delay_s_min * 2**n)`; a life of `stable_s` sets n back.

    With the defaults: 0.1  0.2  0.4  0.8  1.6  3.2  6.4  10  10 …, for ever: an operator may mend the cause meanwhile.
    """

    delay_s_min: float = 0.1
    delay_s_max: float = 10.0
    stable_s: float = 30.0

    def delay_s(self, failures: int) -> float:
        # The exponent is bounded too: 2.0 ** 1024 does not exist.
        return min(self.delay_s_max, self.delay_s_min * 2.0 ** min(failures, 64))


class Supervisor:
    """Members start in stages, the members of a stage together; they stop stage by stage in reverse order.

        with Supervisor(stop_s_max=5.0) as supervisor:
            supervisor.start(nats, postgresql)
            supervisor.start(ingest, maintenance)
            supervisor.start(gateway)
            supervisor.wait(stop)                  # a threading.Event

    `tell` is called from the thread that keeps the member, one at a time for each member.
    """

    def __init__(
        self,
        *,
        stop_s_max: float,
        tell: Callable[[Event], None] | None = None,
        backoff: Backoff | None = None,
        stage_reserve_s: float = 0.5,
    ) -> None:
        self._stop_s_max = stop_s_max
        self._tell = tell
        self._backoff = backoff or Backoff()
        self._stage_reserve_s = stage_reserve_s
        self._stages: list[list[_Keeper]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *members: Member) -> None:
        """Start one stage and return when all of it is ready.

        Raises what the first member that failed raised; what runs already is stopped by `stop` or leaving the `with`.
        """
        stage = [_Keeper(member, backoff=self._backoff, report=self._report) for member in members]
        self._stages.append(stage)
        for keeper in stage:
            keeper.thread.start()
        for keeper in stage:
            keeper.first_start.result()

    def wait(self, stop: threading.Event) -> None:
        """Return when `stop` is set; raise what ended a keeper that should not have ended: that is a bug."""
        while not stop.wait(DEATH_POLL_S):
            for keeper in self._keepers():
                if keeper.bug is not None:
                    raise keeper.bug

    def stop(self) -> None:
        """Stop every member, the stages in reverse order, all within `stop_s_max`.

        Each stage gets what is left but `stage_reserve_s` for each stage after it; at its end its members are killed.
        """
        deadline = time.monotonic() + self._stop_s_max
        while self._stages:
            stage = self._stages.pop()
            stage_deadline = deadline - self._stage_reserve_s * len(self._stages)
            limit_s = max(0.0, stage_deadline - time.monotonic())
            # Told all at once: no member of this stage restarts while another one of it is being stopped.
            for keeper in stage:
                keeper.stopping.set()
            threads = [threading.Thread(target=keeper.stop, args=(limit_s,), daemon=True) for keeper in stage]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def restarts(self) -> dict[str, int]:
        """How often each member was restarted."""
        return {keeper.member.name: keeper.restarts for keeper in self._keepers()}

    def _keepers(self) -> list[_Keeper]:
        return [keeper for stage in self._stages for keeper in stage]

    def _report(self, event: Event) -> None:
        level = "info" if event.kind is EventKind.RESTARTED else "warning"
        getattr(log, level)(
            str(event.kind),
            process=event.member,
            detail=event.detail,
            restarts=event.restarts,
            retry_in_s=event.retry_in_s,
        )
        if self._tell is not None:
            self._tell(event)


class _Keeper:
    """One member and the thread that keeps it running."""

    def __init__(self, member: Member, *, backoff: Backoff, report: Callable[[Event], None]) -> None:
        self.member = member
        self.first_start: Future[None] = Future()
        self.stopping = threading.Event()
        self.restarts = 0
        self.bug: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=f"keeper of {member.name}", daemon=True)
        self._backoff = backoff
        self._report = report

    def stop(self, limit_s: float) -> None:
        """Stop the member and its thread; returns at most a little after `limit_s`, with the member killed.

        A member may be between two processes or in the middle of a start: so it is told until the thread has ended.
        """
        deadline = time.monotonic() + limit_s
        self.stopping.set()
        self.member.stop(limit_s)
        while self.thread.is_alive():
            self.thread.join(STOP_POLL_S)
            self.member.stop(max(0.0, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                break
        self.member.kill()

    def _run(self) -> None:
        try:
            self.member.start()
        except BaseException as error:  # noqa: BLE001 - handed to the caller of Supervisor.start, who raises it
            self.first_start.set_exception(error)
            return
        self.first_start.set_result(None)
        try:
            if not self._came_too_late():
                self._keep()
        except BaseException as error:  # noqa: BLE001 - handed to Supervisor.wait, which raises it
            self.bug = error

    def _keep(self) -> None:
        failures = 0
        started = time.monotonic()
        while self._died():
            failures = 0 if time.monotonic() - started >= self._backoff.stable_s else failures
            self._tell(EventKind.DIED, self.member.describe_exit(), failures)
            while not self.stopping.wait(self._backoff.delay_s(failures)):
                failures += 1
                try:
                    self.member.start()
                except (PulseError, OSError) as error:
                    if self.stopping.is_set():
                        return
                    self._tell(EventKind.NOT_RESTARTED, str(error), failures)
                    continue
                if self._came_too_late():
                    return
                self.restarts += 1
                started = time.monotonic()
                self._tell(EventKind.RESTARTED, f"pid {self.member.pid}", None)
                break

    def _came_too_late(self) -> bool:
        """End what was started when the stop had begun: it may be over, and nobody else would."""
        if self.stopping.is_set():
            self.member.kill()
        return self.stopping.is_set()

    def _died(self) -> bool:
        """Wait for the member's death (True) or for `stopping` (False)."""
        while self.member.alive:
            if self.stopping.wait(DEATH_POLL_S):
                return False
        return not self.stopping.is_set()

    def _tell(self, kind: EventKind, detail: str, failures: int | None) -> None:
        retry_in_s = 0.0 if failures is None else self._backoff.delay_s(failures)
        event = Event(kind=kind, member=self.member.name, detail=detail, restarts=self.restarts, retry_in_s=retry_in_s)
        self._report(event)
