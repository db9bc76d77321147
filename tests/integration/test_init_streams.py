"""`compose/nats/init-streams.sh` with a POSIX shell, the real `nats` CLI and a server with compose's own accounts."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compose_files import NATS_CONF, TOPOLOGY
from compose_server import ComposeNats, Finished, compose_nats, init_streams, nats_cli
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.jetstream import request
from pulse.adapters.nats.provisioner import Provisioner
from pulse.topology.declared import load

Answer = dict[str, Any]

SHELLS = [["/bin/sh"], ["dash"], ["busybox", "sh"], ["bash", "--posix"]]


@pytest.fixture
def server(scratch: Path) -> Iterator[ComposeNats]:
    """An empty one."""
    nats_cli()
    with compose_nats(scratch) as running:
        yield running


async def api(server: ComposeNats, subject: str, body: Answer | None = None) -> Answer:
    """One request to the JetStream API, as the provisioner."""
    async with connection(server.url("provisioner"), name="test") as client:
        return await request(client, subject, body or {}, dict, doing="test")


async def everything(server: ComposeNats) -> dict[str, Answer]:
    """INFO of every stream and every consumer, by name, without the time of the answer."""
    found: dict[str, Answer] = {}
    async with connection(server.url("provisioner"), name="test") as client:
        streams = await request(client, "STREAM.NAMES", {}, dict, doing="test")
        for stream in streams["streams"] or []:
            found[stream] = await request(client, f"STREAM.INFO.{stream}", {}, dict, doing="test")
            consumers = await request(client, f"CONSUMER.NAMES.{stream}", {}, dict, doing="test")
            for name in consumers["consumers"] or []:
                info = await request(client, f"CONSUMER.INFO.{stream}.{name}", {}, dict, doing="test")
                found[f"{stream}.{name}"] = info
    return {name: {key: value for key, value in info.items() if key != "ts"} for name, info in found.items()}


def configurations(found: dict[str, Answer]) -> dict[str, Answer]:
    return {name: info["config"] for name, info in found.items()}


def files() -> dict[str, Answer]:
    """Every declared object by name."""
    return {path.stem: json.loads(path.read_bytes()) for path in TOPOLOGY.glob("*/*.json")}


def ready_lines(done: Finished) -> list[str]:
    return [line for line in done.output.splitlines() if " ready" in line and "NATS" not in line]


def copied_topology(scratch: Path) -> Path:
    copy = scratch / "topology"
    for kind in ("streams", "consumers"):
        shutil.copytree(TOPOLOGY / kind, copy / kind)
    return copy


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
async def test_from_empty_everything_has_exactly_the_values_of_the_files(
    server: ComposeNats, scratch: Path, shell: list[str]
) -> None:
    """A value that the server leaves out of its answer is its zero."""
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    done = init_streams(server.url("provisioner"), scratch, shell=shell)
    assert (done.code, done.errors) == (0, "")
    assert done.output.splitlines()[-1] == "All streams and consumers initialized"
    found = configurations(await everything(server))
    assert set(found) == set(files())
    for name, declared in files().items():
        for key, value in declared.items():
            assert found[name].get(key, type(value)()) == value, f"{name} {key}"


async def test_the_python_provisioner_makes_the_same(server: ComposeNats, scratch: Path) -> None:
    assert init_streams(server.url("provisioner"), scratch).code == 0
    other_folder = scratch / "other"
    other_folder.mkdir()
    with compose_nats(other_folder) as other:
        async with connection(other.url("provisioner"), name="test") as client:
            provisioner = Provisioner(client)
            await provisioner.apply(load(), await provisioner.plan(load()))
        assert configurations(await everything(other)) == configurations(await everything(server))


async def test_the_python_provisioner_finds_nothing_to_do_after_it(server: ComposeNats, scratch: Path) -> None:
    assert init_streams(server.url("provisioner"), scratch).code == 0
    async with connection(server.url("provisioner"), name="test") as client:
        assert (await Provisioner(client).plan(load())).changes == ()


async def test_a_second_run_changes_nothing(server: ComposeNats, scratch: Path) -> None:
    assert init_streams(server.url("provisioner"), scratch).code == 0
    before = await everything(server)
    done = init_streams(server.url("provisioner"), scratch)
    assert done.code == 0
    assert [line for line in ready_lines(done) if not line.endswith(" ready")] == []
    assert len(ready_lines(done)) == len(files())
    assert await everything(server) == before


async def test_what_has_drifted_is_brought_back_and_keeps_its_messages(server: ComposeNats, scratch: Path) -> None:
    assert init_streams(server.url("provisioner"), scratch).code == 0
    wanted = configurations(await everything(server))
    async with connection(server.url("provisioner"), name="test") as client:
        await client.publish("telemetry.test-tenant", b"{}")
        await client.flush()
    changes: dict[str, Answer] = {
        "TELEMETRY": {"max_age": 60_000_000_000, "duplicate_window": 1_000_000_000, "allow_atomic": False},
        "ROUTES": {"discard": "old", "max_bytes": 1000},
        "SHADOW": {"subjects": ["shadow.*"], "allow_direct": False, "description": ""},
    }
    for stream, changed in changes.items():
        await api(server, f"STREAM.UPDATE.{stream}", {**wanted[stream], **changed})
    drifted = {**wanted["TELEMETRY.ingest-workers"], "max_ack_pending": 1000, "ack_wait": 5_000_000_000}
    body = {"stream_name": "TELEMETRY", "action": "update", "config": drifted}
    await api(server, "CONSUMER.CREATE.TELEMETRY.ingest-workers", body)
    await api(server, "CONSUMER.DELETE.ROUTES.route-delivery")
    await api(server, "STREAM.DELETE.COMMANDS")
    assert configurations(await everything(server)) != wanted

    done = init_streams(server.url("provisioner"), scratch)

    assert (done.code, done.errors) == (0, "")
    assert configurations(await everything(server)) == wanted
    assert [line for line in ready_lines(done) if not line.endswith(" ready")] == [
        "Stream COMMANDS ready (created)",
        "Stream ROUTES ready (updated)",
        "Stream SHADOW ready (updated)",
        "Stream TELEMETRY ready (updated)",
        "Consumer command-workers ready (created)",
        "Consumer route-delivery ready (created)",
        "Consumer ingest-workers ready (updated)",
    ]
    assert (await api(server, "STREAM.INFO.TELEMETRY"))["state"]["messages"] == 1


async def test_a_server_that_comes_later_is_waited_for(scratch: Path) -> None:
    nats_cli()
    server = ComposeNats(scratch)
    waiting = asyncio.create_task(asyncio.to_thread(init_streams, server.url("provisioner"), scratch))
    await asyncio.to_thread(server.process.start)
    try:
        assert (await waiting).code == 0
    finally:
        server.process.kill()


def refused(done: Finished, *reasons: str) -> None:
    """It failed, its last line says why, and no password is in anything that it said."""
    assert done.code == 1
    assert "initialized" not in done.output
    last = done.errors.splitlines()[-1]
    for reason in reasons:
        assert reason in done.errors, done.errors
    assert last
    assert "@" not in done.output + done.errors
    assert not re.search(r"p[0-9a-f]{32}", done.output + done.errors)


async def test_a_server_that_does_not_answer_is_an_error_after_the_wait(free_port: int, scratch: Path) -> None:
    url = f"nats://provisioner:{'p' + 32 * '0'}@127.0.0.1:{free_port}"
    refused(init_streams(url, scratch, NATS_WAIT_S="1"), "NATS is of no use after 1 s", "no servers available")


async def test_a_wrong_password_is_an_error_at_once(server: ComposeNats, scratch: Path) -> None:
    done = init_streams(server.url("provisioner", password="p" + 32 * "0"), scratch, NATS_WAIT_S="3600")
    refused(done, "refuses the user or password", "Authorization Violation")


async def test_a_user_who_may_not_is_an_error_that_names_the_permission(server: ComposeNats, scratch: Path) -> None:
    refused(init_streams(server.url("gateway"), scratch, NATS_WAIT_S="1"), "Permissions Violation for Publish")


async def test_an_account_without_jetstream_is_an_error(scratch: Path) -> None:
    nats_cli()
    text = NATS_CONF.read_text("utf-8").replace("jetstream: enabled", "jetstream: disabled")
    with compose_nats(scratch, text=text) as server:
        done = init_streams(server.url("provisioner"), scratch)
    refused(done, "STREAM.INFO.", "JetStream", "not enabled")


@pytest.mark.parametrize(
    "broken",
    [
        ('"retention": "limits",', '"retention": "limits"', "invalid JSON"),
        ('"allow_atomic": true', '"allow_atomik": true', 'unknown field "allow_atomik"'),
        ('"name": "TELEMETRY"', '"name": "TELEMETRIE"', "file and name must agree"),
        ('"num_replicas": 1', '"num_replicas": 3', "replicas > 1 not supported in non-clustered mode"),
    ],
)
@pytest.mark.parametrize("existing", [False, True], ids=["from empty", "existing"])
async def test_a_broken_file_is_an_error_that_says_what_is_wrong(
    server: ComposeNats, scratch: Path, broken: tuple[str, str, str], existing: bool
) -> None:
    old, new, reason = broken
    topology = copied_topology(scratch)
    if existing:
        assert init_streams(server.url("provisioner"), scratch).code == 0
    file = topology / "streams" / "TELEMETRY.json"
    assert old in file.read_text("utf-8")
    file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    done = init_streams(server.url("provisioner"), scratch, TOPOLOGY_DIR=str(topology))
    refused(done, reason, "TELEMETRY")


async def test_a_file_that_is_not_mounted_is_an_error(server: ComposeNats, scratch: Path) -> None:
    done = init_streams(server.url("provisioner"), scratch, TOPOLOGY_DIR=str(scratch / "nowhere"))
    refused(done, "cannot read", "nowhere/streams/*.json")


async def test_drift_that_cannot_be_mended_in_place_is_an_error_that_names_the_way_out(
    server: ComposeNats, scratch: Path
) -> None:
    await api(server, "STREAM.CREATE.ROUTES", {**files()["ROUTES"], "retention": "limits"})
    done = init_streams(server.url("provisioner"), scratch)
    refused(done, "STREAM.UPDATE.ROUTES", "retention", "`pulse streams plan` names the way out")


async def test_replicas_are_laid_over_every_stream(server: ComposeNats, scratch: Path) -> None:
    """Which a server on its own refuses."""
    done = init_streams(server.url("provisioner"), scratch, STREAM_REPLICAS="3")
    refused(done, "replicas > 1 not supported in non-clustered mode")
