"""The JetStream API as it is on the wire: one request, one typed answer.

nats-py's own calls know the fields of their day, and drop the others: reading a configuration with them and writing it
back loses settings. Source: https://docs.nats.io/reference/reference-protocols/nats_api_reference
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import TypeVar

import msgspec
import nats.errors
from nats.aio.client import Client

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import JetStreamRefusal
from pulse.domain.errors import ConfigurationError

T = TypeVar("T")

API = "$JS.API"
TIMEOUT_S = 5.0


class _Error(msgspec.Struct, frozen=True):
    code: int
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct, frozen=True):
    error: _Error | None = None


class StateAnswer(msgspec.Struct, frozen=True):
    """`state` of a stream; times as the server writes them."""

    messages: int
    bytes: int
    first_seq: int
    last_seq: int
    first_ts: str
    last_ts: str
    consumer_count: int
    num_subjects: int = 0
    num_deleted: int = 0
    deleted: tuple[int, ...] = ()
    subjects: dict[str, int] = {}


class StreamAnswer(msgspec.Struct, frozen=True):
    """STREAM.INFO, and an item of STREAM.LIST; `ts` is the server's time."""

    config: dict[str, object]
    created: str
    state: StateAnswer
    ts: str


class Delivered(msgspec.Struct, frozen=True):
    """A position of a consumer: in its own count, and in the stream."""

    consumer_seq: int
    stream_seq: int


class ConsumerAnswer(msgspec.Struct, frozen=True):
    """CONSUMER.INFO, and an item of CONSUMER.LIST."""

    name: str
    config: dict[str, object]
    delivered: Delivered
    ack_floor: Delivered
    num_ack_pending: int
    num_redelivered: int
    num_waiting: int
    num_pending: int
    paused: bool = False


async def request(
    client: Client,
    subject: str,
    body: Mapping[str, object],
    shape: type[T],
    *,
    doing: str,
    timeout_s: float = TIMEOUT_S,
) -> T:
    """Ask `$JS.API.<subject>` and decode the answer.

    Raises JetStreamRefusal for an error answer, ConfigurationError where this user may not ask, nats-py's own errors
    otherwise: call it within `errors.mapped`.
    """
    asked_at = time.monotonic()
    try:
        reply = await client.request(f"{API}.{subject}", msgspec.json.encode(body) if body else b"", timeout=timeout_s)
    except nats.errors.TimeoutError as error:
        denied = client.denied_since(asked_at) if isinstance(client, PulseClient) else ""
        if denied:
            raise ConfigurationError(
                f"{doing}: NATS says {denied}", hint="give the user of nats_url this permission"
            ) from error
        raise
    refused = msgspec.json.decode(reply.data, type=_Answer).error
    if refused is not None:
        raise JetStreamRefusal(
            code=refused.code, err_code=refused.err_code, description=refused.description, doing=doing
        )
    return msgspec.json.decode(reply.data, type=shape)


def time_ns(text: str) -> int:
    """Nanoseconds since 1970, exactly, of an RFC 3339 time with up to nine decimals; year 1 is Go's "never"."""
    head, dot, tail = text.partition(".")
    if not dot:
        return int(datetime.fromisoformat(text).timestamp()) * 1_000_000_000
    digits = len(tail) - len(tail.lstrip("0123456789"))
    seconds = int(datetime.fromisoformat(head + tail[digits:]).timestamp())
    return seconds * 1_000_000_000 + int(tail[:digits].ljust(9, "0")[:9])
