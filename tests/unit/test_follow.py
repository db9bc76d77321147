"""What a follower of a stream makes of what the server sends it."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from pulse.adapters.nats import follow
from pulse.adapters.nats.follow import Following, Interrupted


class Wire:
    """A following whose server is the test."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.queue: asyncio.Queue[Msg] = asyncio.Queue()
        self.following = Following(cast(Client, self), self.queue, pending=0, stream_created="")

    async def publish(self, subject: str, payload: bytes = b"") -> None:
        self.published.append(subject)

    def message(self, consumer_sequence: int, *, sequence: int = 0, pending: int = 0, domain: bool = False) -> None:
        origin = "hub.ACCOUNT." if domain else ""
        reply = f"$JS.ACK.{origin}S.C.1.{sequence}.{consumer_sequence}.1700000000000000000.{pending}"
        self._put(Msg(_client=cast(Client, self), subject="a.b", reply=reply + (".x" if domain else ""), data=b"body"))

    def control(self, *, reply: str = "", **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._put(Msg(_client=cast(Client, self), subject="inbox", reply=reply, headers=named))

    def _put(self, message: Msg) -> None:
        self.queue.put_nowait(message)


async def test_messages_come_with_their_sequence_and_how_many_are_behind_them() -> None:
    wire = Wire()
    wire.message(1, sequence=7, pending=1)
    wire.message(2, sequence=9, pending=0, domain=True)
    read = await wire.following.read()
    assert [(message.sequence, message.pending, message.data) for message in read] == [(7, 1, b"body"), (9, 0, b"body")]


async def test_a_message_that_was_lost_on_the_way_interrupts() -> None:
    wire = Wire()
    wire.message(1)
    wire.message(3)
    with pytest.raises(Interrupted, match="message 2"):
        await wire.following.read()


async def test_a_heartbeat_that_has_seen_more_messages_than_we_interrupts() -> None:
    wire = Wire()
    wire.message(1)
    wire.control(Status="100", Nats_Last_Consumer="2")
    with pytest.raises(Interrupted, match="last messages"):
        await wire.following.read()


async def test_a_heartbeat_says_that_nothing_waits() -> None:
    wire = Wire()
    wire.control(Status="100", Nats_Last_Consumer="0")
    assert await wire.following.read() == []


async def test_flow_control_is_answered_when_what_came_before_was_taken() -> None:
    wire = Wire()
    wire.control(Status="100", reply="flow.1")
    wire.control(Status="100", Nats_Consumer_Stalled="flow.2")
    wire.message(1)
    assert len(await wire.following.read()) == 1
    assert wire.published == ["flow.1", "flow.2"]


async def test_flow_control_alone_is_no_word_that_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "SILENCE_S_MAX", 0.01)
    wire = Wire()
    wire.control(Status="100", Nats_Consumer_Stalled="flow.2")
    with pytest.raises(Interrupted, match="no heartbeat"):
        await wire.following.read()


async def test_any_other_status_interrupts() -> None:
    wire = Wire()
    wire.control(Status="409")
    with pytest.raises(Interrupted, match="409"):
        await wire.following.read()
