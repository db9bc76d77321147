"""What a change does to the messages and consumers that are already there.

    change                              evicted, where the stream holds more than the new limit
    max_msgs                            exactly the surplus; nothing with `discard: new`
    max_bytes                           up to the surplus in the smallest records; nothing with `discard: new`
    max_msgs_per_subject                exactly, from the messages of each subject; else up to all but one limit
    max_age                             exactly, from the first sequence that is young enough; else up to all
    retention to `interest`             up to all: what every consumer has acknowledged goes

"Exactly" is at the time of the plan; messages that come and go meanwhile change it. Seen on nats-server 2.15: a
stream with `discard: new` keeps its surplus of messages and bytes, but not of messages per subject.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pulse.topology.actual import ActualConsumer, ActualStream
from pulse.topology.declared import ConsumerConfig, StreamConfig

RECORD_BYTES_MIN = 16
"""The least that JetStream counts for one message (memory store; the file store counts 30)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What applying a change loses; nothing, by default.

    `evicted`: messages that leave the stream; `exact` says whether it is that number or at most that number.
    `stranded`: at most so many messages stay in the stream but are not delivered any more.
    `consumers_reset`: consumers that begin anew, so that what is still stored is delivered again.
    """

    evicted: int = 0
    exact: bool = True
    stranded: int = 0
    consumers_reset: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.evicted or self.stranded or self.consumers_reset)

    def __str__(self) -> str:
        parts = []
        if self.evicted:
            parts.append(f"evicts {'' if self.exact else 'up to '}{self.evicted:,} messages")
        if self.stranded:
            parts.append(f"leaves up to {self.stranded:,} messages undelivered")
        if self.consumers_reset:
            parts.append(f"resets {', '.join(self.consumers_reset)}")
        return "; ".join(parts) or "nothing"


def of_stream_update(declared: StreamConfig, actual: ActualStream, fields: frozenset[str], *, now_ns: int) -> Cost:
    """The cost of bringing `fields` of an existing stream to what is declared."""
    if actual.messages == 0:
        return Cost()
    evictions: list[tuple[int, bool]] = []
    if "max_age" in fields and declared.max_age > 0:
        evictions.append(_too_old(declared, actual, now_ns))
    if fields & {"max_msgs", "discard"} and declared.discard == "old" and declared.max_msgs > 0:
        evictions.append((max(0, actual.messages - declared.max_msgs), True))
    if fields & {"max_bytes", "discard"} and declared.discard == "old":
        surplus = max(0, actual.bytes - declared.max_bytes)
        evictions.append((-(-surplus // RECORD_BYTES_MIN), surplus == 0))
    if "max_msgs_per_subject" in fields and declared.max_msgs_per_subject > 0:
        evictions.append(_too_many_of_a_subject(declared.max_msgs_per_subject, actual))
    if "retention" in fields and declared.retention == "interest":
        evictions.append((actual.messages, False))
    return _together([found for found in evictions if found[0]], actual.messages)


def of_consumer_update(
    declared: ConsumerConfig, actual: ActualConsumer, stream: ActualStream, fields: frozenset[str]
) -> Cost:
    """The cost of bringing `fields` of an existing consumer to what is declared.

    A new filter does not look back: what the old one hid, up to the consumer's position, is not delivered. A lower
    `max_deliver` gives up messages that have had so many tries.
    """
    stranded = 0
    if fields & {"filter_subject", "filter_subjects"}:
        stranded += max(0, min(stream.messages, actual.delivered_stream_seq - stream.first_seq + 1))
    if "max_deliver" in fields and declared.max_deliver > 0:
        before = _integer(actual.config, "max_deliver")
        if before <= 0 or before > declared.max_deliver:
            stranded += actual.ack_pending if declared.max_deliver == 1 else actual.redelivered
    return Cost(stranded=min(stranded, stream.messages))


def of_new_stream(actual: ActualStream) -> Cost:
    """The cost of removing a stream to make it anew: everything in it, unless it is backed up first."""
    return Cost(evicted=actual.messages, consumers_reset=tuple(sorted(actual.consumers)))


def _too_old(declared: StreamConfig, actual: ActualStream, now_ns: int) -> tuple[int, bool]:
    oldest_kept_ns = now_ns - declared.max_age
    if actual.first_ts_ns >= oldest_kept_ns:
        return 0, True
    if actual.last_ts_ns < oldest_kept_ns:
        return actual.messages, True
    if actual.first_kept_seq is None:
        return actual.messages, False
    return min(actual.messages, actual.first_kept_seq - actual.first_seq), actual.deleted == 0


def _too_many_of_a_subject(limit: int, actual: ActualStream) -> tuple[int, bool]:
    if actual.subject_messages is not None:
        return sum(max(0, messages - limit) for messages in actual.subject_messages), True
    surplus = max(0, actual.messages - limit)
    return surplus, surplus == 0 or actual.subjects == 1


def _together(evictions: list[tuple[int, bool]], messages: int) -> Cost:
    """Limits evict from the same end, so their sum is a bound; one limit alone, or all messages, is exact."""
    total = min(messages, sum(evicted for evicted, _ in evictions))
    every = any(exact and evicted >= messages for evicted, exact in evictions)
    exact = every or (len(evictions) <= 1 and all(exact for _, exact in evictions))
    return Cost(evicted=total, exact=exact)


def _integer(config: Mapping[str, object], name: str) -> int:
    value = config.get(name, 0)
    return value if isinstance(value, int) else 0
