"""The shadow worker in this process, against a real nats-server and a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from conftest import PostgresServerFactory
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.ledger import record_epoch
from pulse.domain.ledger import position
from pulse.domain.settlement import Message
from pulse.domain.shadow_merge import NOWHERE, merged
from pulse.domain.shadow_requests import Request, read_request
from shadow_bench import NAMES_MAX, STREAM, Bench, bench_on, key, message, reported
from worker_bench import until


@pytest.fixture
async def bench(nats: NatsServer, database: str) -> AsyncIterator[Bench]:
    async with bench_on(nats, database) as made:
        yield made


async def test_a_device_reports_and_hears_what_it_is_to_do(bench: Bench) -> None:
    async with bench.worker():
        await bench.publish(
            message({"state": {"desired": {"led": "on", "fan": 3}}, "clientToken": "a"}),
            reported({"led": "on"}),
            message({}, get=True),
            reported({"fan": 3}),
        )
        await bench.until_settled(4)
    shadow = await bench.store.shadow(key())
    assert (shadow.version, shadow.desired.state, shadow.reported.state, shadow.delta) == (
        3,
        {"led": "on", "fan": 3},
        {"led": "on", "fan": 3},
        {},
    )
    heard = await bench.heard()
    assert [topic for topic, _ in heard] == [
        "shadow/update/accepted",
        "shadow/update/delta",
        "shadow/update/accepted",
        "shadow/update/delta",
        "shadow/get/accepted",
        "shadow/update/accepted",
    ]
    assert heard[0][1]["clientToken"] == "a"
    assert [document["state"] for topic, document in heard if topic.endswith("delta")] == [
        {"led": "on", "fan": 3},
        {"fan": 3},
    ]
    assert heard[4][1]["state"] == {
        "desired": {"led": "on", "fan": 3},
        "reported": {"led": "on"},
        "delta": {"fan": 3},
    }
    assert bench.metrics.counts["accepted"] == 3
    assert bench.metrics.counts["answered"] == 1
    assert bench.posted >= 1


async def test_what_cannot_be_is_rejected_and_changes_nothing(bench: Bench) -> None:
    wrong: list[tuple[bytes, int, str]] = [
        (reported({"a": 2}, version=7), 409, "version"),
        (reported({"a": 2}, version="1"), 422, "version"),
        (reported({"a": "x" * 9000}), 413, "state.reported"),
        (message(b'{"state":{"reported":' + b'{"a":' * 9 + b"1" + b"}" * 11), 413, "state.reported"),
        (message(b'{"state":{"reported":' + b'{"a":' * 900 + b"1" + b"}" * 902), 413, "state.reported"),
        (message({"state": {"reported": 5}}), 422, "state.reported"),
        (message({"state": {"reported": {}}, "more": 1}), 422, "more"),
        (message({"state": {}}), 422, "state"),
        (message({"more": 1}, get=True), 422, "more"),
    ]
    async with bench.worker():
        await bench.publish(reported({"a": 1}), *(body for body, *_ in wrong))
        await bench.until_settled(1 + len(wrong))
    shadow = await bench.store.shadow(key())
    assert (shadow.version, shadow.reported.state) == (1, {"a": 1})
    (_, accepted), *rejected = await bench.heard()
    assert accepted["version"] == 1
    assert [(topic, document["code"]) for topic, document in rejected] == [
        ("shadow/get/rejected" if index == len(wrong) - 1 else "shadow/update/rejected", code)
        for index, (_, code, _) in enumerate(wrong)
    ]
    assert all(field in document["message"] for (_, document), (*_, field) in zip(rejected, wrong, strict=True))
    assert rejected[0][1]["version"] == 1, "who is told of a conflict is told the version that there is"
    assert await bench.dead() == []
    assert bench.metrics.counts["rejected"] == len(wrong)


async def test_what_is_no_envelope_is_a_dead_letter_and_its_neighbours_are_not(bench: Bench) -> None:
    async with bench.worker():
        await bench.publish(reported({"a": 1}), b'{"test":1}', reported({"b": 2}))
        await bench.until_settled(3)
    assert await bench.dead() == [("invalid_envelope", None)]
    shadow = await bench.store.shadow(key())
    assert (shadow.version, shadow.reported.state) == (2, {"a": 1, "b": 2})
    assert await bench.pool.fetchval("SELECT sum(telemetry_rows) FROM ledger") == 0
    assert await bench.pool.fetchval("SELECT count(*) FROM rollup_pending") == 0


async def test_what_the_database_refuses_is_a_dead_letter_and_its_neighbours_are_not(bench: Bench) -> None:
    await bench.pool.execute("ALTER TABLE shadows ADD CHECK (reported->>'poison' IS NULL)")
    async with bench.worker():
        states: list[dict[str, Any]] = [{"n": number} for number in range(20)]
        states[11]["poison"] = 1
        await bench.publish(*(reported(state) for state in states), reported({"x": 1}, device_id="d2"))
        await bench.until_settled(21)
    assert await bench.dead() == [("refused_by_database", "d1")]
    assert (await bench.store.shadow(key())).version == 19
    assert (await bench.store.shadow(key("d2"))).reported.state == {"x": 1}


async def test_numbers_come_back_as_they_were_said(bench: Bench) -> None:
    """jsonb would make 1e30 an integer of 31 digits, which is no JSON that we can write again."""
    said = {"a": 1e30, "b": 1e-300, "c": 2**63 - 1, "d": -(2**63), "e": 1.0, "f": 1.7976931348623157e308, "g": -0.0}
    async with bench.worker():
        await bench.publish(reported(said), reported({"h": 1}), message({}, get=True))
        await bench.until_settled(3)
    shadow = await bench.store.shadow(key())
    assert {name: repr(value) for name, value in shadow.reported.state.items()} == {
        name: repr(value) for name, value in (said | {"h": 1}).items()
    }


async def test_each_device_may_have_so_many_names_and_a_deleted_one_makes_room(bench: Bench) -> None:
    names = [f"n{number}" for number in range(NAMES_MAX + 2)]
    async with bench.worker(batch_max=3):
        await bench.publish(
            *(message({}, name=f"asked-{number}", get=True) for number in range(10)),
            *(reported({"a": 1}, name=name) for name in names),
            reported({"a": 1}, name="n0", device_id="d2"),
            reported({"a": 2}, name="n0"),
        )
        await bench.until_settled(10 + len(names) + 2)
    assert await bench.store.names("t1", "d1") == names[:NAMES_MAX]
    assert await bench.pool.fetchval("SELECT count(*) FROM shadows WHERE device_id = 'd1'") == 1 + NAMES_MAX
    refused = [document for topic, document in await bench.heard() if topic.endswith("update/rejected")]
    assert [document["code"] for document in refused] == [413, 413]
    assert (await bench.store.shadow(key(name="n0"))).version == 2


async def settle(bench: Bench, epoch: int, sequences: list[int], bodies: list[bytes]) -> int:
    """As a worker does; how many updates were accepted."""
    requests = []
    for sequence in sequences:
        body = bodies[sequence - 1]
        made = read_request(
            position(epoch, sequence), Message("shadow.t1", body, b"", "", sequence, 1_790_000_000_000_000_000, 1)
        )
        assert isinstance(made, Request)
        requests.append(made)
    answers, _ = await bench.settlements.settle(sorted(requests, key=lambda each: each.position), [])
    return len(answers.changes)


async def test_messages_in_any_order_and_again_and_again_are_applied_once_and_in_theirs(bench: Bench) -> None:
    random = Random(7)
    epoch = await record_epoch(bench.pool, STREAM, (await stream_state(bench.client, STREAM)).created_ns)
    patches = [{random.choice("abcd"): random.choice([None, number, {"x": number}])} for number in range(60)]
    bodies = [reported(patch) for patch in patches]
    batches = [[low + 1 for low in range(start, start + 4)] for start in range(0, 60, 4)]
    batches = [*batches, *batches, *([*first[2:], *second[:2]] for first, second in pairwise(batches))]
    random.shuffle(batches)
    accepted = [await settle(bench, epoch, batch, bodies) for batch in batches]
    assert sum(accepted) == 60
    place = NOWHERE
    for at, patch in enumerate(patches, start=1):
        place = merged(place, patch, at=at, at_ms=0)
    expected, _ = place
    shadow = await bench.store.shadow(key())
    assert (shadow.version, shadow.reported.state) == (60, expected)


async def test_two_workers_with_the_same_messages_apply_each_once(bench: Bench) -> None:
    """Forty races; the devices of one are in the other's order reversed, so that a lock out of order would show."""
    epoch = await record_epoch(bench.pool, STREAM, (await stream_state(bench.client, STREAM)).created_ns)
    devices = [f"d{number}" for number in range(10)]
    accepted = 0
    for race in range(40):
        bodies = [reported({f"k{race}": race}, device_id=device) for device in devices]
        first: list[Request] = []
        second: list[Request] = []
        for index, body in enumerate(bodies):
            made = read_request(
                position(epoch, race * 10 + index + 1),
                Message("shadow.t1", body, b"", "", race * 10 + index + 1, 1_790_000_000_000_000_000, 1),
            )
            assert isinstance(made, Request)
            first.append(made)
            second.insert(0, made)
        results = await asyncio.gather(
            bench.settlements.settle(first[:7], []), bench.settlements.settle(second[:7], []),
            bench.settlements.settle(second, []),
        )  # fmt: skip
        accepted += sum(len(answers.changes) for answers, _ in results)
    assert accepted == 400
    versions = {row["version"] for row in await bench.pool.fetch("SELECT version FROM shadows")}
    assert versions == {40}


async def test_the_outage_of_postgresql_is_waited_out_and_nothing_dies(
    nats: NatsServer, postgres_server_factory: PostgresServerFactory
) -> None:
    ack_wait_s = 4.0
    postgres = postgres_server_factory()
    await asyncio.to_thread(postgres.start)
    async with bench_on(nats, postgres.url, ack_wait_s=ack_wait_s) as bench, bench.worker(writers=2):
        await bench.publish(reported({"n": 0}))
        await bench.until_settled(1)
        await asyncio.to_thread(postgres.kill)
        await bench.publish(*(reported({"n": number}) for number in range(1, 50)))

        async def waits() -> bool:
            return ("postgresql", True) in bench.metrics.waits

        await until(waits)
        await asyncio.sleep(2 * ack_wait_s)
        # Beside the worker, which goes on telling JetStream that it is at work.
        await asyncio.to_thread(postgres.start)
        await bench.until_settled(50)
        shadow = await bench.store.shadow(key())
        assert (shadow.version, shadow.reported.state) == (50, {"n": 49})
        assert await bench.dead() == []
        assert bench.metrics.counts["redelivered"] == 0
