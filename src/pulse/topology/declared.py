"""The declared streams and consumers: the packaged JSON files, read and checked.

Every field that matters is required in every file, so that nothing depends on a server's default, and an unknown
field is refused: the `nats` CLI ignores it silently, and a typo would flip a setting. Durations are nanoseconds.
Field names and meanings are those of the JetStream API (https://docs.nats.io/reference/reference-protocols/nats_api_reference).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from pulse.domain.errors import ConfigurationError
from pulse.topology.subjects import overlap

T = TypeVar("T")

ObjectName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Nanoseconds = Annotated[int, Meta(ge=0)]
Limit = Annotated[int, Meta(ge=-1)]
"""-1 is unlimited."""


class StreamConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stream, in the API's own names; every field is part of the contract."""

    name: ObjectName
    description: str
    subjects: Annotated[tuple[str, ...], Meta(min_length=1)]
    retention: Literal["limits", "interest", "workqueue"]
    storage: Literal["file", "memory"]
    num_replicas: Literal[1, 3, 5]
    discard: Literal["old", "new"]
    discard_new_per_subject: bool
    max_age: Nanoseconds
    max_bytes: Annotated[int, Meta(ge=1)]
    max_msgs: Limit
    max_msgs_per_subject: Limit
    max_msg_size: Limit
    max_consumers: Limit
    duplicate_window: Nanoseconds
    compression: Literal["none", "s2"]
    allow_atomic: bool
    allow_msg_schedules: bool
    allow_direct: bool
    allow_rollup_hdrs: bool
    deny_delete: bool
    deny_purge: bool
    no_ack: bool
    sealed: bool


class ConsumerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A durable pull consumer, in the API's own names; every field is part of the contract."""

    name: ObjectName
    durable_name: ObjectName
    description: str
    deliver_policy: Literal["all", "new", "last", "last_per_subject"]
    ack_policy: Literal["explicit"]
    ack_wait: Annotated[int, Meta(gt=0)]
    max_deliver: Limit
    max_ack_pending: Limit
    max_waiting: Annotated[int, Meta(gt=0)]
    replay_policy: Literal["instant"]
    filter_subject: str
    headers_only: bool
    inactive_threshold: Nanoseconds
    num_replicas: Literal[0]
    """0 follows the stream, so that a stream that grows to three replicas takes its consumers along."""
    mem_storage: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredConsumer:
    """One consumer and the stream that it reads."""

    stream: str
    config: ConsumerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """All that Pulse needs on a JetStream account, in the order of the file names."""

    streams: tuple[StreamConfig, ...]
    consumers: tuple[DeclaredConsumer, ...]

    def stream_names(self) -> frozenset[str]:
        """The names of the declared streams."""
        return frozenset(stream.name for stream in self.streams)


def load(*, stream_replicas: Literal[1, 3, 5] = 1) -> Declared:
    """Read the packaged files; `stream_replicas` replaces `num_replicas` in every stream.

    Raises ConfigurationError, naming the file and the field, where a file is not as it should be.
    """
    folder = files(__package__)
    streams, consumers = (
        {entry.name: entry.read_bytes() for entry in folder.joinpath(kind).iterdir() if entry.name.endswith(".json")}
        for kind in ("streams", "consumers")
    )
    return parse(streams, consumers, stream_replicas=stream_replicas)


def parse(
    streams: Mapping[str, bytes], consumers: Mapping[str, bytes], *, stream_replicas: Literal[1, 3, 5] = 1
) -> Declared:
    """Check the files' contents, given by file name, each by itself and all together; see `load`."""
    declared = Declared(
        streams=tuple(
            msgspec.structs.replace(_stream(file, body), num_replicas=stream_replicas)
            for file, body in sorted(streams.items())
        ),
        consumers=tuple(_consumer(file, body) for file, body in sorted(consumers.items())),
    )
    for consumer in declared.consumers:
        if consumer.stream not in declared.stream_names():
            raise ConfigurationError(f"consumer {consumer.config.name} is declared for {consumer.stream}, which is not")
    for index, stream in enumerate(declared.streams):
        for other in declared.streams[index + 1 :]:
            if any(overlap(a, b) for a in stream.subjects for b in other.subjects):
                raise ConfigurationError(f"the declared streams {stream.name} and {other.name} share subjects")
    return declared


def _stream(file: str, body: bytes) -> StreamConfig:
    config = _decode(file, body, StreamConfig)
    if file != f"{config.name}.json":
        raise ConfigurationError(f"{file} declares the stream {config.name}: the two names must agree")
    if 0 < config.max_age < config.duplicate_window:
        raise ConfigurationError(f"{file}: duplicate_window must not be longer than max_age")
    if config.sealed:
        raise ConfigurationError(f"{file}: a sealed stream takes no message")
    return config


def _consumer(file: str, body: bytes) -> DeclaredConsumer:
    config = _decode(file, body, ConsumerConfig)
    stream, dot, rest = file.partition(".")
    if not dot or rest != f"{config.name}.json" or config.durable_name != config.name:
        raise ConfigurationError(f"{file} declares the consumer {config.name}: file, name and durable_name must agree")
    return DeclaredConsumer(stream=stream, config=config)


def _decode(file: str, body: bytes, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"{file}: {error}") from error
