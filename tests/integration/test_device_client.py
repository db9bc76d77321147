"""A device's side of the gateway, against a server that misbehaves as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from pulse.adapters.http import device
from pulse.adapters.http.device import NO_ANSWER, Answer, DeviceClient, open_device_client
from pulse.cli import simulate_delivery
from pulse.cli.simulate_delivery import deliver as deliver_until_final
from pulse.domain.errors import ConfigurationError, Outage
from pulse.domain.simulation import Message

MESSAGE = Message("t-1", "token", "telemetry", b'{"metrics":{"t":1}}', "key-1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_delivery, "RETRY_DELAY_S_MIN", 0.001)
    monkeypatch.setattr(simulate_delivery, "RETRY_DELAY_S_MAX", 0.001)


@asynccontextmanager
async def gateway(*answers: Callable[[web.Request], web.Response]) -> AsyncIterator[tuple[DeviceClient, list[str]]]:
    """Gives one answer after the other, the last one for ever; the list is the keys that it was sent."""
    keys: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        assert request.path == "/ingest/v1/tenant/acme/device/t-1/telemetry"
        assert request.headers["Authorization"] == "Bearer token"
        assert await request.read() == MESSAGE.body
        keys.append(request.headers["Idempotency-Key"])
        return answers[min(len(keys), len(answers)) - 1](request)

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        async with open_device_client(f"http://127.0.0.1:{port}", tenant_id="acme", connections=2) as client:
            yield client, keys
    finally:
        await runner.cleanup()


def status(code: int, **headers: str) -> Callable[[web.Request], web.Response]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: web.Response(status=code, headers=named)


def hang_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def deliver(client: DeviceClient, *, stopped: Callable[[], bool] = lambda: False) -> tuple[Answer, list[int]]:
    told: list[int] = []
    async with asyncio.timeout(30):
        answer = await deliver_until_final(
            client.send, MESSAGE, told=lambda each: told.append(each.status), stopped=stopped
        )
    return answer, told


async def test_it_is_sent_again_under_the_same_key_until_it_is_accepted() -> None:
    async with gateway(status(503), hang_up, status(429), status(202)) as (client, keys):
        answer, told = await deliver(client)
    assert (answer.status, told) == (202, [503, NO_ANSWER, 429, 202])
    assert keys == ["key-1"] * 4


@pytest.mark.parametrize("code", [400, 401, 413, 422])
async def test_a_refusal_is_final(code: int) -> None:
    async with gateway(status(code), status(202)) as (client, _):
        assert (await deliver(client))[1] == [code]


async def test_retry_after_is_waited_for_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "RETRY_AFTER_S_MAX", 7.0)
    async with gateway(status(503, Retry_After="3"), status(503, Retry_After="9999")) as (client, _):
        assert (await client.send(MESSAGE)).retry_after_s == 3.0
        assert (await client.send(MESSAGE)).retry_after_s == 7.0


async def test_it_gives_up_when_the_next_try_would_be_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_delivery, "RETRY_S_MAX", 1.0)
    async with gateway(status(503, Retry_After="15"), status(202)) as (client, _):
        assert (await deliver(client))[1] == [503]


async def test_whoever_is_stopped_does_not_try_again() -> None:
    async with gateway(status(503, Retry_After="15"), status(202)) as (client, _):
        assert (await deliver(client, stopped=lambda: True))[1] == [503]


async def test_a_duplicate_is_told_by_the_answer() -> None:
    def known(_: web.Request) -> web.Response:
        return web.Response(status=202, text='{"status":"accepted","duplicate":true}')

    async with gateway(known) as (client, _):
        assert (await deliver(client))[0].duplicate


async def test_a_gateway_that_is_not_there_is_an_outage(free_port: int) -> None:
    async with open_device_client(f"http://127.0.0.1:{free_port}", tenant_id="acme", connections=1) as client:
        with pytest.raises(Outage, match=f"127.0.0.1:{free_port}"):
            await client.check()


@pytest.mark.parametrize("url", ["", "gateway", "ftp://host", "http://", "http://host:port"])
async def test_what_is_no_url_of_a_gateway_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        async with open_device_client(url, tenant_id="acme", connections=1):
            pass
