"""Requests that were sent and have no answer that settles them, and when to send each of them again."""

from __future__ import annotations

import random
from typing import NamedTuple

from pulse.adapters.nats.publication import Publication
from pulse.domain.batching import Lane, Request
from pulse.domain.retry import delay_s

RETRY_S_MIN, RETRY_S_MAX = 0.1, 1.0
BATCHES_AGAIN_S = 30.0
"""After so long a stream that took no batches is tried again: an operator can switch them on at any time."""

NO_ANSWER = "no answer came"
NO_PUBACK = "the answer is no PubAck"
NO_STREAM = "no stream answers for the subject"
CONNECTION_LOST = "the connection was lost"


class Flight(NamedTuple):
    """A request that was written, when, and on which connection (counted by reconnects)."""

    request: Request[Publication]
    lane: Lane[Publication]
    sent_at: float
    connection: int


class Flights:
    """All of them; times are the event loop's, in seconds. What is to be sent again goes back to its lane."""

    def __init__(self, *, attempt_timeout_s: float) -> None:
        self._attempt_timeout_s = attempt_timeout_s
        self._token = 0
        self._flights: dict[int, Flight] = {}
        self._parked: list[tuple[float, Flight]] = []
        self._trouble: dict[Lane[Publication], str] = {}
        self._batches_again_at: dict[Lane[Publication], float] = {}

    def start(self, flight: Flight) -> int:
        """The token under which the answer to `flight` will come."""
        self._token += 1
        self._flights[self._token] = flight
        return self._token

    def land(self, token: int) -> Flight | None:
        """What this token's answer is for; None where it was given up, and sent again under another token."""
        flight = self._flights.pop(token, None)
        if flight is not None:
            flight.lane.free(flight.request)
        return flight

    def park(self, flight: Flight, trouble: str, *, now: float) -> None:
        """Send the request of `flight` again after a pause that grows with its attempts."""
        self._trouble[flight.lane] = trouble
        pause_s = delay_s(
            flight.request.attempt + 1,
            minimum_s=RETRY_S_MIN,
            maximum_s=RETRY_S_MAX,
            random=random.random(),  # noqa: S311 - spreads retries, guards nothing
        )
        self._parked.append((now + pause_s, flight))

    def without_batches(self, lane: Lane[Publication], *, now: float) -> None:
        """Its stream or server takes no batches: message by message for a while."""
        lane.atomic = False
        self._batches_again_at[lane] = now + BATCHES_AGAIN_S

    def clear_trouble(self, lane: Lane[Publication]) -> None:
        """Its stream stores messages."""
        self._trouble.pop(lane, None)

    def trouble_of(self, lane: Lane[Publication]) -> str:
        """Why the last request of `lane` that failed got no answer."""
        return self._trouble.get(lane, NO_ANSWER)

    def retry(self, *, now: float, connection: int) -> None:
        """Hand back what was sent on another connection than this one, what waits too long, and what paused enough."""
        for token, flight in list(self._flights.items()):
            is_lost = flight.connection != connection
            if is_lost or now - flight.sent_at > self._attempt_timeout_s:
                self._trouble[flight.lane] = CONNECTION_LOST if is_lost else NO_ANSWER
                self.land(token)
                flight.lane.resend(flight.request)
        parked, self._parked = self._parked, []
        for due, flight in parked:
            if due <= now:
                flight.lane.resend(flight.request)
            else:
                self._parked.append((due, flight))
        for lane, due in list(self._batches_again_at.items()):
            if due <= now:
                del self._batches_again_at[lane]
                lane.atomic = True
