"""The connection to NATS through outages, wrong passwords and errors that the server sends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import structlog
from nats import errors as nats_errors
from structlog.testing import LogCapture

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats import frames
from pulse.adapters.nats.connection import close, connect, connection
from pulse.domain.errors import ConfigurationError, Outage


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[capture])
    yield capture.entries
    structlog.configure(**before)


class Signals:
    """Events for the callbacks of a connection."""

    def __init__(self) -> None:
        self.disconnected = asyncio.Event()
        self.reconnected = asyncio.Event()

    async def on_disconnect(self) -> None:
        self.disconnected.set()

    async def on_reconnect(self) -> None:
        self.reconnected.set()


async def test_a_command_learns_at_once_that_nobody_is_there(free_port: int) -> None:
    async with asyncio.timeout(30):
        with pytest.raises(Outage, match="connection refused"):
            await connect(f"nats://127.0.0.1:{free_port}", name="test")


async def test_a_service_waits_for_a_server_that_comes_late(nats_server_factory: Any, logged: list[Any]) -> None:
    server = nats_server_factory()
    waiting = asyncio.create_task(connect(server.url, name="test", wait_s=60))
    while not logged:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(30):
        client = await waiting
    await client.close()
    assert server.url not in str(logged)


async def test_any_one_of_several_servers_will_do(nats: NatsServer, free_port: int) -> None:
    credentials = nats.url.removeprefix("nats://").partition("@")[0]
    async with connection(f"nats://{credentials}@127.0.0.1:{free_port}, nats://127.0.0.1:{nats.port}", name="t") as one:
        assert one.is_connected


async def test_it_reconnects_after_a_crash_with_its_subscriptions(nats: NatsServer, logged: list[Any]) -> None:
    signals = Signals()
    client = await connect(
        nats.url, name="test", on_disconnect=signals.on_disconnect, on_reconnect=signals.on_reconnect
    )
    subscription = await client.subscribe("greeting")
    nats.kill()
    async with asyncio.timeout(30):
        await signals.disconnected.wait()
        while client._server_pool[0].reconnects < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.to_thread(nats.start)
        await signals.reconnected.wait()
        await client.publish("greeting", b"hello")
        assert (await subscription.next_msg(timeout=20)).data == b"hello"
    await client.close()
    # What nats-py says of its tries stands in between, and of the last one sometimes behind.
    told = [entry["event"] for entry in logged if entry["event"].startswith("the connection to NATS is ")]
    assert told == ["the connection to NATS is lost", "the connection to NATS is back"]


async def test_an_error_that_the_server_sends_is_survived(nats: NatsServer) -> None:
    """A control line that is too long makes the server send -ERR and hang up; nats-py would close for good."""
    signals = Signals()
    client = await connect(nats.url, name="test", on_reconnect=signals.on_reconnect)
    assert client._transport is not None
    client._transport.write(b"SUB " + b"x" * 8192 + b" 1\r\n")
    async with asyncio.timeout(30):
        await signals.reconnected.wait()
    assert client.is_connected
    await client.close()


async def test_a_refused_permission_is_logged_and_kept(nats_server_factory: Any, logged: list[Any]) -> None:
    user = '{ user: pulse, password: secret, permissions: { publish: ["mine.>"] } }'
    server = nats_server_factory(password="secret", extra_conf=f"authorization: {{ users: [ {user} ] }}")
    server.start()
    async with connection(server.url, name="test") as client:
        assert client.denied_since(0) == ""
        await client.publish("yours", b"")
        async with asyncio.timeout(10):
            while not client.denied_since(0):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert client.denied_since(0) == 'permissions violation for publish to "yours"'
        assert client.is_connected
    assert [entry["log_level"] for entry in logged] == ["error"]


@pytest.mark.parametrize("password", ["p@ss/w:rd", "%41", "ü ß"])
async def test_a_password_is_decoded_from_the_url(nats_server_factory: Any, password: str) -> None:
    users = [{"user": "pulse", "password": "plain"}, {"user": "u:ser", "password": password}]
    authorization = json.dumps({"users": users}, ensure_ascii=False)
    server = nats_server_factory(password="plain", extra_conf=f"authorization: {authorization}")
    server.start()
    url = f"nats://{quote('u:ser', safe='')}:{quote(password, safe='')}@127.0.0.1:{server.port}"
    async with connection(url, name="test") as client:
        assert client.is_connected


async def test_wrong_credentials_are_the_operators_to_mend_and_never_shown(nats: NatsServer) -> None:
    with pytest.raises(ConfigurationError) as refused:
        await connect(f"nats://pulse:hidden@127.0.0.1:{nats.port}", name="test", wait_s=60)
    assert "hidden" not in f"{refused.value}{refused.value.__cause__}"


async def test_publishing_into_an_outage_is_bounded(nats: NatsServer) -> None:
    signals = Signals()
    client = await connect(nats.url, name="test", pending_bytes_max=10_000, on_disconnect=signals.on_disconnect)
    nats.kill()
    async with asyncio.timeout(30):
        await signals.disconnected.wait()
    for _ in range(9):
        await client.publish("x", b"x" * 1000)
    with pytest.raises(nats_errors.OutboundBufferLimitError):
        await client.publish("x", b"x" * 1000)
    async with asyncio.timeout(10):
        await client.close()


async def test_a_server_that_reads_no_more_is_left_in_time(nats: NatsServer) -> None:
    """Frozen, say: its socket stands, and what was written to it never leaves."""
    client = await connect(nats.url, name="test")
    assert nats.pid is not None
    os.kill(nats.pid, signal.SIGSTOP)
    try:
        assert client._transport is not None
        client._transport.write(b"PUB x 0\r\n\r\n" * 3_000_000)  # more than the system takes for it
        async with asyncio.timeout(30):
            await close(client, drain_s_max=0.5)
    finally:
        os.kill(nats.pid, signal.SIGCONT)
    assert client.is_closed


async def test_a_subject_that_is_not_utf_8_ends_nothing(nats: NatsServer) -> None:
    """Whoever may publish may publish this, and nobody else may be cut off by it."""
    async with connection(nats.url, name="test") as client:
        subscription = await client.subscribe("odd.*")
        await client.publish("odd.plain", b"before")
        await client.flush()
        frames.write(client, b"PUB odd.\xff\xfe 1\r\nx\r\n", messages=1)
        await client.publish("odd.plain", b"after")
        received = [await subscription.next_msg(timeout=30) for _ in range(3)]
        assert [message.data for message in received] == [b"before", b"x", b"after"]
        assert client.stats["reconnects"] == 0
