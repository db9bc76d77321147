"""What nats-server's own MQTT listener keeps for devices that are away: it would keep all of it, without end.

It stands in the stream `$MQTT_msgs`, beside what devices have said and the bridge has not taken yet. A limit of that
stream would refuse, or throw away, either; once it has filled the store, JetStream takes nothing of anybody. So the
queues of what is said to devices, and of what routes republish, are cut, and only these. A device is told at least once
what it can ask for again: its shadow, and commands, which are sent once more when it is heard of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from nats.aio.client import Client

from pulse.adapters.nats import jetstream
from pulse.adapters.nats.errors import ErrorCode, JetStreamRefusal, mapped
from pulse.adapters.nats.jetstream import StreamAnswer

STREAM = "$MQTT_msgs"
MESSAGES = "$MQTT.msgs."
DOING = "cannot cut the queues of the MQTT listener"
QUEUE_MAX = 1000
"""Messages that are kept of each topic of a device: as many as commands that may wait for it."""
CROWDED_BYTES = 1024**3
"""Of all that the listener keeps: from here on a queue has to be shorter."""
QUEUE_MAX_CROWDED = 50


class _Purged(msgspec.Struct, frozen=True):
    purged: int


async def cut_queues(
    client: Client,
    topics: Sequence[str],
    *,
    queue_max: int = QUEUE_MAX,
    queue_max_crowded: int = QUEUE_MAX_CROWDED,
    crowded_bytes: int = CROWDED_BYTES,
) -> int:
    """Keep the last messages of each device's `topics`, which are below its prefix; returns how many were thrown away.

    There are a thousand queues at most, as many as the server has subscriptions. Raises Outage.
    """
    cut = 0
    for topic in topics:
        found = await _kept(client, f"{MESSAGES}tenant.*.device.*.{topic.replace('/', '.')}")
        kept = queue_max if found.bytes < crowded_bytes else queue_max_crowded
        for subject, count in found.subjects.items():
            if count > kept:
                cut += await _purge(client, subject, kept)
    return cut


async def cut_route_queues(
    client: Client,
    *,
    queue_max: int = QUEUE_MAX,
    queue_max_crowded: int = QUEUE_MAX_CROWDED,
    crowded_bytes: int = CROWDED_BYTES,
) -> int:
    """The same of what routes republish: the last messages of each tenant, as its topics are of its own choice."""
    found = await _kept(client, f"{MESSAGES}tenant.*.route.>")
    kept = queue_max if found.bytes < crowded_bytes else queue_max_crowded
    counts: Counter[str] = Counter()
    for subject, count in found.subjects.items():
        counts[subject.removeprefix(MESSAGES).split(".")[1]] += count
    cut = 0
    for tenant_id, count in counts.items():
        if count > kept:
            cut += await _purge(client, f"{MESSAGES}tenant.{tenant_id}.route.>", kept)
    return cut


class _Kept(NamedTuple):
    """The bytes of all that the listener keeps, and how many messages of each subject that was asked for."""

    bytes: int
    subjects: Mapping[str, int]


async def _kept(client: Client, subjects: str) -> _Kept:
    with mapped(DOING):
        try:
            found = await jetstream.request(
                client, f"STREAM.INFO.{STREAM}", {"subjects_filter": subjects}, StreamAnswer, doing=DOING
            )
        except JetStreamRefusal as refusal:
            if refusal.err_code != ErrorCode.STREAM_NOT_FOUND:
                raise
            return _Kept(0, {})
    return _Kept(found.state.bytes, found.state.subjects)


async def _purge(client: Client, subject: str, kept: int) -> int:
    with mapped(DOING):
        purge = {"filter": subject, "keep": kept}
        done = await jetstream.request(client, f"STREAM.PURGE.{STREAM}", purge, _Purged, doing=DOING)
    return done.purged
