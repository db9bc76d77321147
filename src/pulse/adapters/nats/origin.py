"""The streams that dead letters come from: one message by its sequence, and its replay."""

from __future__ import annotations

import base64

import msgspec
from nats.aio.client import Client

from pulse.adapters.nats import jetstream
from pulse.adapters.nats.errors import IS_IT_RUNNING, SYSTEM, ErrorCode, JetStreamRefusal, mapped
from pulse.domain.batching import Ack, Verdict, judge
from pulse.domain.dead_letter import Replay
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.receipt import Receipt
from pulse.domain.settlement import Message

HEADER_BYTES_MAX = 4096
"""What a replay's headers and subject may add to its body."""
EXPECTED_STREAM = "Nats-Expected-Stream"
PUBLISH_TIMEOUT_S = 5.0


class _Stored(msgspec.Struct, frozen=True):
    subject: str
    seq: int
    time: str
    data: bytes = b""
    hdrs: str = ""


class _Got(msgspec.Struct, frozen=True):
    message: _Stored


class _Deleted(msgspec.Struct, frozen=True):
    success: bool


class OriginStreams:
    """Reads, deletes and publishes single messages; satisfies `services.rescue.Origin` and `dead_letters.Publisher`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def read(self, stream: str, sequence: int) -> tuple[int, Message | None] | None:
        """When `stream` was made, in ns since 1970, and its message; None for a message, or a stream, that is gone.

        Asked of the stream's leader: a replica may not have heard yet. Raises Outage, also where the stream is being
        made anew at this moment.
        """
        doing = f"cannot read message {sequence} of {stream}"
        with mapped(doing):
            try:
                before = await self._created_ns(stream)
                message = await self._get(stream, sequence, doing)
                after = await self._created_ns(stream)
            except JetStreamRefusal as refusal:
                if refusal.err_code == ErrorCode.STREAM_NOT_FOUND:
                    return None
                raise
        if before != after:
            raise Outage(SYSTEM, f"stream {stream} is being made anew")
        return after, message

    async def delete(self, stream: str, sequence: int) -> None:
        """Let the stream forget a message; nothing where it, or the stream, is gone. Raises Outage."""
        doing = f"cannot delete message {sequence} of {stream}"
        body = {"seq": sequence, "no_erase": True}
        with mapped(doing):
            try:
                await jetstream.request(self._client, f"STREAM.MSG.DELETE.{stream}", body, _Deleted, doing=doing)
            except JetStreamRefusal as refusal:
                if refusal.err_code not in (ErrorCode.SEQUENCE_NOT_FOUND, ErrorCode.STREAM_NOT_FOUND):
                    raise

    async def publish(self, replay: Replay) -> Receipt:
        """Store the message of `replay` in its stream, and in no other; returns JetStream's word.

        Raises Outage where no answer comes or the stream is full, Refusal where it can never be taken.
        """
        doing = f"cannot replay dead letter {replay.letter_id}"
        if len(replay.body) + HEADER_BYTES_MAX > self._client.max_payload:
            raise Refusal(Reason.TOO_LARGE, f"{len(replay.body)} bytes are more than NATS carries in one message")
        headers = {**replay.headers, EXPECTED_STREAM: replay.stream}
        with mapped(doing):
            reply = await self._client.request(replay.subject, replay.body, timeout=PUBLISH_TIMEOUT_S, headers=headers)
        ack = msgspec.json.decode(reply.data, type=Ack)
        verdict = judge(ack, 1)
        if verdict is Verdict.STORED:
            return Receipt(ack.stream, ack.seq, duplicate=ack.duplicate)
        said = ack.error.description if ack.error else "no reason given"
        if verdict in (Verdict.FULL, Verdict.LATER):
            raise Outage(SYSTEM, f"stream {replay.stream} does not take it: {said}", hint=IS_IT_RUNNING)
        raise Refusal(Reason.CONFLICT, f"stream {replay.stream} does not take it: {said}")

    async def _get(self, stream: str, sequence: int, doing: str) -> Message | None:
        try:
            got = await jetstream.request(
                self._client, f"STREAM.MSG.GET.{stream}", {"seq": sequence}, _Got, doing=doing
            )
        except JetStreamRefusal as refusal:
            if refusal.err_code != ErrorCode.NO_MESSAGE_FOUND:
                raise
            return None
        stored = got.message
        return Message(
            subject=stored.subject,
            body=stored.data,
            headers=base64.b64decode(stored.hdrs),
            reply="",
            sequence=stored.seq,
            published_ns=jetstream.time_ns(stored.time),
            attempts=0,
        )

    async def _created_ns(self, stream: str) -> int:
        """Within `mapped`; JetStreamRefusal where there is no such stream."""
        answer = await jetstream.request(
            self._client, f"STREAM.INFO.{stream}", {}, jetstream.StreamAnswer, doing=f"cannot read stream {stream}"
        )
        return jetstream.time_ns(answer.created)
