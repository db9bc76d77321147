"""What a stream holds and how its consumers stand, for the audit, the ingest worker's epochs and `pulse streams`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import msgspec
from nats.aio.client import Client

from pulse.adapters.nats import jetstream
from pulse.adapters.nats.errors import SYSTEM, ErrorCode, JetStreamRefusal, mapped
from pulse.adapters.nats.jetstream import ConsumerAnswer, StreamAnswer, time_ns
from pulse.domain.errors import Outage

SUBJECTS_MAX = 100_000
"""How many subjects one STREAM.INFO answers; beyond that they are not counted."""


class _ConsumersPage(msgspec.Struct, frozen=True):
    total: int
    consumers: list[ConsumerAnswer] | None = None
    missing: list[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """A stream at one moment; times in nanoseconds since 1970.

    `created_ns` names this making of the stream: one that was removed and made anew counts from 1 again under another
    `created_ns`. `first_seq` to `last_seq` less `deleted_count` are there. Empty: `first_seq == last_seq + 1`,
    or both 0 where there never was a message.
    """

    name: str
    created: str
    created_ns: int
    now_ns: int
    replicas: int
    messages: int
    bytes: int
    first_seq: int
    last_seq: int
    first_ts_ns: int | None
    last_ts_ns: int | None
    deleted_count: int
    deleted: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerState:
    """A consumer at one moment; `pending` is what it has yet to get, `ack_pending` what it got and has not settled."""

    name: str
    pending: int
    ack_pending: int
    redelivered: int
    waiting_pulls: int
    delivered_stream_seq: int
    ack_floor_stream_seq: int
    filtered: bool
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSurvey:
    """A stream with its configuration as the server has it, the fill of its subjects, and its durable consumers.

    Others come and go with whoever follows the stream for a while: no work waits for them.
    """

    config: Mapping[str, object]
    state: StreamState
    subject_messages: Mapping[str, int]
    consumers: tuple[ConsumerState, ...]


async def stream_state(
    client: Client, name: str, *, with_deleted: bool = False, timeout_s: float = jetstream.TIMEOUT_S
) -> StreamState:
    """The state of the stream `name`; `with_deleted` adds the sequences that are missing between first and last.

    The list of deleted sequences takes about ten bytes each on the wire: ask for it only to name them.
    Raises ConfigurationError where there is no such stream, Outage where NATS is away.
    """
    doing = f"cannot read the state of stream {name}"
    body = {"deleted_details": True} if with_deleted else {}
    with mapped(doing):
        answer = await jetstream.request(
            client, f"STREAM.INFO.{name}", body, StreamAnswer, doing=doing, timeout_s=timeout_s
        )
    return state_of(answer, with_deleted=with_deleted)


def state_of(answer: StreamAnswer, *, with_deleted: bool = False) -> StreamState:
    """The state that an answer of the API holds."""
    state = answer.state
    return StreamState(
        name=str(answer.config["name"]),
        created=answer.created,
        created_ns=time_ns(answer.created),
        now_ns=time_ns(answer.ts),
        replicas=int(str(answer.config["num_replicas"])),
        messages=state.messages,
        bytes=state.bytes,
        first_seq=state.first_seq,
        last_seq=state.last_seq,
        first_ts_ns=time_ns(state.first_ts) if state.messages else None,
        last_ts_ns=time_ns(state.last_ts) if state.messages else None,
        deleted_count=state.num_deleted,
        deleted=state.deleted if with_deleted else None,
    )


async def survey(client: Client, name: str, *, timeout_s: float = jetstream.TIMEOUT_S) -> StreamSurvey | None:
    """Everything about one stream, or None where there is none. Raises Outage where NATS is away.

    The stream is read before its consumers, so that what a consumer has is never behind what the stream held.
    """
    doing = f"cannot read stream {name}"
    with mapped(doing):
        try:
            stream = await jetstream.request(
                client, f"STREAM.INFO.{name}", {"subjects_filter": ">"}, StreamAnswer, doing=doing, timeout_s=timeout_s
            )
        except JetStreamRefusal as refusal:
            if refusal.err_code == ErrorCode.STREAM_NOT_FOUND:
                return None
            raise
        consumers = [
            _consumer_state(answer)
            async for answer in consumer_answers(client, name, timeout_s=timeout_s)
            if answer.config.get("durable_name")
        ]
    return StreamSurvey(
        config=stream.config,
        state=state_of(stream),
        subject_messages=stream.state.subjects,
        consumers=tuple(consumers),
    )


async def consumer_state(
    client: Client, stream: str, consumer: str, *, timeout_s: float = jetstream.TIMEOUT_S
) -> ConsumerState:
    """The state of one consumer. Raises ConfigurationError where there is none, Outage where NATS is away."""
    doing = f"cannot read the state of consumer {consumer} of {stream}"
    with mapped(doing):
        answer = await jetstream.request(
            client, f"CONSUMER.INFO.{stream}.{consumer}", {}, ConsumerAnswer, doing=doing, timeout_s=timeout_s
        )
    return _consumer_state(answer)


async def subject_messages(client: Client, name: str, *, timeout_s: float = jetstream.TIMEOUT_S) -> dict[str, int]:
    """The number of messages of each subject of a stream, of the first `SUBJECTS_MAX` subjects."""
    doing = f"cannot count the subjects of stream {name}"
    with mapped(doing):
        answer = await jetstream.request(
            client, f"STREAM.INFO.{name}", {"subjects_filter": ">"}, StreamAnswer, doing=doing, timeout_s=timeout_s
        )
    return answer.state.subjects


async def consumer_answers(client: Client, stream: str, *, timeout_s: float) -> AsyncIterator[ConsumerAnswer]:
    """The consumers of one stream, page by page, within `errors.mapped`; Outage where one of them has no leader."""
    offset, total = 0, 1
    doing = f"cannot list the consumers of {stream}"
    while offset < total:
        page = await jetstream.request(
            client, f"CONSUMER.LIST.{stream}", {"offset": offset}, _ConsumersPage, doing=doing, timeout_s=timeout_s
        )
        if page.missing:
            raise Outage(SYSTEM, f"the consumer {page.missing[0]} of {stream} has no leader")
        found = page.consumers or []
        for answer in found:
            yield answer
        offset, total = offset + max(1, len(found)), page.total


def _consumer_state(answer: ConsumerAnswer) -> ConsumerState:
    return ConsumerState(
        name=answer.name,
        pending=answer.num_pending,
        ack_pending=answer.num_ack_pending,
        redelivered=answer.num_redelivered,
        waiting_pulls=answer.num_waiting,
        delivered_stream_seq=answer.delivered.stream_seq,
        ack_floor_stream_seq=answer.ack_floor.stream_seq,
        filtered=bool(answer.config.get("filter_subject") or answer.config.get("filter_subjects")),
        paused=answer.paused,
    )
