"""What nats-server's own MQTT listener keeps for devices that are away: it would keep all of it, without end.

It stands in the stream `$MQTT_msgs`, beside what devices have said and the bridge has not taken yet. A limit of that
stream would refuse, or throw away, either; once it has filled the store, JetStream takes nothing of anybody. So the
queues of what is said to devices are cut, and only these. A device is told at least once what it can ask for again: its
shadow, and commands, which are sent once more when it is heard of.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from nats.aio.client import Client

from pulse.adapters.nats import jetstream
from pulse.adapters.nats.errors import ErrorCode, JetStreamRefusal, mapped
from pulse.adapters.nats.jetstream import StreamAnswer

STREAM = "$MQTT_msgs"
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
        subjects = f"$MQTT.msgs.tenant.*.device.*.{topic.replace('/', '.')}"
        doing = f"cannot cut the queues of {topic}"
        with mapped(doing):
            try:
                found = await jetstream.request(
                    client, f"STREAM.INFO.{STREAM}", {"subjects_filter": subjects}, StreamAnswer, doing=doing
                )
            except JetStreamRefusal as refusal:
                if refusal.err_code != ErrorCode.STREAM_NOT_FOUND:
                    raise
                return cut
            kept = queue_max if found.state.bytes < crowded_bytes else queue_max_crowded
            for subject, count in found.state.subjects.items():
                if count > kept:
                    purge = {"filter": subject, "keep": kept}
                    done = await jetstream.request(client, f"STREAM.PURGE.{STREAM}", purge, _Purged, doing=doing)
                    cut += done.purged
    return cut
