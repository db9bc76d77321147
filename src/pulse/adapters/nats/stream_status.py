"""The streams as declared and as they are; StreamStatusReader satisfies `services.control.Streams`."""

from __future__ import annotations

from collections.abc import Mapping

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import SYSTEM
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.streams import ConsumerState, StreamSurvey, survey
from pulse.domain.errors import Outage
from pulse.domain.stream_status import ConsumerStatus, Difference, Drift, StreamsStatus, StreamStatus
from pulse.topology.declared import Declared


class StreamStatusReader:
    """Reads all of `declared`."""

    def __init__(self, client: PulseClient, declared: Declared) -> None:
        self._client = client
        self._declared = declared

    async def status(self) -> StreamsStatus:
        """Both, now. Raises Outage, at once where the connection is lost."""
        if not self._client.is_connected:
            raise Outage(SYSTEM, "the connection to NATS is lost")
        plan = await Provisioner(self._client).plan(self._declared)
        surveys = [await survey(self._client, stream.name) for stream in self._declared.streams]
        drift = tuple(
            Drift(
                target=change.target,
                action=change.action,
                differences=tuple(
                    Difference(field=each.field, declared=each.declared, actual=each.actual)
                    for each in change.differences
                ),
                cost=str(change.cost) if change.cost else "",
            )
            for change in plan.changes
        )
        found = tuple(status_of(each) for each in surveys if each is not None)
        return StreamsStatus(as_declared=not drift, drift=drift, streams=found)


def status_of(found: StreamSurvey) -> StreamStatus:
    """What one stream holds, and how its consumers stand."""
    state = found.state
    age_ns = limit_of(found.config, "max_age")
    return StreamStatus(
        name=state.name,
        messages=state.messages,
        bytes=state.bytes,
        bytes_max=limit_of(found.config, "max_bytes"),
        keeps_acked=found.config.get("retention") == "limits",
        age_s_max=None if age_ns is None else age_ns / 1e9,
        oldest_age_s=None if state.first_ts_ns is None else max(0.0, (state.now_ns - state.first_ts_ns) / 1e9),
        first_seq=state.first_seq,
        last_seq=state.last_seq,
        deleted=state.deleted_count,
        replicas=state.replicas,
        created=state.created,
        consumers=tuple(consumer_status(each, state.last_seq) for each in found.consumers),
    )


def consumer_status(state: ConsumerState, last_seq: int) -> ConsumerStatus:
    """How a consumer of a stream stands whose last sequence is `last_seq`."""
    # A filter hides messages, so that the difference says nothing of losses.
    lost = 0 if state.filtered else max(0, last_seq - state.delivered_stream_seq - state.pending)
    return ConsumerStatus(
        name=state.name,
        pending=state.pending,
        ack_pending=state.ack_pending,
        redelivered=state.redelivered,
        lag=state.pending + state.ack_pending,
        lost=lost,
        waiting_pulls=state.waiting_pulls,
        paused=state.paused,
    )


def limit_of(config: Mapping[str, object], name: str) -> int | None:
    """A limit of a stream's configuration; None where there is none."""
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else None
