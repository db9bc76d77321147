"""How far a stream is routed, as its consumer tells it."""

from __future__ import annotations

from typing import Any

import pytest

from pulse.adapters.nats.streams import ConsumerState
from pulse.domain.ledger import position
from pulse.wiring import delivery_parts
from pulse.wiring.delivery_parts import RoutedSoFar

EPOCH, CREATED_NS = 1, 7


class Lines:
    async def due_epochs(self) -> dict[int, tuple[str, int]]:
        return {EPOCH: ("TELEMETRY", CREATED_NS)}


class Made:
    created_ns = CREATED_NS


@pytest.mark.parametrize(
    ("unacked", "upto"),
    [
        pytest.param(1, 6, id="one above the floor is in somebody's hands"),
        pytest.param(0, 10, id="the one above the floor was given up, and leaves no ack"),
    ],
)
async def test_a_message_that_is_given_up_holds_no_line(
    monkeypatch: pytest.MonkeyPatch, unacked: int, upto: int
) -> None:
    async def consumer_state(*_: object) -> ConsumerState:
        return ConsumerState(
            name="worker",
            pending=0,
            ack_pending=unacked,
            redelivered=0,
            waiting_pulls=1,
            delivered_stream_seq=9,
            ack_floor_stream_seq=5,
            filtered=False,
            paused=False,
        )

    async def state_of(*_: object) -> Made:
        return Made()

    monkeypatch.setattr(delivery_parts, "consumer_state", consumer_state)
    monkeypatch.setattr(delivery_parts, "state_of", state_of)
    nobody: Any = None
    lines: Any = Lines()
    routed = RoutedSoFar(nobody, lines, patience_s=60.0)
    assert await routed.upto() == {EPOCH: position(EPOCH, upto)}
