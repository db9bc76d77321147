"""What the audit asks of a stream; satisfies `services.audit.StreamReader`."""

from __future__ import annotations

from collections.abc import Mapping

from nats.aio.client import Client

from pulse.adapters.nats import streams
from pulse.domain.audit import StreamReading


class AuditReader:
    """Reads streams and the one consumer of each that settles its messages, by `consumer_of`."""

    def __init__(self, client: Client, *, consumer_of: Mapping[str, str]) -> None:
        self._client = client
        self._consumer_of = consumer_of

    async def read(self, stream: str) -> StreamReading:
        """Both as they are now. Raises Outage, and ConfigurationError where the stream does not exist.

        The consumer is read first: what it had delivered by then is at most what the stream had accepted.
        """
        consumer = await streams.consumer_state(self._client, stream, self._consumer_of[stream])
        state = await streams.stream_state(self._client, stream)
        if state.deleted_count:
            state = await streams.stream_state(self._client, stream, with_deleted=True)
        return StreamReading(
            created_ns=state.created_ns,
            first_seq=state.first_seq,
            last_seq=state.last_seq,
            deleted=state.deleted or (),
            delivered_seq=consumer.delivered_stream_seq,
            ack_pending=consumer.ack_pending,
        )
