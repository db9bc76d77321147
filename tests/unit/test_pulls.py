"""How many messages the pull requests under way may still bring, whatever becomes of each of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.adapters.nats.pulls import Pulls, Status, read_status

EXPIRED = Status(408, "Request Timeout", 10)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 5\r\n\r\n", Status(100, "Idle Heartbeat", None)),
        (b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 7\r\n\r\n", Status(408, "Request Timeout", 7)),
        (b"NATS/1.0 409 Consumer Deleted\r\nnats-pending-messages:7\r\n\r\n", Status(409, "Consumer Deleted", 7)),
        (b"NATS/1.0 503\r\n\r\n", Status(503, "", None)),
        (b"NATS/1.0 503 \xff\r\nNats-Pending-Messages: x\r\n\r\n", Status(503, "\ufffd", None)),
        (b"NATS/1.0\r\nNats-Msg-Id: a\r\n\r\n", None),
        (b"", None),
    ],
)
def test_a_status_is_read_from_its_header_block(headers: bytes, status: Status | None) -> None:
    assert read_status(headers) == status


@given(st.binary(max_size=60))
def test_no_header_block_does_worse_than_to_be_no_status(headers: bytes) -> None:
    read_status(b"NATS/1.0 " + headers)


def sent(pulls: Pulls, waiting: int = 0) -> list[int]:
    numbers = []
    while pulls.wanted(waiting):
        numbers.append(pulls.sent())
    return numbers


def test_requests_overlap_up_to_the_window() -> None:
    pulls = Pulls(size=10, window=25)
    assert len(sent(pulls)) == 2
    pulls.arrived(4)
    assert not pulls.wanted(4), "what waits here counts as well"
    pulls.arrived(1)
    assert pulls.wanted(0)
    assert not pulls.wanted(1)


def test_one_that_expires_gives_back_what_it_owed() -> None:
    pulls = Pulls(size=10, window=20)
    first, second = sent(pulls)
    pulls.arrived(6)
    assert not pulls.ended(first, Status(408, "", 7))
    assert pulls.expected == 7
    assert not pulls.ended(first, Status(408, "", 7)), "once"
    assert pulls.expected == 7
    assert not pulls.ended(second, Status(408, "", 3))
    assert pulls.expected == 0, "with none under way nothing is expected, whatever was miscounted"


@pytest.mark.parametrize(
    ("status", "refused"),
    [
        (Status(409, "Consumer Deleted", 10), True),
        (Status(503, "", None), True),
        (Status(409, "Message Size Exceeds MaxBytes", 4), False),
        (Status(408, "Request Timeout", 10), False),
        (Status(404, "No Messages", None), False),
    ],
)
def test_a_refusal_is_what_brought_nothing_and_says_why(status: Status, refused: bool) -> None:
    pulls = Pulls(size=10, window=10)
    (number,) = sent(pulls)
    assert pulls.ended(number, status) is refused


def test_what_belongs_to_a_lost_connection_says_nothing() -> None:
    pulls = Pulls(size=10, window=20)
    old = sent(pulls)
    pulls.lost()
    new = sent(pulls)
    for number in old:
        assert not pulls.ended(number, Status(503, "", None))
    assert pulls.expected == 20
    assert set(old).isdisjoint(new)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 40)), max_size=60))
def test_however_it_goes_the_expectation_stays_within_the_window(steps: list[tuple[int, int, int]]) -> None:
    pulls = Pulls(size=10, window=30)
    for step, amount, which in steps:
        match step:
            case 0:
                sent(pulls, waiting=amount)
            case 1:
                pulls.arrived(amount)
            case 2:
                pulls.ended(which, Status(408, "", amount))
            case 3:
                pulls.ended(which, Status(503, "", None))
        assert 0 <= pulls.expected <= 30
    for number in range(pulls._number + 1):
        pulls.ended(number, EXPIRED)
    assert pulls.expected == 0
