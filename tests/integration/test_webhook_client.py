"""One attempt at a webhook, against real servers that behave badly: it ends in time, and goes nowhere else."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from standardwebhooks.webhooks import Webhook

from compose_server import program
from pulse.adapters.webhook.client import WebhookBounds, WebhookClient, WebhookRequest, open_webhook_client
from pulse.adapters.webhook.guard import GuardedResolver, Lookup, SystemLookup, guarded_socket
from pulse.domain.addresses import read_networks
from pulse.domain.delivery import Attempted, Failure
from pulse.domain.webhook import make_secret, signed_headers
from pulse.domain.webhook_url import PUBLIC, Allowed, read_hosts, read_webhook_url
from webhook_sink import (
    HOST,
    OK,
    Behaviour,
    Sink,
    answering,
    dripping,
    endless,
    garbage,
    hanging,
    hanging_up,
    sink,
    stalling_body,
)

LOOPBACK = Allowed(networks=read_networks([HOST]))
NAMED = Allowed(hosts=read_hosts(["sink.internal"]))
SHORT_S = 1.0
LONG_S = 30.0
"""Never waited for: what a test expects comes before, or it fails."""


def answers(*addresses: str) -> Lookup:
    async def lookup(_: str) -> Sequence[str]:
        return addresses

    return lookup


async def attempt(
    client: WebhookClient, url: str, *, allowed: Allowed = LOOPBACK, timeout_s: float = LONG_S, body: bytes = b"{}"
) -> Attempted:
    target = read_webhook_url(url, allowed=allowed)
    return await client.attempt(WebhookRequest(target, body, {"X-Test": "1"}, timeout_s))


@pytest.fixture
async def client() -> AsyncIterator[WebhookClient]:
    async with open_webhook_client(allowed=LOOPBACK, bounds=WebhookBounds(excerpt_s_max=SHORT_S)) as client:
        yield client


async def test_a_webhook_is_posted_and_the_reference_verifier_takes_it(client: WebhookClient) -> None:
    secrets = [make_secret(bytes([number]) * 32) for number in (1, 2)]
    body = b'{"temp":21.50}'
    now_s = int(datetime.now(UTC).timestamp())
    headers = signed_headers(secrets, message_id="7:r-1", timestamp_s=now_s, body=body)
    async with sink(answering()) as server:
        url = read_webhook_url(server.url("/a%2Fb?c=%20"), allowed=LOOPBACK)
        said = await client.attempt(WebhookRequest(url, body, headers, LONG_S))
    assert (said.status, said.failure, said.excerpt) == (200, None, b"ok")
    assert said.connect_s is not None
    assert said.connect_s <= said.elapsed_s
    head, _, received = server.requests[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /a%2Fb?c=%20 HTTP/1.1"
    got = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    assert received == body
    assert got["Content-Type"] == "application/json"
    assert got["User-Agent"] == "pulse-webhooks"
    for secret in secrets:
        Webhook(secret).verify(received, got)


async def test_a_connection_is_used_again_and_its_answers_are_told_apart(client: WebhookClient) -> None:
    async with sink(answering()) as server:
        first = await attempt(client, server.url())
        second = await attempt(client, server.url())
    assert server.connections == 1
    assert first.connect_s is not None
    assert second.connect_s is None


@pytest.mark.parametrize("status", [204, 301, 302, 307, 308, 404, 410, 429, 500, 503])
async def test_every_status_is_reported_and_no_redirect_is_followed(client: WebhookClient, status: int) -> None:
    async with sink(answering()) as inside:
        response = (
            f"HTTP/1.1 {status} X\r\nLocation: {inside.url('/secret')}\r\nRetry-After: 9\r\nContent-Length: 0\r\n\r\n"
        )
        async with sink(answering(response.encode())) as server:
            said = await attempt(client, server.url())
    assert (said.status, said.retry_after) == (status, "9")
    assert inside.connections == 0


@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [
        (hanging, Failure.TIMEOUT),
        (dripping, Failure.TIMEOUT),
        (hanging_up, Failure.DISCONNECTED),
        (garbage, Failure.PROTOCOL),
        (answering(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 20_000 + b"\r\n\r\n"), Failure.PROTOCOL),
        (answering(b"HTTP/9.9 hello\r\n\r\n"), Failure.PROTOCOL),
    ],
)
async def test_what_a_bad_server_does_is_told(client: WebhookClient, behaviour: Behaviour, failure: Failure) -> None:
    async with sink(behaviour) as server:
        said = await attempt(client, server.url(), timeout_s=SHORT_S if failure is Failure.TIMEOUT else LONG_S)
    assert (said.status, said.failure) == (None, failure)
    assert said.error
    assert server.connections == 1


async def test_an_endless_body_is_read_up_to_the_excerpt_and_no_further(client: WebhookClient) -> None:
    async with sink(endless) as server:
        said = await attempt(client, server.url())
        assert (await attempt(client, server.url())).status == 200
    assert (said.status, said.excerpt) == (200, b"x" * 1024)
    assert server.connections == 2, "a connection with half an answer in it is not used again"
    assert server.bytes_taken < 64 * 1024 * 1024


async def test_a_status_counts_even_if_its_body_never_comes(client: WebhookClient) -> None:
    async with sink(stalling_body) as server:
        said = await attempt(client, server.url())
    assert (said.status, said.retry_after, said.excerpt) == (503, "7", b"part")


async def test_a_connection_that_was_closed_while_idle_costs_no_attempt(client: WebhookClient) -> None:
    """The server closes upon the second request, as one does whose own idle time ends in that moment."""

    async def once(self: Sink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answering(times=1)(self, reader, writer)
        await reader.read(1)

    async with sink(once) as server:
        assert (await attempt(client, server.url())).status == 200
        assert (await attempt(client, server.url())).status == 200
    assert server.connections == 2


async def test_a_closed_port_is_told(client: WebhookClient) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        said = await attempt(client, f"http://{HOST}:{taken.getsockname()[1]}/")
    assert said.failure is Failure.CONNECT


async def test_a_server_that_speaks_no_tls_is_told(client: WebhookClient) -> None:
    async with sink(garbage) as server:
        said = await attempt(client, server.url(scheme="https"))
    assert said.failure is Failure.TLS


async def test_a_certificate_that_nobody_vouches_for_is_refused(client: WebhookClient, tmp_path: Path) -> None:
    program("openssl", install="apt install openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=sink.internal"
    names = ["-addext", "subjectAltName=DNS:sink.internal"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True, timeout=30)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)
    vouched = ssl.create_default_context(cafile=str(certificate))
    async with sink(answering(), tls=server_side) as server:
        assert (await attempt(client, server.url(scheme="https"))).failure is Failure.TLS
        async with open_webhook_client(allowed=NAMED, lookup=answers(HOST), tls=vouched) as named:
            url = server.url(scheme="https", host="sink.internal")
            assert (await attempt(named, url, allowed=NAMED)).status == 200
    assert len(server.requests) == 1


async def test_a_local_server_is_reached_through_the_allow_list_alone() -> None:
    async with sink(answering()) as server:
        allowed_url = read_webhook_url(server.url(), allowed=LOOPBACK)
        request = WebhookRequest(allowed_url, b"{}", {}, LONG_S)
        async with open_webhook_client() as strict:
            assert (await strict.attempt(request)).failure is Failure.FORBIDDEN_TARGET
        assert server.connections == 0
        async with open_webhook_client(allowed=LOOPBACK) as client:
            assert (await client.attempt(request)).status == 200
    assert server.connections == 1


INSIDE = [
    "127.0.0.1",
    "::1",
    "10.0.0.7",
    "169.254.169.254",
    "fd00:ec2::254",
    "fe80::1%1",
    "::ffff:127.0.0.1",
    "0.0.0.0",  # noqa: S104
    "100.64.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "224.0.0.1",
]


@pytest.mark.parametrize("address", INSIDE)
@pytest.mark.parametrize("others", [(), ("93.184.215.14",)])
async def test_a_public_name_with_an_address_inside_is_refused_whole(address: str, others: tuple[str, ...]) -> None:
    async with open_webhook_client(lookup=answers(*others, address)) as client:
        said = await attempt(client, "http://rebind.example.com:8080/", allowed=PUBLIC)
    assert said.failure is Failure.FORBIDDEN_TARGET
    assert "is not allowed" in said.error


async def test_a_name_that_is_rebound_is_dialled_at_the_address_that_was_checked() -> None:
    """Each question gets another answer; a guard that asked once to check and once to connect would be led inside."""
    asked: list[str] = []

    async def lookup(host: str) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    async with sink(answering()) as server, open_webhook_client(allowed=LOOPBACK, lookup=lookup) as client:
        assert (await attempt(client, server.url(host="rebind.example.com"))).status == 200
        assert (await attempt(client, server.url(host="rebind.example.com"))).status == 200
        assert asked == ["rebind.example.com"], "the connection stands, and nothing is asked again"
    async with open_webhook_client(allowed=LOOPBACK, lookup=lookup) as client:
        assert (await attempt(client, server.url(host="rebind.example.com"))).failure is Failure.FORBIDDEN_TARGET


async def test_an_allowed_name_reaches_any_address_and_no_other_name_does() -> None:
    async with sink(answering()) as server, open_webhook_client(allowed=NAMED, lookup=answers(HOST)) as client:
        assert (await attempt(client, server.url(host="sink.internal"), allowed=NAMED)).status == 200
        said = await attempt(client, server.url(host="other.example.com"), allowed=NAMED)
    assert said.failure is Failure.FORBIDDEN_TARGET


async def test_a_name_without_an_address_is_told() -> None:
    async def lookup(_: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    for each in (lookup, answers()):
        async with open_webhook_client(lookup=each) as client:
            said = await attempt(client, "https://nowhere.example.com/", allowed=PUBLIC)
        assert said.failure is Failure.RESOLVE


async def test_a_name_server_that_hangs_ends_with_the_attempt() -> None:
    async def lookup(_: str) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    async with open_webhook_client(lookup=lookup) as client:
        said = await attempt(client, "https://slow.example.com/", allowed=PUBLIC, timeout_s=SHORT_S)
    assert said.failure is Failure.CONNECT_TIMEOUT


async def test_destinations_that_hang_do_not_hold_up_another(client: WebhookClient) -> None:
    """Eight times sixteen connections hang, which is above the bound that aiohttp has on all of them by default."""
    async with AsyncExitStack() as stack:
        bad = [await stack.enter_async_context(sink(hanging)) for _ in range(8)]
        good = await stack.enter_async_context(sink(answering()))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        stuck = [group.create_task(attempt(client, each.url())) for each in bad for _ in range(20)]
        for each in bad:
            await each.asked.wait()
        assert (await attempt(client, good.url(), timeout_s=10.0)).status == 200
        assert not any(task.done() for task in stuck)
        assert max(each.connections for each in bad) <= WebhookBounds().connections_per_destination
        for task in stuck:
            task.cancel()


async def test_the_socket_itself_refuses_what_a_resolver_let_through() -> None:
    make = guarded_socket(())
    for address in ("127.0.0.1", "10.0.0.1", "::1"):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with pytest.raises(OSError, match="not allowed"):
            make((family, socket.SOCK_STREAM, 6, "", (address, 80)))
    make((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 80))).close()


async def test_proxies_and_netrc_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sink(answering()) as proxy, sink(answering()) as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url())
        async with open_webhook_client(allowed=LOOPBACK) as client:
            assert (await attempt(client, server.url())).status == 200
    assert (proxy.connections, server.connections) == (0, 1)


async def test_who_asks_for_a_name_that_is_looked_up_waits_for_the_same_answer() -> None:
    lookup = SystemLookup(threads=1)
    try:
        first, second = await asyncio.gather(lookup("localhost"), lookup("localhost"))
        assert first is second
        with pytest.raises(OSError, match="not allowed"):
            await GuardedResolver(lookup, ()).resolve("localhost", 80)
    finally:
        lookup.close()


@asynccontextmanager
async def cookie_setting() -> AsyncIterator[Sink]:
    async with sink(answering(OK.replace(b"OK\r\n", b"OK\r\nSet-Cookie: a=b\r\n", 1))) as server:
        yield server


async def test_a_cookie_is_not_sent_back(client: WebhookClient) -> None:
    async with cookie_setting() as server:
        for _ in range(2):
            await attempt(client, server.url())
    assert b"a=b" not in server.requests[1]
