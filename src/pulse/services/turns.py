"""Whose turn it is: the gates of all destinations, who waits before them, and the rates of routes.

Only so many jobs are handed out by JetStream at a time, to all workers together, so a place in memory is what
destinations compete for. Those of which nothing is known yet, and those that fail or are slow, share `new_max` and
`poor_max` places: the quick ones always find the rest. Where many destinations are new at once, as after a start, as
many jobs more wait for moments for such a place. A job that gets none is told when to come again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

from pulse.domain.breaker import Circuit, Permit
from pulse.domain.delivery import Attempted
from pulse.domain.gate import Gate, GatePolicy, Standing
from pulse.domain.limits import Rate
from pulse.domain.webhook_url import Destination

Where = tuple[str, Destination | None]
"""A tenant's destination; None is the MQTT broker. Of two tenants one never waits for the other's."""
GATES_MAX = 20_000


class _Door:
    __slots__ = ("gate", "waiting")

    def __init__(self, policy: GatePolicy) -> None:
        self.gate = Gate(policy)
        self.waiting: deque[asyncio.Future[Turn | None]] = deque()


class Turn:
    """Leave for one attempt; `Turns.ended` or `Turns.withdrawn` ends it."""

    __slots__ = ("began_s", "door", "permit", "standing")

    def __init__(self, door: _Door, permit: Permit, standing: Standing, began_s: float) -> None:
        self.door = door
        self.permit = permit
        self.standing = standing
        self.began_s = began_s


class Turns:
    """Gives turns; one event loop."""

    def __init__(
        self, policy: GatePolicy, *, new_max: int, poor_max: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._doors: dict[Where, _Door] = {}
        self._running = dict.fromkeys(Standing, 0)
        self._new: dict[Turn, None] = {}
        """Those that run at new destinations, the oldest first."""
        self._max = {Standing.NEW: new_max, Standing.POOR: poor_max}
        self._crowd: deque[asyncio.Future[None]] = deque()
        """Who waits for a place among the new."""

    async def take(self, where: Where) -> Turn | float:
        """A turn, or when to come again, in seconds since the epoch."""
        door = self._doors.get(where)
        if door is None:
            door = self._doors[where] = _Door(self._policy)
            self._forget()
        now_s = self._clock()
        if not door.waiting and (turn := self._turn(door, now_s)) is not None:
            return turn
        if await self._waited_for_place(door, now_s):
            now_s = self._clock()
            if not door.waiting and (turn := self._turn(door, now_s)) is not None:
                return turn
        if self._has_room(door.gate.standing) and door.gate.may_wait(len(door.waiting), now_s):
            future: asyncio.Future[Turn | None] = asyncio.get_running_loop().create_future()
            door.waiting.append(future)
            if (given := await future) is not None:
                return given
        return door.gate.come_again_s(self._clock())

    async def _waited_for_place(self, door: _Door, now_s: float) -> bool:
        """Whether a place among the new was waited for, so that all may be different now."""
        if (
            door.gate.standing is not Standing.NEW
            or self._has_room(Standing.NEW)
            or not door.gate.may_wait(0, now_s)
            or len(self._crowd) >= self._max[Standing.NEW]
        ):
            return False
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._crowd.append(place)
        try:
            async with asyncio.timeout(self._policy.wait_s_max):
                await place
        except TimeoutError:
            pass
        finally:
            if place in self._crowd:
                self._crowd.remove(place)
        return True

    def ended(self, turn: Turn, attempted: Attempted) -> None:
        """The attempt is over."""
        self._count_out(turn)
        turn.door.gate.ended(turn.permit, attempted, self._clock())
        self._next(turn.door)

    def withdrawn(self, turn: Turn) -> None:
        """It was never made, or says nothing about the destination."""
        self._count_out(turn)
        turn.door.gate.withdrawn(turn.permit)
        self._next(turn.door)

    def circuits(self) -> Iterator[tuple[Where, Circuit]]:
        """The circuit of each destination."""
        for where, door in self._doors.items():
            yield where, door.gate.breaker.circuit

    def circuit(self, where: Where) -> Circuit:
        """That of one destination."""
        door = self._doors.get(where)
        return Circuit.CLOSED if door is None else door.gate.breaker.circuit

    def _turn(self, door: _Door, now_s: float) -> Turn | None:
        standing = door.gate.standing
        if standing is Standing.NEW:
            self._reconsider(now_s)
        if not self._has_room(standing):
            return None
        permit = door.gate.admit(now_s)
        if permit is None:
            return None
        turn = Turn(door, permit, standing, now_s)
        self._running[standing] += 1
        if standing is Standing.NEW:
            self._new[turn] = None
        return turn

    def _reconsider(self, now_s: float) -> None:
        """A new destination that has not answered within moments is new no more: others may show what they are."""
        for turn in list(self._new):
            if now_s - turn.began_s <= self._policy.quick_s:
                return
            self._count_out(turn)
            turn.standing = Standing.POOR
            self._running[Standing.POOR] += 1

    def _count_out(self, turn: Turn) -> None:
        self._running[turn.standing] -= 1
        self._new.pop(turn, None)
        while turn.standing is Standing.NEW and self._crowd:
            if not (place := self._crowd.popleft()).done():
                place.set_result(None)
                break

    def _has_room(self, standing: Standing) -> bool:
        return standing not in self._max or self._running[standing] < self._max[standing]

    def _next(self, door: _Door) -> None:
        now_s = self._clock()
        while door.waiting:
            if door.waiting[0].done():  # who waited was cancelled
                door.waiting.popleft()
                continue
            turn = self._turn(door, now_s)
            if turn is None:
                break
            door.waiting.popleft().set_result(turn)
        if door.waiting and not (door.gate.running and door.gate.may_wait(0, now_s)):
            self._dismiss(door)  # nobody is left to call the next one, or it would not be for moments

    def _dismiss(self, door: _Door) -> None:
        while door.waiting:
            future = door.waiting.popleft()
            if not future.done():
                future.set_result(None)

    def _forget(self) -> None:
        if len(self._doors) > GATES_MAX:
            for where in [
                where for where, door in self._doors.items() if door.gate.is_forgettable and not door.waiting
            ]:
                del self._doors[where]


class RouteRates:
    """How often each route may send, as this worker counts: a token bucket each (GCRA), kept while it is not full."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._full_at_s: dict[object, float] = {}
        self._next_s: dict[object, float] = {}
        self._swept_s = 0.0

    def come_again_s(self, key: object, rate: Rate | None) -> float | None:
        """None where one may be sent now; else when this one is to come again, each at a time of its own."""
        if rate is None or not rate.per_s:
            return None
        now_s, interval_s = self._clock(), 1.0 / rate.per_s
        self._sweep(now_s)
        free_s = max(self._full_at_s.get(key, 0.0), now_s) + interval_s - rate.burst * interval_s
        if free_s <= now_s:
            return None
        at_s = max(free_s, self._next_s.get(key, 0.0))
        self._next_s[key] = at_s + interval_s
        return at_s

    def count(self, key: object, rate: Rate | None) -> None:
        """One is sent."""
        if rate is not None and rate.per_s:
            self._full_at_s[key] = max(self._full_at_s.get(key, 0.0), self._clock()) + 1.0 / rate.per_s

    def _sweep(self, now_s: float) -> None:
        if now_s - self._swept_s > 60.0:
            self._swept_s = now_s
            for times in (self._full_at_s, self._next_s):
                for key in [key for key, at_s in times.items() if at_s < now_s]:
                    del times[key]
