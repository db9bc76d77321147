"""Declared and actual → changes. Pure: what it needs of the server stands in `Actual`.

What is compared: see `compare.py`. What exists is adopted: an update sends the server's own configuration back with the
declared fields laid over it.

What is not ours (a stream or a consumer that is not declared) is never changed. It is named, and where its subjects
overlap with a declared stream's, that stream is blocked.

What is blocked. `BLOCKED_*` below are the changes that nats-server 2.15 refuses; a blocked change names its way out as
commands. Nothing of a plan may be applied while one of its changes is blocked.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from pulse.topology import cost as costs
from pulse.topology.actual import Actual, ActualConsumer, ActualStream
from pulse.topology.compare import CONSUMER_NEUTRAL, STREAM_NEUTRAL, Difference, differences, laid_over
from pulse.topology.cost import Cost
from pulse.topology.declared import Declared, DeclaredConsumer, StreamConfig
from pulse.topology.subjects import overlap

BLOCKED_STREAM_FIELDS = frozenset({"storage", "allow_msg_counter", "persist_mode"})
BLOCKED_STREAM_ONCE_TRUE = frozenset({"sealed", "deny_delete", "deny_purge"})
BLOCKED_CONSUMER_FIELDS = frozenset(
    {
        "deliver_policy",
        "ack_policy",
        "replay_policy",
        "max_waiting",
        "mem_storage",
        "deliver_subject",
        "deliver_group",
        "flow_control",
        "idle_heartbeat",
        "opt_start_seq",
        "opt_start_time",
    }
)

ATOMIC_BATCH_API_LEVEL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing to do, or one that cannot be done in place.

    `config` is the whole configuration to send; `stream` is the consumer's stream, or the stream itself. A blocked
    change says why in `reason` and how to get there in `way_out`, one command an item.
    """

    action: Literal["create", "update", "blocked"]
    kind: Literal["stream", "consumer"]
    stream: str
    name: str
    differences: tuple[Difference, ...] = ()
    cost: Cost = field(default_factory=Cost)
    config: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""
    way_out: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """What it changes, for people: `stream ROUTES`, `consumer ROUTES route-delivery`."""
        return f"stream {self.name}" if self.kind == "stream" else f"consumer {self.stream} {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do, in this order; empty `changes` mean that nothing is to do. `not_ours` is left alone."""

    changes: tuple[Change, ...]
    not_ours: tuple[str, ...]

    @property
    def blocked(self) -> tuple[Change, ...]:
        """The changes that the server would refuse."""
        return tuple(change for change in self.changes if change.action == "blocked")

    @property
    def costly(self) -> tuple[Change, ...]:
        """The changes that lose messages or reset a consumer."""
        return tuple(change for change in self.changes if change.action != "blocked" and change.cost)


def make_plan(declared: Declared, actual: Actual) -> Plan:
    """Compare; streams come before their consumers, and updates before creations, as they may free subjects."""
    streams = [change for stream in declared.streams if (change := _stream_change(stream, actual))]
    streams.sort(key=lambda change: change.action == "create")
    streams = _without_overlaps(streams, declared, actual)
    consumers = [change for consumer in declared.consumers if (change := _consumer_change(consumer, declared, actual))]
    return Plan(changes=(*streams, *consumers), not_ours=_not_ours(declared, actual))


def _stream_change(declared: StreamConfig, actual: Actual) -> Change | None:
    wanted = {**STREAM_NEUTRAL, **msgspec.to_builtins(declared)}
    found = actual.streams.get(declared.name)
    reason, way_out = _unsupported(declared, actual)
    if found is None:
        return Change(
            action="blocked" if reason else "create",
            kind="stream",
            stream=declared.name,
            name=declared.name,
            config={} if reason else msgspec.to_builtins(declared),
            reason=reason,
            way_out=way_out,
        )
    different = differences(wanted, found.config)
    if not different:
        return None
    fields = frozenset(difference.field for difference in different)
    immutable = [difference for difference in different if _immutable_in_stream(difference)]
    cost = costs.of_stream_update(declared, found, fields, now_ns=actual.now_ns)
    if immutable:
        names = ", ".join(difference.field for difference in immutable)
        reason, way_out = f"{names} cannot be changed in place", _make_stream_anew(declared.name)
        cost = costs.of_new_stream(found)
    return Change(
        action="blocked" if reason else "update",
        kind="stream",
        stream=declared.name,
        name=declared.name,
        differences=different,
        cost=cost,
        config={} if reason else laid_over(found.config, wanted, STREAM_NEUTRAL),
        reason=reason,
        way_out=way_out,
    )


def _unsupported(declared: StreamConfig, actual: Actual) -> tuple[str, tuple[str, ...]]:
    if declared.allow_atomic and actual.api_level < ATOMIC_BATCH_API_LEVEL:
        return "allow_atomic needs nats-server 2.12 or newer: upgrade it first", ("pulse streams apply",)
    if declared.num_replicas > 1 and not actual.clustered:
        return f"{declared.num_replicas} replicas need a cluster; this is a single server", (
            "pulse --set stream_replicas=1 streams apply",
        )
    return "", ()


def _immutable_in_stream(difference: Difference) -> bool:
    if difference.field == "retention":
        return "workqueue" in (difference.actual, difference.declared)
    once_true = difference.field in BLOCKED_STREAM_ONCE_TRUE and difference.actual is True
    return once_true or difference.field in BLOCKED_STREAM_FIELDS


def _make_stream_anew(name: str) -> tuple[str, ...]:
    return (
        f"nats stream backup {name} {name}.backup",
        f"nats stream rm {name} --force",
        "pulse streams apply",
    )


def _consumer_change(declared: DeclaredConsumer, plan_of: Declared, actual: Actual) -> Change | None:
    wanted = {**CONSUMER_NEUTRAL, **msgspec.to_builtins(declared.config)}
    stream = actual.streams.get(declared.stream, ActualStream(config={}))
    found = stream.consumers.get(declared.config.name)
    if found is None:
        rival = _rival_on_work_queue(declared, plan_of, stream)
        return Change(
            action="blocked" if rival else "create",
            kind="consumer",
            stream=declared.stream,
            name=declared.config.name,
            config={} if rival else msgspec.to_builtins(declared.config),
            reason=f"the consumer {rival} takes the same messages of this work queue" if rival else "",
            way_out=(f"nats consumer rm {declared.stream} {rival} --force", "pulse streams apply") if rival else (),
        )
    different = differences(wanted, found.config)
    if not different:
        return None
    return _consumer_update(declared, found, stream, different, wanted)


def _consumer_update(
    declared: DeclaredConsumer,
    found: ActualConsumer,
    stream: ActualStream,
    different: tuple[Difference, ...],
    wanted: Mapping[str, object],
) -> Change:
    name = declared.config.name
    immutable = ", ".join(difference.field for difference in different if difference.field in BLOCKED_CONSUMER_FIELDS)
    fields = frozenset(difference.field for difference in different)
    return Change(
        action="blocked" if immutable else "update",
        kind="consumer",
        stream=declared.stream,
        name=name,
        differences=different,
        cost=Cost(consumers_reset=(name,))
        if immutable
        else costs.of_consumer_update(declared.config, found, stream, fields),
        config={} if immutable else laid_over(found.config, wanted, CONSUMER_NEUTRAL),
        reason=f"{immutable} cannot be changed in place" if immutable else "",
        way_out=(f"nats consumer rm {declared.stream} {name} --force", "pulse streams apply") if immutable else (),
    )


def _rival_on_work_queue(declared: DeclaredConsumer, plan_of: Declared, stream: ActualStream) -> str | None:
    """Somebody else's consumer that keeps ours out: a work queue gives each message to one consumer (10099, 10100)."""
    retention = next(s.retention for s in plan_of.streams if s.name == declared.stream)
    if retention != "workqueue":
        return None
    mine = declared.config.filter_subject or ">"
    for name, consumer in sorted(stream.consumers.items()):
        if any(overlap(mine, theirs) for theirs in _filters(consumer.config)):
            return name
    return None


def _filters(config: Mapping[str, object]) -> list[str]:
    several = config.get("filter_subjects")
    if isinstance(several, list) and several:
        return [str(subject) for subject in several]
    return [str(config.get("filter_subject") or ">")]


def _without_overlaps(changes: list[Change], declared: Declared, actual: Actual) -> list[Change]:
    """Block each change that would claim a subject which another stream still has when its turn comes (10065)."""
    held = {name: _subjects(stream.config) for name, stream in actual.streams.items()}
    wanted = {stream.name: list(stream.subjects) for stream in declared.streams}
    checked = []
    for change in changes:
        clash = next(
            (
                other
                for other, subjects in sorted(held.items())
                if other != change.name and any(overlap(a, b) for a in wanted[change.name] for b in subjects)
            ),
            None,
        )
        takes_subjects = change.action == "create" or any(d.field == "subjects" for d in change.differences)
        if clash is not None and takes_subjects and change.action != "blocked":
            checked.append(_blocked_by(clash, held[clash], change, wanted[change.name]))
            continue
        held[change.name] = wanted[change.name]
        checked.append(change)
    return checked


def _blocked_by(other: str, theirs: list[str], change: Change, mine: list[str]) -> Change:
    rest = [subject for subject in theirs if not any(overlap(subject, own) for own in mine)]
    flags = " ".join(f"--subjects {shlex.quote(subject)}" for subject in rest)
    return Change(
        action="blocked",
        kind="stream",
        stream=change.stream,
        name=change.name,
        differences=change.differences,
        reason=f"its subjects overlap with those of the stream {other} ({', '.join(theirs)})",
        way_out=(f"nats stream edit {other} {flags} --force", "pulse streams apply")
        if rest
        else _make_stream_anew(other),
    )


def _not_ours(declared: Declared, actual: Actual) -> tuple[str, ...]:
    """What somebody else keeps here; consumers that go with their connection are nobody's to plan."""
    ours = {(consumer.stream, consumer.config.name) for consumer in declared.consumers}
    streams = [f"stream {name}" for name in sorted(actual.streams) if name not in declared.stream_names()]
    consumers = [
        f"consumer {stream} {name}"
        for stream in sorted(declared.stream_names() & actual.streams.keys())
        for name in sorted(actual.streams[stream].consumers)
        if (stream, name) not in ours and actual.streams[stream].consumers[name].config.get("durable_name")
    ]
    return (*streams, *consumers)


def _subjects(config: Mapping[str, object]) -> list[str]:
    subjects = config.get("subjects") or []
    return [str(subject) for subject in subjects] if isinstance(subjects, list | tuple) else []
