"""How full the streams are and how far their workers have come, cheap enough to be asked every second.

Two requests a stream; unlike `stream_status` it neither counts subjects nor compares configurations.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from pulse.adapters.nats import jetstream
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import SYSTEM, ErrorCode, JetStreamRefusal, mapped
from pulse.adapters.nats.jetstream import ConsumerAnswer, StreamAnswer
from pulse.adapters.nats.stream_status import limit_of
from pulse.adapters.nats.streams import state_of
from pulse.domain.errors import Outage
from pulse.domain.pipeline import StreamLevel

TIMEOUT_S = 2.0


class StreamLevelReader:
    """Reads `consumer_of`: streams in their order, each with its work's consumer; satisfies `pipeline.Levels`."""

    def __init__(self, client: PulseClient, consumer_of: Sequence[tuple[str, str | None]]) -> None:
        self._client = client
        self._consumer_of = consumer_of

    async def levels(self) -> Mapping[str, StreamLevel]:
        """Each stream that is there. Raises Outage, at once where the connection is lost."""
        if not self._client.is_connected:
            raise Outage(SYSTEM, "the connection to NATS is lost")
        found = await asyncio.gather(*(self._level(*each) for each in self._consumer_of))
        return {level.name: level for level in found if level is not None}

    async def _level(self, stream: str, consumer: str | None) -> StreamLevel | None:
        doing = f"cannot read the level of {stream}"
        with mapped(doing):
            try:
                answer = await jetstream.request(
                    self._client, f"STREAM.INFO.{stream}", {}, StreamAnswer, doing=doing, timeout_s=TIMEOUT_S
                )
            except JetStreamRefusal as refusal:
                if refusal.err_code == ErrorCode.STREAM_NOT_FOUND:
                    return None
                raise
            worker = None if consumer is None else await self._consumer(stream, consumer, doing)
        state = state_of(answer)
        age_s = None if state.first_ts_ns is None else max(0.0, (state.now_ns - state.first_ts_ns) / 1e9)
        return StreamLevel(
            name=stream,
            created=state.created,
            messages=state.messages,
            bytes=state.bytes,
            bytes_max=limit_of(answer.config, "max_bytes"),
            # A message may come between the two answers.
            last_seq=max(state.last_seq, worker.delivered.stream_seq if worker is not None else 0),
            oldest_age_s=age_s,
            consumer=None if worker is None else consumer,
            pending=0 if worker is None else worker.num_pending,
            ack_pending=0 if worker is None else worker.num_ack_pending,
            redelivered=0 if worker is None else worker.num_redelivered,
            waiting_pulls=0 if worker is None else worker.num_waiting,
        )

    async def _consumer(self, stream: str, consumer: str, doing: str) -> ConsumerAnswer | None:
        """Within `mapped`."""
        try:
            return await jetstream.request(
                self._client, f"CONSUMER.INFO.{stream}.{consumer}", {}, ConsumerAnswer, doing=doing, timeout_s=TIMEOUT_S
            )
        except JetStreamRefusal as refusal:
            if refusal.err_code == ErrorCode.CONSUMER_NOT_FOUND:
                return None
            raise
