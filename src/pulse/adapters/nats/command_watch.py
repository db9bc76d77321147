"""Tells of each command, and each rejected answer to one, that passes through DOWN: plain subscriptions beside it.

One for all devices of a gateway: frames cost a microsecond each, and a subscription for each device that waits would
come and go with every poll. Nothing is kept of what passes while the connection is lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import mapped
from pulse.adapters.nats.frames import Frame, FrameSubscription, subscribe
from pulse.domain.downward import ACK_REJECTED, COMMANDS, PREFIX

SUBJECT = f"{PREFIX}.*.*.{COMMANDS}"
REJECTED = f"{PREFIX}.*.*.{ACK_REJECTED.replace('/', '.')}"


@asynccontextmanager
async def command_watch(client: PulseClient, told: Callable[[tuple[str, str], bytes], None]) -> AsyncIterator[None]:
    """Within it `told` gets (tenant id, device id) of each command, and what it hears of each answer that is rejected.

    It must not raise. Raises Outage.
    """

    def commanded(frames: list[Frame]) -> None:
        for subject, *_ in frames:
            told(_device(subject), b"")

    def rejected(frames: list[Frame]) -> None:
        for subject, _, _, document in frames:
            told(_device(subject), document)

    async with AsyncExitStack() as stack:
        with mapped("cannot listen for commands"):
            for what, receive in ((SUBJECT, commanded), (REJECTED, rejected)):
                stack.push_async_callback(_end, client, await subscribe(client, what, receive))
        yield


async def _end(client: PulseClient, subscription: FrameSubscription) -> None:
    if not client.is_closed:
        with mapped("cannot end listening for commands"):
            await subscription.unsubscribe()


def _device(subject: bytes) -> tuple[str, str]:
    _, tenant_id, device_id, *_ = subject.decode("utf-8", "surrogateescape").split(".")
    return tenant_id, device_id
