"""Tells of each command that passes through DOWN, as it is published: a plain subscription beside the stream.

One for all devices of a gateway: frames cost a microsecond each, and a subscription for each device that waits would
come and go with every poll. Nothing is kept of a command that passes while the connection is lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import mapped
from pulse.adapters.nats.frames import Frame, subscribe
from pulse.domain.downward import COMMANDS, PREFIX

SUBJECT = f"{PREFIX}.*.*.{COMMANDS}"


@asynccontextmanager
async def command_watch(client: PulseClient, told: Callable[[tuple[str, str]], None]) -> AsyncIterator[None]:
    """Within it `told` gets (tenant id, device id) of each command; it must not raise. Raises Outage."""

    def receive(frames: list[Frame]) -> None:
        for subject, *_ in frames:
            _, tenant_id, device_id, _ = subject.decode("utf-8", "surrogateescape").split(".")
            told((tenant_id, device_id))

    with mapped("cannot listen for commands"):
        subscription = await subscribe(client, SUBJECT, receive)
    try:
        yield
    finally:
        if not client.is_closed:
            with mapped("cannot end listening for commands"):
                await subscription.unsubscribe()
