"""The planner against a model of the server: what it changes, blocks, leaves alone, and what it says that costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.topology.actual import Actual, ActualConsumer, ActualStream
from pulse.topology.compare import CONSUMER_NEUTRAL, STREAM_NEUTRAL
from pulse.topology.declared import load
from pulse.topology.plan import Change, Plan, make_plan

DECLARED = load()
STREAMS = {stream.name: stream for stream in DECLARED.streams}
EMPTY = Actual(streams={}, now_ns=0, api_level=2, clustered=False)
HOUR_NS = 3600 * 10**9
NOW_NS = 1_800_000_000 * 10**9

SERVER_METADATA = {"_nats.level": "5", "_nats.ver": "2.15.1"}


def as_the_server_reports(config: Mapping[str, object]) -> dict[str, object]:
    """Zero values left out, lists as lists, the server's own metadata added."""
    plain = msgspec.to_builtins(dict(config))
    metadata = {**plain.pop("metadata", {}), **SERVER_METADATA}
    return {key: value for key, value in plain.items() if value not in (False, "", None, [], {})} | {
        "metadata": metadata
    }


def applied(plan: Plan, actual: Actual) -> Actual:
    """What a server would have after doing all that is not blocked."""
    streams = dict(actual.streams)
    for change in plan.changes:
        if change.action == "blocked":
            continue
        config = as_the_server_reports(change.config)
        found = streams.get(change.stream, ActualStream(config=config))
        if change.kind == "stream":
            streams[change.name] = replace(found, config=config)
        else:
            consumers = {**found.consumers, change.name: ActualConsumer(config=config)}
            streams[change.stream] = replace(found, consumers=consumers)
    return replace(actual, streams=streams)


IN_STEP = applied(make_plan(DECLARED, EMPTY), replace(EMPTY, now_ns=NOW_NS))


def with_stream(
    name: str, actual: Actual = IN_STEP, /, *, state: Mapping[str, Any] | None = None, **config: Any
) -> Actual:
    """The server with fields of one stream's configuration (`...` removes one) and state replaced."""
    found = actual.streams[name]
    changed = {key: value for key, value in {**found.config, **config}.items() if value is not ...}
    return replace(actual, streams={**actual.streams, name: replace(found, config=changed, **(state or {}))})


def with_consumer(stream: str, name: str, /, **config: Any) -> Actual:
    found = IN_STEP.streams[stream]
    consumer = found.consumers[name]
    changed = {key: value for key, value in {**consumer.config, **config}.items() if value is not ...}
    consumers = {**found.consumers, name: replace(consumer, config=changed)}
    return replace(IN_STEP, streams={**IN_STEP.streams, stream: replace(found, consumers=consumers)})


def only(plan: Plan) -> Change:
    [change] = plan.changes
    return change


def test_an_empty_server_gets_every_stream_before_any_consumer() -> None:
    plan = make_plan(DECLARED, EMPTY)
    kinds = [change.kind for change in plan.changes]
    assert kinds == ["stream"] * len(DECLARED.streams) + ["consumer"] * len(DECLARED.consumers)
    assert {change.action for change in plan.changes} == {"create"}
    assert not plan.costly


def test_what_the_plan_made_needs_no_plan() -> None:
    assert make_plan(DECLARED, IN_STEP) == Plan(changes=(), not_ours=())


UPDATABLE: dict[str, Any] = {
    "description": "something else",
    "max_age": HOUR_NS * 5,
    "max_bytes": 1 << 31,
    "max_msgs": 17,
    "max_msgs_per_subject": 12,
    "max_msg_size": 1000,
    "max_consumers": 5,
    "discard": "new",
    "duplicate_window": 30 * 10**9,
    "compression": "s2",
    "allow_atomic": ...,
    "allow_direct": ...,
    "allow_rollup_hdrs": True,
    "no_ack": True,
    "subjects": ["telemetry.>", "more.>"],
    "retention": "interest",
    "num_replicas": 3,
    "discard_new_per_subject": True,
    "sources": [{"name": "OTHER"}],
    "mirror": {"name": "OTHER"},
    "subject_transform": {"src": "telemetry.>", "dest": "t.>"},
    "subject_delete_marker_ttl": 10**9,
    "consumer_limits": {"max_ack_pending": 5},
}


@pytest.mark.parametrize("field", UPDATABLE)
def test_a_field_that_drifted_is_updated_and_shown(field: str) -> None:
    actual = with_stream("TELEMETRY", **{field: UPDATABLE[field]})
    plan = make_plan(DECLARED, actual)
    change = only(plan)
    assert (change.action, change.target) == ("update", "stream TELEMETRY")
    assert [difference.field for difference in change.differences] == [field]
    assert make_plan(DECLARED, applied(plan, actual)).changes == ()


BLOCKED_STREAM: dict[str, Any] = {
    "retention": "workqueue",
    "storage": "memory",
    "sealed": True,
    "deny_delete": True,
    "deny_purge": True,
    "allow_msg_counter": True,
    "persist_mode": "async",
}


@pytest.mark.parametrize("field", BLOCKED_STREAM)
def test_a_stream_field_that_nats_cannot_change_is_blocked_with_its_way_out(field: str) -> None:
    state = {"messages": 7, "first_seq": 1, "last_seq": 7}
    plan = make_plan(DECLARED, with_stream("TELEMETRY", state=state, **{field: BLOCKED_STREAM[field]}))
    change = only(plan)
    assert plan.blocked == (change,)
    assert field in change.reason
    assert "nats stream rm TELEMETRY --force" in change.way_out
    assert change.way_out[-1] == "pulse streams apply"
    assert (change.cost.evicted, change.cost.consumers_reset) == (7, ("ingest-workers",))
    assert change.config == {}


BLOCKED_CONSUMER: dict[str, Any] = {
    "deliver_policy": "new",
    "ack_policy": "all",
    "replay_policy": "original",
    "max_waiting": 100,
    "mem_storage": True,
    "deliver_subject": "push.here",
    "opt_start_seq": 5,
}


@pytest.mark.parametrize("field", BLOCKED_CONSUMER)
def test_a_consumer_field_that_nats_cannot_change_is_blocked_with_its_way_out(field: str) -> None:
    change = only(make_plan(DECLARED, with_consumer("ROUTES", "route-delivery", **{field: BLOCKED_CONSUMER[field]})))
    assert (change.action, change.target) == ("blocked", "consumer ROUTES route-delivery")
    assert change.way_out == ("nats consumer rm ROUTES route-delivery --force", "pulse streams apply")
    assert change.cost.consumers_reset == ("route-delivery",)


@pytest.mark.parametrize(
    ("field", "value"),
    [("ack_wait", 5 * 10**9), ("max_ack_pending", 1000), ("max_deliver", 5), ("filter_subject", "telemetry.x"),
     ("filter_subjects", ["telemetry.x", "telemetry.y"]), ("backoff", [10**9]), ("max_batch", 10),
     ("inactive_threshold", 10**12), ("headers_only", True), ("num_replicas", 1), ("description", ...)],
)  # fmt: skip
def test_a_consumer_that_drifted_is_updated(field: str, value: object) -> None:
    actual = with_consumer("TELEMETRY", "ingest-workers", **{field: value})
    plan = make_plan(DECLARED, actual)
    assert (only(plan).action, [d.field for d in only(plan).differences]) == ("update", [field])
    assert make_plan(DECLARED, applied(plan, actual)).changes == ()


@pytest.mark.parametrize(
    "extra",
    [
        {"metadata": {"owner": "someone"} | SERVER_METADATA},
        {"placement": {"cluster": "c"}},
        {"republish": {"src": ">", "dest": "r.>"}},
        {"allow_msg_ttl": True},
        {"mirror_direct": False},
        {"consumer_limits": {}},
        {"first_seq": 10},
        {"a_field_of_2.99": {"x": 1}},
        {"compression": ...},
        {"max_msgs": 0},
    ],
)
def test_a_default_and_what_does_no_harm_is_no_drift(extra: dict[str, Any]) -> None:
    assert make_plan(DECLARED, with_stream("TELEMETRY", **extra)).changes == ()


def test_an_update_keeps_the_fields_that_pulse_does_not_declare() -> None:
    extra: dict[str, Any] = {
        "placement": {"cluster": "c"},
        "a_field_of_2.99": 1,
        "metadata": {"owner": "x", **SERVER_METADATA},
    }
    config = only(make_plan(DECLARED, with_stream("TELEMETRY", max_age=HOUR_NS * 2, **extra))).config
    assert {key: config[key] for key in extra} == extra | {"metadata": {"owner": "x"}}
    assert not STREAM_NEUTRAL.keys() & config.keys()


def test_the_order_of_subjects_is_no_drift() -> None:
    reverse = list(reversed(STREAMS["DEAD_LETTERS"].subjects))
    assert make_plan(DECLARED, with_stream("DEAD_LETTERS", subjects=reverse)).changes == ()


def test_what_is_not_ours_is_named_and_left_alone() -> None:
    found = IN_STEP.streams["TELEMETRY"]
    streams = {
        **IN_STEP.streams,
        "LEGACY": ActualStream(config={"name": "LEGACY", "subjects": ["legacy.>"]}),
        "TELEMETRY": replace(
            found, consumers={**found.consumers, "tap": ActualConsumer(config={"name": "tap", "durable_name": "tap"})}
        ),
    }
    plan = make_plan(DECLARED, replace(IN_STEP, streams=streams))
    assert plan == Plan(changes=(), not_ours=("stream LEGACY", "consumer TELEMETRY tap"))


@pytest.mark.parametrize(
    ("theirs", "command"),
    [
        (["telemetry.a", "x.>"], "nats stream edit LEGACY --subjects 'x.>' --force"),
        (["*.a"], "nats stream backup LEGACY LEGACY.backup"),
    ],
)
def test_a_stream_whose_subjects_somebody_has_is_blocked_and_names_them(theirs: list[str], command: str) -> None:
    streams = {name: stream for name, stream in IN_STEP.streams.items() if name != "TELEMETRY"}
    streams["LEGACY"] = ActualStream(config={"name": "LEGACY", "subjects": theirs})
    plan = make_plan(DECLARED, replace(IN_STEP, streams=streams))
    [blocked] = plan.blocked
    assert blocked.target == "stream TELEMETRY"
    assert "LEGACY" in blocked.reason
    assert blocked.way_out[0] == command


def test_a_stream_of_ours_gives_a_subject_up_before_another_takes_it() -> None:
    """SHADOW holds what COMMANDS needs: the plan narrows the one, then makes the other."""
    streams = {name: stream for name, stream in IN_STEP.streams.items() if name != "COMMANDS"}
    actual = with_stream("SHADOW", replace(IN_STEP, streams=streams), subjects=["shadow.>", "commands.>"])
    plan = make_plan(DECLARED, actual)
    assert [(c.action, c.name) for c in plan.changes if c.kind == "stream"] == [
        ("update", "SHADOW"),
        ("create", "COMMANDS"),
    ]


def test_a_rival_on_the_work_queue_blocks_our_consumer() -> None:
    routes = replace(IN_STEP.streams["ROUTES"], consumers={"other": ActualConsumer(config={"name": "other"})})
    change = only(make_plan(DECLARED, replace(IN_STEP, streams={**IN_STEP.streams, "ROUTES": routes})))
    assert (change.action, change.name) == ("blocked", "route-delivery")
    assert change.way_out[0] == "nats consumer rm ROUTES other --force"


def test_a_server_without_atomic_batches_blocks_the_streams_that_need_them() -> None:
    plan = make_plan(DECLARED, replace(EMPTY, api_level=1))
    assert {change.name for change in plan.blocked} == {name for name, s in STREAMS.items() if s.allow_atomic}
    assert "2.12" in plan.blocked[0].reason


def test_replicas_need_a_cluster() -> None:
    assert {c.name for c in make_plan(load(stream_replicas=3), IN_STEP).blocked} == set(STREAMS)
    clustered = make_plan(load(stream_replicas=3), replace(IN_STEP, clustered=True))
    assert {(c.action, c.name) for c in clustered.changes} == {("update", name) for name in STREAMS}


def full(**more: object) -> dict[str, Any]:
    """1000 messages of 100 bytes, one a second, the last one now."""
    return {
        "messages": 1000,
        "bytes": 100_000,
        "first_seq": 1,
        "last_seq": 1000,
        "first_ts_ns": NOW_NS - 999 * 10**9,
        "last_ts_ns": NOW_NS,
        "subjects": 3,
        **more,
    }


@pytest.mark.parametrize(
    ("stream", "found", "state", "evicted", "exact"),
    [
        # a limit that is not reached costs nothing
        ("TELEMETRY", {"max_age": 0}, full(), 0, True),
        ("TELEMETRY", {"max_bytes": 1 << 40}, full(), 0, True),
        ("TELEMETRY", {"max_msgs_per_subject": -1}, full(), 0, True),
        ("TELEMETRY", {"description": "x"}, full(), 0, True),
        ("TELEMETRY", {"max_age": 0}, {}, 0, True),
        # age: all older than an hour; some, with and without the evidence; with holes
        ("TELEMETRY", {"max_age": 0}, full(first_ts_ns=1, last_ts_ns=2), 1000, True),
        ("TELEMETRY", {"max_age": 0}, full(first_ts_ns=1, first_kept_seq=301), 300, True),
        ("TELEMETRY", {"max_age": 0}, full(first_ts_ns=1), 1000, False),
        ("TELEMETRY", {"max_age": 0}, full(first_ts_ns=1, first_kept_seq=301, deleted=5), 300, False),
        # bytes: by the smallest record; `discard: new` evicts none
        ("TELEMETRY", {"max_bytes": 1 << 40}, full(bytes=(1 << 30) + 160), 10, False),
        ("ROUTES", {"max_bytes": 1 << 40}, full(bytes=(1 << 30) + 160), 0, True),
        ("TELEMETRY", {"discard": "new"}, full(bytes=(1 << 30) + 160), 10, False),
        # messages of a subject, with and without the counts, or all of one subject; also under `discard: new`
        ("SHADOW", {"max_msgs_per_subject": -1}, full(messages=10_300, subject_messages=(10_200, 90, 10)), 200, True),
        ("SHADOW", {"max_msgs_per_subject": -1}, full(messages=10_300), 300, False),
        ("SHADOW", {"max_msgs_per_subject": -1}, full(messages=10_300, subjects=1), 300, True),
        ("KV_registry", {"max_msgs_per_subject": 5}, full(subject_messages=(5, 5, 1)), 8, True),
        # two limits at once are a bound, never more than there is
        ("SHADOW", {"max_msgs_per_subject": -1, "max_age": 0},
         full(messages=10_300, first_ts_ns=1, first_kept_seq=101, subject_messages=(10_200, 100)), 300, False),
        ("SHADOW", {"max_msgs_per_subject": -1, "max_age": 0},
         full(messages=10_300, first_ts_ns=1, last_ts_ns=2, subject_messages=(10_200, 100)), 10_300, True),
    ],
)  # fmt: skip
def test_an_update_tells_how_many_messages_it_evicts(
    stream: str, found: dict[str, object], state: dict[str, Any], evicted: int, exact: bool
) -> None:
    plan = make_plan(DECLARED, with_stream(stream, state=state, **found))
    assert (only(plan).cost.evicted, only(plan).cost.exact) == (evicted, exact)
    assert bool(plan.costly) == bool(evicted)


def test_a_wider_filter_and_fewer_deliveries_tell_what_stays_undelivered() -> None:
    actual = with_consumer("TELEMETRY", "ingest-workers", filter_subject="telemetry.x", max_deliver=-1)
    stream = actual.streams["TELEMETRY"]
    consumer = replace(stream.consumers["ingest-workers"], delivered_stream_seq=400, ack_pending=50, redelivered=20)
    stream = replace(stream, messages=900, first_seq=101, last_seq=1000, consumers={"ingest-workers": consumer})
    change = only(make_plan(DECLARED, replace(actual, streams={**actual.streams, "TELEMETRY": stream})))
    assert change.cost.stranded == 300 + 20


SCALARS = st.one_of(st.booleans(), st.integers(-1, 1 << 40), st.sampled_from(["", "old", "new", "limits", "s2"]))
STREAM_FIELDS = sorted(({*STREAMS["TELEMETRY"].__struct_fields__} | STREAM_NEUTRAL.keys()) - {"name", "subjects"})
CONSUMER_FIELDS = sorted(
    ({*DECLARED.consumers[0].config.__struct_fields__} | CONSUMER_NEUTRAL.keys()) - {"name", "durable_name"}
)


@given(
    absent=st.sets(st.sampled_from(sorted(STREAMS))),
    of_streams=st.dictionaries(
        st.sampled_from(sorted(STREAMS)), st.dictionaries(st.sampled_from(STREAM_FIELDS), SCALARS, max_size=4)
    ),
    of_consumer=st.dictionaries(st.sampled_from(CONSUMER_FIELDS), SCALARS, max_size=4),
    messages=st.integers(0, 1 << 20),
)
def test_whatever_the_server_has_a_plan_that_is_not_blocked_leaves_nothing_to_do(
    absent: set[str],
    of_streams: dict[str, dict[str, object]],
    of_consumer: dict[str, object],
    messages: int,
) -> None:
    actual = with_consumer("TELEMETRY", "ingest-workers", **of_consumer)
    for name, config in of_streams.items():
        actual = with_stream(name, actual, state={"messages": messages, "bytes": messages * 99}, **config)
    actual = replace(actual, streams={name: s for name, s in actual.streams.items() if name not in absent})
    plan = make_plan(DECLARED, actual)
    after = make_plan(DECLARED, applied(plan, actual))
    assert [c.target for c in after.changes] == [c.target for c in plan.blocked]
    assert all(0 <= change.cost.evicted <= messages for change in plan.changes)
