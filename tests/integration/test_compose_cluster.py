"""`compose/docker-compose.cluster.yml`: its three NATS servers and the roles, with the files' commands and environment.

P7: a server is killed, or led out, under load: each reading that was answered 202 is stored exactly once.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from chaos.load import TENANT, Load, load
from chaos.system import eventually
from compose_client import STOP_S_MAX, ask, audit, passwords, rows, run_init, url_of
from compose_server import HOST, ComposeNode, nats_cli, program
from compose_stack import Stack, start_cluster, start_database, start_nats
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.jetstream import request
from pulse.domain.ledger import SEQUENCE_MAX

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(500)]

Answer = dict[str, Any]

DEVICES = 16
READINGS = 3000
SEED = 1
LIMIT_S = 60.0
ROLES = ["gateway", "ingest", "maintenance", "rescue"]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """PostgreSQL and PgBouncer, migrated."""
    program("pgbouncer", install="apt install pgbouncer")
    nats_cli()
    made = Stack(folder=tmp_path_factory.mktemp("cluster"), passwords=passwords())
    with made.cleanup:
        start_database(made)
        assert made.run_once("migrate").code == 0
        yield made


@pytest.fixture(scope="module")
def stack(database: Stack) -> Stack:
    """With the cluster, and nothing in it."""
    start_cluster(database)
    return database


@pytest.fixture(scope="module")
def running(stack: Stack) -> Stack:
    """With streams and roles; two containers of ingest."""
    done = run_init(stack)
    assert done.code == 0, done.errors
    for role in ROLES:
        stack.start(role)
    stack.start("ingest", copy=2)
    return stack


@pytest.fixture(scope="module")
def tokens(running: Stack) -> dict[str, str]:
    """Of the devices of tenant `t1`, by device."""
    assert running.run_once("pulse", "tenant", "add", TENANT).code == 0
    done = running.run_once("pulse", "device", "add", TENANT, "--count", str(DEVICES), "--json")
    assert done.code == 0, done.errors
    return {each["device_id"]: each["token"] for each in json.loads(done.output)["devices"]}


@asynccontextmanager
async def provisioner(stack: Stack) -> AsyncIterator[PulseClient]:
    async with connection(stack.environment("pulse")["NATS_URL"], name="test") as client:
        yield client


async def api(stack: Stack, subject: str, body: Answer | None = None) -> Answer:
    """One request to the JetStream API, asked again while a stream has no leader."""
    async with provisioner(stack) as client:
        return await request(client, subject, body or {}, dict, doing="test")


async def everything(stack: Stack) -> dict[str, Answer]:
    """INFO of every stream and consumer, by name."""
    found: dict[str, Answer] = {}
    async with provisioner(stack) as client:
        for stream in (await request(client, "STREAM.NAMES", {}, dict, doing="test"))["streams"] or []:
            found[stream] = await request(client, f"STREAM.INFO.{stream}", {}, dict, doing="test")
            names = await request(client, f"CONSUMER.NAMES.{stream}", {}, dict, doing="test")
            for name in names["consumers"] or []:
                found[f"{stream}.{name}"] = await request(
                    client, f"CONSUMER.INFO.{stream}.{name}", {}, dict, doing="test"
                )
    return found


def configurations(found: dict[str, Answer]) -> dict[str, Answer]:
    return {name: info["config"] for name, info in found.items()}


async def remove_everything(stack: Stack) -> None:
    for name in await everything(stack):
        if "." not in name:
            await api(stack, f"STREAM.DELETE.{name}")


def copies(found: dict[str, Answer]) -> set[int]:
    """How many servers hold each of them and have all of it."""
    return {
        1 + sum(peer["current"] and not peer.get("offline") for peer in info.get("cluster", {}).get("replicas") or ())
        for info in found.values()
    }


async def has_copies(stack: Stack, count: int) -> None:
    async def all_have() -> bool:
        return copies(await everything(stack)) == {count}

    await eventually(all_have, f"{count} copies of everything")


async def leader(stack: Stack) -> ComposeNode:
    assert stack.cluster is not None
    return stack.cluster.nodes[(await api(stack, "STREAM.INFO.TELEMETRY"))["cluster"]["leader"]]


async def test_the_script_and_the_command_make_the_same_with_three_copies(stack: Stack) -> None:
    done = run_init(stack)
    assert (done.code, done.errors) == (0, "")
    await has_copies(stack, 3)
    by_script = configurations(await everything(stack))
    assert {config["num_replicas"] for name, config in by_script.items() if "." not in name} == {3}
    await remove_everything(stack)
    done = stack.run_once("pulse", "streams", "apply", "--yes")
    assert done.code == 0, done.errors
    assert configurations(await everything(stack)) == by_script
    again = run_init(stack)
    assert "(created)" not in again.output
    assert "(updated)" not in again.output
    assert stack.run_once("pulse", "streams", "plan").code == 0
    await remove_everything(stack)


async def test_one_copy_becomes_three_and_the_consumers_follow(stack: Stack) -> None:
    assert run_init(stack, STREAM_REPLICAS="1").code == 0
    assert copies(await everything(stack)) == {1}
    async with provisioner(stack) as client:
        await client.publish("telemetry.acme", b"kept")
        await client.flush()
    done = run_init(stack)
    assert done.code == 0, done.errors
    await has_copies(stack, 3)
    assert (await api(stack, "STREAM.INFO.TELEMETRY"))["state"]["messages"] == 1
    await remove_everything(stack)


async def test_whoever_is_no_server_of_the_cluster_is_no_route(stack: Stack) -> None:
    """A route may do everything, so it has to give the password before it is listened to."""
    assert stack.cluster is not None
    for node in stack.cluster.nodes.values():
        reader, writer = await asyncio.open_connection(HOST, node.route_port)
        told = json.loads((await reader.readline()).removeprefix(b"INFO "))
        assert told["auth_required"] is True
        writer.write(b'CONNECT {"verbose":false,"user":"route","pass":"wrong","name":"guest"}\r\n')
        async with asyncio.timeout(10):
            said = await reader.read()
        assert b"Authorization Violation" in said
        writer.close()


async def test_the_gateway_answers_that_a_reading_is_replicated(running: Stack, tokens: dict[str, str]) -> None:
    device, token = next(iter(tokens.items()))
    url = url_of(running, "gateway", "gateway", f"/ingest/v1/tenant/{TENANT}/device/{device}/telemetry")

    async def accepted() -> bool:
        status, answer = await asyncio.to_thread(ask, url, body={"metrics": {"probe": 1}}, token=token)
        return status == 202 and json.loads(answer)["durability"] == "replicated"

    await eventually(accepted, "the gateway knows the device")


async def test_a_killed_leader_loses_nothing_and_doubles_nothing(running: Stack, tokens: dict[str, str]) -> None:
    """kill -9, in the middle of a few thousand readings; it comes back before the end."""
    async with load(url_of(running, "gateway", "gateway", ""), tokens, seed=SEED, name="kill") as sent:
        await so_many(sent, READINGS // 3)
        victim = await leader(running)
        victim.process.kill()
        await so_many(sent, len(sent.acknowledged) + READINGS // 3)
        assert (await leader(running)).name != victim.name
        await asyncio.to_thread(victim.process.start)
        await so_many(sent, max(READINGS, len(sent.acknowledged) + READINGS // 6))
    await stored_exactly(running, sent)
    assert all(process.alive for process in running.running.values())


async def test_a_leader_that_is_led_out_loses_nothing_and_doubles_nothing(
    running: Stack, tokens: dict[str, str]
) -> None:
    """As compose stops it, for a new version of the server: with the signal of the file, within its grace period."""
    told = running.services["nats-1"]
    assert (told["stop_signal"], told["stop_grace_period"]) == ("SIGUSR2", "60s")
    async with load(url_of(running, "gateway", "gateway", ""), tokens, seed=SEED, name="lame") as sent:
        await so_many(sent, READINGS // 6)
        old = await leader(running)
        assert old.process.pid is not None
        os.kill(old.process.pid, signal.SIGUSR2)

        async def has_ended() -> bool:
            return not old.process.alive

        await eventually(has_ended, "the server has ended", limit_s=60)
        await so_many(sent, len(sent.acknowledged) + READINGS // 6)
        await asyncio.to_thread(old.process.start)
        await so_many(sent, len(sent.acknowledged) + READINGS // 6)
    await stored_exactly(running, sent)
    assert all(process.alive for process in running.running.values())


async def so_many(sent: Load, count: int) -> None:
    async def enough() -> bool:
        return len(sent.acknowledged) >= count

    await eventually(enough, f"{count} readings are accepted", limit_s=LIMIT_S)


async def stored_exactly(stack: Stack, sent: Load) -> None:
    """Each reading that was answered 202 is stored once, where the answer said; the audit agrees."""
    await everything_is_settled(stack)
    prefix = next(iter(sent.acknowledged)).partition("-")[0]
    every = await rows(stack, "SELECT metrics->>'reading' AS reading, position FROM telemetry")
    found = [row for row in every if str(row["reading"]).startswith(f"{prefix}-")]
    counts = Counter(row["reading"] for row in found)
    assert sent.acknowledged.keys() - counts.keys() == set(), "lost"
    assert [reading for reading, count in counts.items() if count > 1] == [], "doubled"
    assert counts.keys() == sent.acknowledged.keys()
    assert {row["reading"]: row["position"] & SEQUENCE_MAX for row in found} == sent.acknowledged
    assert await rows(stack, "SELECT reason FROM dead_letters") == []
    print(f"{len(sent.acknowledged)} readings, {sent.retries} tries again")  # noqa: T201 - the size of what was tried


async def test_one_server_that_has_been_drained_becomes_a_cluster(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The way of docs/operations.md: no gateway, drain, three servers with empty volumes, the same PostgreSQL."""
    program("pgbouncer", install="apt install pgbouncer")
    nats_cli()
    stack = Stack(folder=tmp_path_factory.mktemp("upgrade"), passwords=passwords())
    with stack.cleanup:
        start_database(stack)
        assert stack.run_once("migrate").code == 0
        start_nats(stack)
        assert run_init(stack).code == 0
        for role in ROLES:
            stack.start(role)
        assert stack.run_once("pulse", "tenant", "add", TENANT).code == 0
        added = stack.run_once("pulse", "device", "add", TENANT, "d1", "--json")
        token = json.loads(added.output)["devices"][0]["token"]
        await accepted(stack, token, {"before": 1}, durability="disk")

        stack.running["gateway"].stop(STOP_S_MAX)
        await everything_is_settled(stack)
        for name in [*ROLES, "nats"]:
            stack.running[name].stop(STOP_S_MAX)
        start_cluster(stack)
        assert run_init(stack).code == 0
        for role in ROLES:
            stack.start(role)

        await accepted(stack, token, {"after": 1}, durability="replicated")
        await everything_is_settled(stack)
        found = await rows(stack, "SELECT DISTINCT jsonb_object_keys(metrics) AS name FROM telemetry ORDER BY name")
        assert [row["name"] for row in found] == ["after", "before"]
        done = audit(stack)
        assert not any(each["expired"] for each in done["audits"])
        assert done["ok"]


async def accepted(stack: Stack, token: str, metrics: dict[str, int], *, durability: str) -> None:
    """Send a reading of device d1 until it is; a registry that is being read again does not know the device."""
    url = url_of(stack, "gateway", "gateway", f"/ingest/v1/tenant/{TENANT}/device/d1/telemetry")

    async def is_accepted() -> bool:
        status, answer = await asyncio.to_thread(ask, url, body={"metrics": metrics}, token=token)
        return status == 202 and json.loads(answer)["durability"] == durability

    await eventually(is_accepted, "the gateway knows the device", limit_s=LIMIT_S)


async def everything_is_settled(stack: Stack) -> None:
    async def is_settled() -> bool:
        done = await asyncio.to_thread(audit, stack)
        return all(each["in_flight"] == 0 for each in done["audits"])

    await eventually(is_settled, "everything is settled", limit_s=LIMIT_S)
