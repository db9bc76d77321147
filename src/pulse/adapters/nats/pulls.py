"""The pull requests of one consumer that are under way: how many messages they may still bring. No I/O.

Several overlap, so that the next messages are on their way while the last ones are worked on. The server deals its
messages out to them in turn, so what has come is counted for all together. A request that ends early says how many
messages it still owed; one that ends in full says nothing.

Source: NATS ADR-13 (pull consumers), statuses 100, 404, 408, 409 and 503.
"""

from __future__ import annotations

from typing import NamedTuple

HEARTBEAT = 100
NOT_WANTED = frozenset({409, 503})
"""Consumer deleted, leadership change, too many requests; no responders. 409 also says that `max_bytes` are full."""
REMEMBERED_MAX = 32
"""Requests end in about the order of their sending, and only a few are ever under way."""


class Status(NamedTuple):
    """A header block without a message; `owed` is how many messages an ended request had left, None where unsaid."""

    code: int
    description: str
    owed: int | None


def read_status(headers: bytes) -> Status | None:
    """Read `NATS/1.0 408 Request Timeout` and the lines behind it; None where it is no status."""
    first, *lines = headers.decode("utf-8", "replace").split("\r\n")
    _, _, rest = first.partition(" ")
    code, _, description = rest.partition(" ")
    if not (code.isascii() and code.isdigit()):
        return None
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    owed = fields.get("nats-pending-messages", "")
    return Status(int(code), description, int(owed) if owed.isascii() and owed.isdigit() else None)


class Pulls:
    """Requests for `size` messages each, as long as no more than `window` are expected or wait to be taken."""

    def __init__(self, *, size: int, window: int) -> None:
        assert 0 < size <= window, f"not 0 < {size=} <= {window=}"
        self.size = size
        self.expected = 0
        """Messages that the requests under way may still bring."""
        self._window = window
        self._number = 0
        self._under_way: dict[int, None] = {}

    def wanted(self, waiting: int) -> bool:
        """Whether there is room for another request while `waiting` messages wait to be taken."""
        return self.expected + waiting + self.size <= self._window

    def sent(self) -> int:
        """Another request is sent; returns its number, under which its status comes back."""
        self._number += 1
        self._under_way[self._number] = None
        self.expected += self.size
        if len(self._under_way) > REMEMBERED_MAX:
            del self._under_way[next(iter(self._under_way))]
        return self._number

    def arrived(self, count: int) -> None:
        """`count` messages have come."""
        self.expected -= count
        if self.expected <= 0:
            self.lost()

    def ended(self, number: int, status: Status) -> bool:
        """Request `number` is over; whether that says that another one is not wanted now.

        A status of a request that is over already, or of a former connection, says nothing.
        """
        if number not in self._under_way:
            return False
        del self._under_way[number]
        owed = self.size if status.owed is None else status.owed
        self.expected = max(0, self.expected - owed) if self._under_way else 0
        return status.code in NOT_WANTED and owed >= self.size

    def lost(self) -> None:
        """Nothing is under way any more."""
        self.expected = 0
        self._under_way.clear()
