"""The provisioner against a real nats-server: it converges, adopts, says what that costs, and never does half."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats import jetstream
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.errors import JetStreamRefusal
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.streams import stream_state, survey
from pulse.domain.errors import CheckFailed, ConfigurationError
from pulse.topology.declared import Declared, load
from pulse.topology.plan import Change, Plan

DECLARED = load()
HOUR_NS = 3600 * 10**9
FIELDS = {stream.name: msgspec.json.decode(msgspec.json.encode(stream)) for stream in DECLARED.streams}
CONSUMER_FIELDS = {consumer.config.name: msgspec.to_builtins(consumer.config) for consumer in DECLARED.consumers}

MIB = 1 << 20
CREATED_BY_THE_REQUIREMENT: dict[str, dict[str, Any]] = {
    "TELEMETRY": {"subjects": ["telemetry.>"], "max_msgs_per_subject": 100_000, "max_age": HOUR_NS,
                  "max_bytes": 1024 * MIB},
    "SHADOW": {"subjects": ["shadow.>"], "max_msgs_per_subject": 10_000, "max_age": HOUR_NS, "max_bytes": 256 * MIB},
    "COMMANDS": {"subjects": ["commands.>"], "max_msgs_per_subject": 10_000, "max_age": HOUR_NS,
                 "max_bytes": 256 * MIB},
    "ROUTES": {"subjects": ["routes.>"], "retention": "workqueue", "max_age": 24 * HOUR_NS, "max_bytes": 512 * MIB},
}  # fmt: skip
"""What `init-streams.sh` of the requirement means to make, with what the server and `--defaults` fill in."""


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[PulseClient]:
    async with connection(nats.url, name="test") as client:
        yield client


async def ask(client: PulseClient, subject: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    return await jetstream.request(client, subject, body or {}, dict[str, Any], doing=subject)


async def make_stream(client: PulseClient, name: str, /, **config: Any) -> None:
    await ask(client, f"STREAM.CREATE.{name}", {"num_replicas": 1, "storage": "file", **config, "name": name})


async def make_consumer(client: PulseClient, stream: str, name: str, /, **config: Any) -> None:
    body = {"stream_name": stream, "action": "create", "config": {"durable_name": name, **config, "name": name}}
    await ask(client, f"CONSUMER.CREATE.{stream}.{name}", body)


async def everything(client: PulseClient) -> dict[str, Any]:
    """All configurations, and the number of messages, as the server has them."""
    found: dict[str, Any] = {}
    for name in (await ask(client, "STREAM.NAMES"))["streams"] or []:
        info = await ask(client, f"STREAM.INFO.{name}")
        consumers = (await ask(client, f"CONSUMER.LIST.{name}", {"offset": 0}))["consumers"]
        found[name] = [
            info["config"], info["created"], info["state"]["messages"],
            {one["name"]: (one["config"], one["created"]) for one in consumers or []},
        ]  # fmt: skip
    return found


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def converge(client: PulseClient, declared: Declared = DECLARED) -> Plan:
    provisioner = Provisioner(client)
    plan = await provisioner.plan(declared)
    await provisioner.apply(declared, plan)
    return plan


async def publish(client: PulseClient, subject: str, count: int, size: int = 10) -> None:
    await asyncio.gather(*(client.request(subject, b"x" * size, timeout=30) for _ in range(count)))


def change_of(plan: Plan, target: str) -> Change:
    [change] = [change for change in plan.changes if change.target == target]
    return change


async def test_an_empty_server_gets_exactly_what_is_declared_and_a_second_run_changes_nothing(
    client: PulseClient,
) -> None:
    await converge(client)
    first = await everything(client)
    assert set(first) == set(FIELDS)
    for name, (config, _, _, consumers) in first.items():
        expected = {key: value for key, value in FIELDS[name].items() if value is not False}
        assert {key: config.get(key) for key in expected} == expected
        assert set(consumers) == {consumer.config.name for consumer in DECLARED.consumers if consumer.stream == name}
    assert (await converge(client)).changes == ()
    assert await everything(client) == first


async def test_the_advisory_of_exhausted_deliveries_lands_in_dead_letters(client: PulseClient) -> None:
    await converge(client)
    await client.publish("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.TELEMETRY.x", b"{}")

    async def is_there() -> bool:
        return (await stream_state(client, "DEAD_LETTERS")).messages == 1

    await wait_until(is_there)


DRIFT: dict[str, Any] = {
    "description": "drifted", "subjects": ["telemetry.>", "more.>"], "retention": "interest", "discard": "new",
    "max_age": 5 * HOUR_NS, "max_bytes": 2 << 30, "max_msgs": 1000, "max_msgs_per_subject": 50, "max_msg_size": 1000,
    "max_consumers": 7, "duplicate_window": HOUR_NS // 60, "compression": "s2", "allow_atomic": False,
    "allow_direct": False, "allow_rollup_hdrs": True, "no_ack": True,
    "subject_transform": {"src": "telemetry.>", "dest": "changed.>"}, "sources": [{"name": "OTHER"}],
    "consumer_limits": {"max_ack_pending": 50_000}, "subject_delete_marker_ttl": 10**9,
}  # fmt: skip


async def test_drift_in_each_field_that_can_be_updated_is_shown_and_converges(client: PulseClient) -> None:
    await converge(client)
    for field, value in DRIFT.items():
        await ask(client, "STREAM.UPDATE.TELEMETRY", FIELDS["TELEMETRY"] | {field: value})
        plan = await converge(client)
        fields = {difference.field for difference in change_of(plan, "stream TELEMETRY").differences}
        # A delete marker brings the rollup along.
        assert fields == {field} | ({"allow_rollup_hdrs"} if field == "subject_delete_marker_ttl" else set()), field


async def test_per_subject_refusal_is_drift_on_a_stream_that_refuses_when_full(client: PulseClient) -> None:
    await converge(client)
    await ask(client, "STREAM.UPDATE.KV_registry", FIELDS["KV_registry"] | {"discard_new_per_subject": True})
    plan = await converge(client)
    assert [d.field for d in change_of(plan, "stream KV_registry").differences] == ["discard_new_per_subject"]


CONSUMER_DRIFT: dict[str, Any] = {
    "description": "drifted", "ack_wait": 5 * 10**9, "max_deliver": 7, "max_ack_pending": 1000,
    "filter_subject": "telemetry.x", "filter_subjects": ["telemetry.x", "telemetry.y"], "headers_only": True,
    "inactive_threshold": HOUR_NS, "num_replicas": 1, "backoff": [10**9], "max_batch": 10, "max_expires": 10**9,
    "max_bytes": 1000,
}  # fmt: skip


async def test_drift_in_each_consumer_field_that_can_be_updated_converges(client: PulseClient) -> None:
    await converge(client)
    for field, value in CONSUMER_DRIFT.items():
        config = CONSUMER_FIELDS["ingest-workers"] | {field: value}
        body = {"stream_name": "TELEMETRY", "action": "update", "config": config}
        await ask(client, "CONSUMER.CREATE.TELEMETRY.ingest-workers", body)
        plan = await converge(client)
        change = change_of(plan, "consumer TELEMETRY ingest-workers")
        assert field in {difference.field for difference in change.differences}, field


async def test_the_streams_of_the_requirement_are_adopted_with_their_messages(client: PulseClient) -> None:
    for name, config in CREATED_BY_THE_REQUIREMENT.items():
        await make_stream(client, name, **config)
    await make_consumer(
        client, "TELEMETRY", "ingest-workers", ack_policy="explicit", deliver_policy="all",
        max_deliver=3, max_ack_pending=1000, ack_wait=5 * 10**9,
    )  # fmt: skip
    await make_consumer(
        client, "ROUTES", "route-delivery", ack_policy="explicit", deliver_policy="all",
        max_deliver=3, max_ack_pending=100, ack_wait=30 * 10**9,
    )  # fmt: skip
    await publish(client, "telemetry.t1", 20)
    await publish(client, "routes.t1", 10)
    before = await everything(client)

    plan = await converge(client)

    assert not plan.blocked
    assert not plan.costly
    assert "discard" in {difference.field for difference in change_of(plan, "stream ROUTES").differences}
    after = await everything(client)
    for name, (_, created, messages, _) in before.items():
        assert after[name][1:3] == [created, messages]
    assert after["TELEMETRY"][0]["allow_atomic"] is True
    assert after["TELEMETRY"][3]["ingest-workers"][0]["max_ack_pending"] == 20_000


async def test_an_update_keeps_what_pulse_does_not_declare(client: PulseClient) -> None:
    await converge(client)
    extra = {
        "metadata": {"owner": "somebody"},
        "republish": {"src": "shadow.>", "dest": "copy.>"},
        "max_age": HOUR_NS * 2,
    }
    await ask(client, "STREAM.UPDATE.SHADOW", FIELDS["SHADOW"] | extra)
    await converge(client)
    config = (await ask(client, "STREAM.INFO.SHADOW"))["config"]
    assert config["max_age"] == HOUR_NS
    assert config["metadata"]["owner"] == "somebody"
    assert config["republish"]["dest"] == "copy.>"


BLOCKED: dict[str, dict[str, Any]] = {
    "retention": {"retention": "workqueue"},
    "storage": {"storage": "memory"},
    "deny_delete": {"deny_delete": True},
    "deny_purge": {"deny_purge": True},
    "allow_msg_counter": {"allow_msg_counter": True},
    "persist_mode": {"persist_mode": "async", "allow_atomic": False},
}


@pytest.mark.parametrize("field", [*BLOCKED, "sealed"])
async def test_a_stream_that_cannot_be_changed_in_place_is_found_before_anything_is_touched(
    client: PulseClient, field: str
) -> None:
    config = FIELDS["SHADOW"] | {"max_bytes": 1 << 20} | BLOCKED.get(field, {})
    await make_stream(client, "SHADOW", **config)
    if field == "sealed":
        await ask(client, "STREAM.UPDATE.SHADOW", config | {"sealed": True})
    before = await everything(client)
    provisioner = Provisioner(client)
    plan = await provisioner.plan(DECLARED)

    [blocked] = plan.blocked
    assert field in blocked.reason
    with pytest.raises(CheckFailed, match="SHADOW"):
        await provisioner.apply(DECLARED, plan)

    assert await everything(client) == before
    with pytest.raises(JetStreamRefusal):  # the server says so too
        await ask(client, "STREAM.UPDATE.SHADOW", FIELDS["SHADOW"])


BLOCKED_CONSUMER: dict[str, dict[str, Any]] = {
    "deliver_policy": {"deliver_policy": "new"},
    "ack_policy": {"ack_policy": "all"},
    "replay_policy": {"replay_policy": "original"},
    "max_waiting": {"max_waiting": 100},
    "mem_storage": {"mem_storage": True},
    "opt_start_seq": {"deliver_policy": "by_start_sequence", "opt_start_seq": 1},
    "deliver_subject": {"deliver_subject": "push.here", "max_waiting": 0},
}


@pytest.mark.parametrize("field", BLOCKED_CONSUMER)
async def test_a_consumer_that_cannot_be_changed_in_place_is_found_before_anything_is_touched(
    client: PulseClient, field: str
) -> None:
    await make_stream(client, "SHADOW", **FIELDS["SHADOW"])
    config = CONSUMER_FIELDS["shadow-workers"] | BLOCKED_CONSUMER[field]
    await make_consumer(client, "SHADOW", "shadow-workers", **config)
    before = await everything(client)
    provisioner = Provisioner(client)
    plan = await provisioner.plan(DECLARED)

    [blocked] = plan.blocked
    assert blocked.target == "consumer SHADOW shadow-workers"
    assert field in blocked.reason
    with pytest.raises(CheckFailed, match="shadow-workers"):
        await provisioner.apply(DECLARED, plan)

    assert await everything(client) == before
    body = {"stream_name": "SHADOW", "action": "update", "config": CONSUMER_FIELDS["shadow-workers"]}
    with pytest.raises(JetStreamRefusal):  # the server says so too
        await ask(client, "CONSUMER.CREATE.SHADOW.shadow-workers", body)


async def test_a_blocked_stream_goes_through_once_its_way_out_was_taken(client: PulseClient) -> None:
    await make_stream(client, "ROUTES", subjects=["routes.>"], retention="limits")
    assert (await Provisioner(client).plan(DECLARED)).blocked
    await ask(client, "STREAM.DELETE.ROUTES")
    await converge(client)


async def test_subjects_of_somebody_elses_stream_are_named_and_nothing_is_made(client: PulseClient) -> None:
    await make_stream(client, "LEGACY", subjects=["telemetry.plant.>", "other"])
    provisioner = Provisioner(client)
    plan = await provisioner.plan(DECLARED)
    [blocked] = plan.blocked
    assert (blocked.target, blocked.way_out[0]) == (
        "stream TELEMETRY",
        "nats stream edit LEGACY --subjects other --force",
    )
    assert plan.not_ours == ("stream LEGACY",)
    with pytest.raises(CheckFailed, match="LEGACY"):
        await provisioner.apply(DECLARED, plan)
    assert set(await everything(client)) == {"LEGACY"}


async def test_a_rival_consumer_on_the_work_queue_is_named(client: PulseClient) -> None:
    await make_stream(client, "ROUTES", **FIELDS["ROUTES"])
    await make_consumer(client, "ROUTES", "other", ack_policy="explicit")
    [blocked] = (await Provisioner(client).plan(DECLARED)).blocked
    assert blocked.target == "consumer ROUTES route-delivery"
    with pytest.raises(JetStreamRefusal) as refused:
        await make_consumer(client, "ROUTES", "route-delivery", **CONSUMER_FIELDS["route-delivery"])
    assert refused.value.err_code == 10099


def lowered(stream: str, **limits: Any) -> Declared:
    streams = tuple(msgspec.structs.replace(one, **limits) if one.name == stream else one for one in DECLARED.streams)
    return Declared(streams=streams, consumers=DECLARED.consumers)


@pytest.mark.parametrize(
    ("stream", "subject", "limits", "evicted"),
    [
        ("TELEMETRY", "telemetry", {"max_msgs_per_subject": 20}, 40),
        ("TELEMETRY", "telemetry", {"max_msgs": 70}, 20),
        ("DEAD_LETTERS", "dead", {"max_msgs_per_subject": 20}, 40),
        ("DEAD_LETTERS", "dead", {"max_msgs": 70}, 0),
    ],
)
async def test_a_lower_limit_evicts_exactly_as_many_as_the_plan_says(
    client: PulseClient, stream: str, subject: str, limits: dict[str, int], evicted: int
) -> None:
    await converge(client)
    for tenant, count in (("a", 50), ("b", 30), ("c", 10)):
        await publish(client, f"{subject}.{tenant}", count)
    declared = lowered(stream, **limits)
    plan = await converge(client, declared)
    cost = change_of(plan, f"stream {stream}").cost
    assert (cost.evicted, cost.exact) == (evicted, True)
    assert (await stream_state(client, stream)).messages == 90 - evicted


async def test_a_lower_max_bytes_evicts_at_most_what_the_plan_says(client: PulseClient) -> None:
    await converge(client)
    await publish(client, "telemetry.a", 90, size=1000)
    plan = await converge(client, lowered("TELEMETRY", max_bytes=50_000))
    cost = change_of(plan, "stream TELEMETRY").cost
    assert not cost.exact
    assert 0 < 90 - (await stream_state(client, "TELEMETRY")).messages <= cost.evicted <= 90


async def test_a_lower_max_age_evicts_exactly_as_many_as_the_plan_says(client: PulseClient) -> None:
    """Two batches a little apart, and an age limit between them; the boundary comes from the server's own times."""
    old_enough_ns = 100_000_000
    await converge(client, lowered("TELEMETRY", duplicate_window=old_enough_ns))
    await publish(client, "telemetry.a", 30)
    state = await stream_state(client, "TELEMETRY")
    oldest = state.last_ts_ns
    assert oldest is not None

    async def is_old() -> bool:
        return (await stream_state(client, "TELEMETRY")).now_ns - oldest > 20 * old_enough_ns

    await wait_until(is_old)
    await publish(client, "telemetry.a", 12)
    declared = lowered("TELEMETRY", duplicate_window=old_enough_ns, max_age=10 * old_enough_ns)
    cost = change_of(await Provisioner(client).plan(declared), "stream TELEMETRY").cost
    assert (cost.evicted, cost.exact) == (30, True)
    await converge(client, declared)

    async def evicted() -> bool:
        return (await stream_state(client, "TELEMETRY")).first_seq > 30

    await wait_until(evicted)


async def test_two_provisioners_at_once_both_succeed(nats: NatsServer, client: PulseClient) -> None:
    async with connection(nats.url, name="second") as second:
        plans = [await Provisioner(one).plan(DECLARED) for one in (client, second)]
        await asyncio.gather(
            Provisioner(client).apply(DECLARED, plans[0]), Provisioner(second).apply(DECLARED, plans[1])
        )
    assert (await Provisioner(client).plan(DECLARED)).changes == ()


async def test_a_late_provisioner_finds_the_reservation_taken_by_the_same_stream_and_succeeds(
    nats_server_factory: Any, scratch: Path
) -> None:
    """Creating an identical stream reserves its bytes twice and fails (10047): that is no failure of ours."""
    server = nats_server_factory(
        extra_conf=f'jetstream: {{ store_dir: "{scratch}/small", max_file_store: 3328MB, max_memory_store: 64MB }}'
    )
    server.start()
    async with connection(server.url, name="test") as client:
        late = await Provisioner(client).plan(DECLARED)
        await converge(client)
        await Provisioner(client).apply(DECLARED, late)


async def test_a_server_that_is_too_small_says_what_to_raise(nats_server_factory: Any) -> None:
    server = nats_server_factory()
    server.start()
    async with connection(server.url, name="test") as client:
        with pytest.raises(ConfigurationError, match=r"10047.*max_file_store"):
            await converge(client, lowered("TELEMETRY", max_bytes=7 << 30))


async def test_replicas_without_a_cluster_are_blocked(client: PulseClient) -> None:
    plan = await Provisioner(client).plan(load(stream_replicas=3))
    assert {change.kind for change in plan.blocked} == {"stream"}
    assert len(plan.blocked) == len(DECLARED.streams)


async def test_a_user_who_may_not_ask_is_told_which_permission_is_missing(nats_server_factory: Any) -> None:
    user = '{ user: pulse, password: secret, permissions: { publish: ["other.>"] } }'
    server = nats_server_factory(password="secret", extra_conf=f"authorization: {{ users: [ {user} ] }}")
    server.start()
    async with connection(server.url, name="test") as client:
        with pytest.raises(ConfigurationError, match=r"permissions violation.*\$js\.api\.info"):
            await Provisioner(client, timeout_s=3.0).plan(DECLARED)


async def test_the_state_of_a_stream_has_exact_times_and_its_holes(client: PulseClient) -> None:
    await converge(client)
    empty = await stream_state(client, "TELEMETRY")
    assert (empty.messages, empty.first_seq, empty.last_seq, empty.first_ts_ns, empty.deleted) == (0, 0, 0, None, None)
    await publish(client, "telemetry.a", 10)
    for seq in (4, 7):
        await ask(client, "STREAM.MSG.DELETE.TELEMETRY", {"seq": seq})
    state = await stream_state(client, "TELEMETRY", with_deleted=True)
    assert (state.messages, state.first_seq, state.last_seq) == (8, 1, 10)
    assert (state.deleted_count, state.deleted) == (2, (4, 7))
    assert state.created_ns == empty.created_ns == jetstream.time_ns(state.created)
    assert state.created.rpartition(".")[2].rstrip("Z").rstrip("0") in str(state.created_ns)
    assert state.first_ts_ns is not None
    assert state.created_ns < state.first_ts_ns < state.now_ns


async def test_a_stream_made_anew_has_another_creation_time(client: PulseClient) -> None:
    await converge(client)
    before = await stream_state(client, "SHADOW")
    await ask(client, "STREAM.DELETE.SHADOW")
    with pytest.raises(ConfigurationError, match="SHADOW"):
        await stream_state(client, "SHADOW")
    assert await survey(client, "SHADOW") is None
    await converge(client)
    assert (await stream_state(client, "SHADOW")).created_ns > before.created_ns
