"""Up to when a consumer has taken in what its stream holds."""

from __future__ import annotations

import msgspec
from nats.aio.client import Client

from pulse.adapters.nats import jetstream
from pulse.adapters.nats.errors import ErrorCode, JetStreamRefusal, mapped
from pulse.adapters.nats.streams import consumer_state


class _Stored(msgspec.Struct, frozen=True):
    time: str


class _Got(msgspec.Struct, frozen=True):
    message: _Stored


async def heard_until_ms(client: Client, stream: str, consumer: str) -> int | None:
    """When the first message was stored that `consumer` has not acknowledged, in ms since 1970; None: there is none.

    Raises ConfigurationError where there is no such consumer, Outage where NATS is away.
    """
    state = await consumer_state(client, stream, consumer)
    if not state.pending and not state.ack_pending:
        return None
    doing = f"cannot read the oldest message of {stream}"
    first = {"seq": state.ack_floor_stream_seq + 1, "next_by_subj": ">"}
    with mapped(doing):
        try:
            got = await jetstream.request(client, f"STREAM.MSG.GET.{stream}", first, _Got, doing=doing)
        except JetStreamRefusal as refusal:
            if refusal.err_code != ErrorCode.NO_MESSAGE_FOUND:
                raise
            return None
    return jetstream.time_ns(got.message.time) // 1_000_000
