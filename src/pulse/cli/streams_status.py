"""What a survey of a stream means: how full it is, how far its consumers are behind, what is about to be lost. Pure.

warning                                     when
full                                        bytes at 80 % of max_bytes
a subject is full                           it holds 80 % of max_msgs_per_subject, and older ones give way
expires unprocessed                         the oldest message is not acknowledged and at 80 % of max_age
gone before it was delivered                last_seq − delivered − pending > 0: it expired or was evicted
nobody pulls                                messages wait, no pull waits, and nothing is out for acknowledgement
paused                                      the consumer is
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pulse.adapters.nats.stream_status import consumer_status, limit_of
from pulse.adapters.nats.streams import StreamSurvey
from pulse.domain.stream_status import ConsumerStatus

ALARM_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStatus:
    """One stream; a share is 0 to 1 of a limit, None where there is no limit or nothing to measure."""

    name: str
    messages: int
    bytes: int
    bytes_share: float | None
    fullest_subject: str | None
    fullest_subject_share: float | None
    first_seq: int
    last_seq: int
    deleted: int
    oldest_age_s: float | None
    age_share: float | None
    created: str
    consumers: tuple[ConsumerStatus, ...]
    warnings: tuple[str, ...]


def status_of(survey: StreamSurvey) -> StreamStatus:
    """Shares, lags and warnings of one stream."""
    state, config = survey.state, survey.config
    age_s = None if state.first_ts_ns is None else max(0.0, (state.now_ns - state.first_ts_ns) / 1e9)
    fullest = max(survey.subject_messages, key=lambda subject: survey.subject_messages[subject], default=None)
    gives_way = config.get("discard") == "old"
    subject_limit = limit_of(config, "max_msgs_per_subject") if gives_way else None
    consumers = tuple(consumer_status(consumer, state.last_seq) for consumer in survey.consumers)
    shares = {
        "bytes": _share(state.bytes, limit_of(config, "max_bytes")),
        "subject": None if fullest is None else _share(survey.subject_messages[fullest], subject_limit),
        "age": _share(age_s, _seconds(limit_of(config, "max_age"))),
    }
    return StreamStatus(
        name=state.name,
        messages=state.messages,
        bytes=state.bytes,
        bytes_share=shares["bytes"],
        fullest_subject=fullest,
        fullest_subject_share=shares["subject"],
        first_seq=state.first_seq,
        last_seq=state.last_seq,
        deleted=state.deleted_count,
        oldest_age_s=age_s,
        age_share=shares["age"],
        created=state.created,
        consumers=consumers,
        warnings=tuple(_warnings(survey, shares, fullest, consumers)),
    )


def duration_text(seconds: float) -> str:
    """For people: the two largest units, `2d 3h`, `1h`, `4m 5s`, `0.5s`."""
    if seconds < 1:
        return f"{seconds:.3g}s"
    left = int(seconds)
    parts = []
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def bytes_text(count: int) -> str:
    """For people, in powers of 1024: `512 MiB`, `1.5 GiB`, `17 B`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _warnings(
    survey: StreamSurvey, shares: Mapping[str, float | None], fullest: str | None, consumers: tuple[ConsumerStatus, ...]
) -> list[str]:
    warnings = []
    evicts = survey.config.get("discard") == "old"
    if (shares["bytes"] or 0) >= ALARM_SHARE:
        then = "old messages give way to new ones" if evicts else "publishers are refused"
        warnings.append(f"{shares['bytes']:.0%} of its bytes are used; at 100% {then}")
    if (shares["subject"] or 0) >= ALARM_SHARE:
        warnings.append(f"{fullest} holds {shares['subject']:.0%} of its limit; at 100% its old messages give way")
    for consumer, state in zip(consumers, survey.consumers, strict=True):
        head_is_unsettled = consumer.lag > 0 and state.ack_floor_stream_seq < survey.state.first_seq
        if head_is_unsettled and (shares["age"] or 0) >= ALARM_SHARE:
            warnings.append(f"{consumer.name} has not processed the oldest message, at {shares['age']:.0%} of its life")
        if consumer.lost:
            warnings.append(f"{consumer.lost:,} messages were gone before {consumer.name} got them")
        if consumer.paused:
            warnings.append(f"{consumer.name} is paused")
        elif consumer.pending and not consumer.waiting_pulls and not consumer.ack_pending:
            warnings.append(f"nobody pulls from {consumer.name}, and {consumer.pending:,} messages wait")
    return warnings


def _share(value: float | None, limit: float | None) -> float | None:
    return None if value is None or limit is None else value / limit


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9
