"""The gateway over real connections, on a nats-server that fsyncs every message: what each request is answered."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import string
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import zstandard
from yarl import URL

from gateway_process import LIMIT_S, TOKEN, prepared, project, serving
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import PulseClient
from pulse.domain.identity import Tenant
from pulse.domain.limits import Rate, TenantLimits
from pulse.runtime.settings import Settings

PAYLOAD = b'{"metrics":{"temperature":21.5}}'
PATH = "/ingest/v1/tenant/acme/device/d0/telemetry"
BATCH = "/ingest/v1/batch"


@dataclass
class Asked:
    status: int
    headers: dict[str, str]
    told: Any


@dataclass
class Edge:
    url: str
    client: PulseClient
    session: aiohttp.ClientSession
    query: str = ""
    """With one, a request goes through ASGI; without, a single message goes past it."""

    async def ask(
        self, path: str, body: bytes = b"", *, method: str = "POST", token: str | None = TOKEN, **headers: str
    ) -> Asked:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        sent.setdefault("content-type", "application/json")
        if token is not None:
            sent["authorization"] = f"Bearer {token}"
        async with self.session.request(
            method,
            URL(self.url + path + self.query, encoded=True),
            data=body,
            headers=sent,
            skip_auto_headers=["accept-encoding"],
        ) as answer:
            text = await answer.read()
            return Asked(
                answer.status,
                {name.lower(): value for name, value in answer.headers.items()},
                json.loads(text) if text and "json" in answer.headers["content-type"] else text,
            )

    async def stored(self, seq: int) -> dict[str, Any]:
        """The envelope at a sequence of the stream."""
        message = await self.client.jetstream().get_msg("TELEMETRY", seq)
        assert message.data is not None
        decoded: dict[str, Any] = json.loads(message.data)
        return decoded


@pytest.fixture(params=["?asgi", ""], ids=["through ASGI", "past ASGI"])
async def edge(nats: NatsServer, request: pytest.FixtureRequest) -> AsyncIterator[Edge]:
    settings = Settings(nats_url=nats.url, gateway_port=ports.free_port())
    async with (
        prepared(nats) as client,
        serving(client, settings) as url,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=100)) as session,
    ):
        yield Edge(url, client, session, request.param)


async def talk(edge: Edge, request: bytes) -> bytes:
    """Send these bytes; all that is answered until the gateway closes, or one whole answer."""
    url = URL(edge.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        async with asyncio.timeout(LIMIT_S):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            return head + await reader.readexactly(length)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_each_202_names_the_sequence_at_which_its_message_stands(edge: Edge) -> None:
    async def send(number: int) -> tuple[int, int]:
        answer = await edge.ask(PATH, json.dumps({"metrics": {"number": number}}).encode())
        assert (answer.status, answer.told["durability"], answer.told["stream"]) == (202, "disk", "TELEMETRY")
        return number, answer.told["seq"]

    for number, seq in await asyncio.gather(*(send(number) for number in range(200))):
        stored = await edge.stored(seq)
        assert stored["payload"] == {"metrics": {"number": number}}
        assert (stored["tenant_id"], stored["device_id"], stored["source"]) == ("acme", "d0", "http")


async def test_each_kind_of_fault_has_its_answer(edge: Edge) -> None:
    """The table of the README, over HTTP; tests/unit/test_device_api.py has the particulars."""
    large = PAYLOAD.ljust(65 * 1024)
    for path, body, headers, status, member in (
        (PATH, b'{"metrics":{"a":NaN}}', {}, 400, ("position", 16)),
        (PATH, PAYLOAD, {"token": "wrong"}, 401, ("reason", "unauthenticated")),
        (PATH.replace("d0", "d99"), PAYLOAD, {}, 401, ("reason", "unauthenticated")),
        (PATH.replace("telemetry", "nothing"), PAYLOAD, {}, 404, ("title", "Not Found")),
        (PATH, large, {}, 413, ("limit", "body_bytes_max")),
        (PATH, gzip.compress(large), {"content_encoding": "gzip"}, 413, ("limit", "body_bytes_max")),
        (PATH, PAYLOAD, {"content_type": "text/plain"}, 415, ("field", "Content-Type")),
        (PATH, PAYLOAD, {"content_encoding": "br"}, 415, ("field", "Content-Encoding")),
        (PATH, b'{"metrics":{"a":null}}', {}, 422, ("field", "metrics.a")),
        (PATH, PAYLOAD, {"idempotency_key": "a b"}, 422, ("field", "Idempotency-Key")),
        (PATH.replace("d0", "a%2Fb"), PAYLOAD, {}, 422, ("field", "device_id")),
        (PATH.replace("acme", "a%00b"), PAYLOAD, {}, 422, ("field", "tenant_id")),
        (PATH.replace("acme", "%ff"), PAYLOAD, {}, 422, ("field", "tenant_id")),
        (PATH.replace("acme", "a/b"), PAYLOAD, {}, 422, ("field", "tenant_id")),
        (PATH.replace("d0", ".."), PAYLOAD, {}, 422, ("field", "device_id")),
        (PATH.replace("d0", "*%3E"), PAYLOAD, {}, 422, ("field", "device_id")),
    ):
        answer = await edge.ask(path, body, **headers)
        assert (answer.status, answer.told["status"], answer.told[member[0]]) == (status, status, member[1])
        assert answer.headers["content-type"] == "application/problem+json"


async def test_coded_bodies_are_taken(edge: Edge) -> None:
    for coding, body in (("gzip", gzip.compress(PAYLOAD)), ("zstd", zstandard.compress(PAYLOAD))):
        answer = await edge.ask(PATH, body, content_encoding=coding)
        assert answer.status == 202
        assert (await edge.stored(answer.told["seq"]))["payload"] == json.loads(PAYLOAD)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT"])
async def test_another_method_is_told_which_is_allowed(edge: Edge, method: str) -> None:
    answer = await edge.ask(PATH, method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert (await edge.ask(PATH, PAYLOAD)).status == 202


async def test_a_refusal_before_the_body_leaves_the_connection_usable(edge: Edge) -> None:
    """The rest of the body is not taken for the next request."""
    wrong = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer wrong\r\ncontent-length: 100000\r\n\r\n".encode()
    right = (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: {len(PAYLOAD)}\r\n\r\n"
    ).encode() + PAYLOAD
    url = URL(edge.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    async with asyncio.timeout(LIMIT_S):
        writer.write(wrong + b"GET / HTTP/1.1\r\n\r\n".ljust(100_000) + right)
        statuses = []
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            statuses.append(int(head.split()[1]))
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
    writer.close()
    await writer.wait_closed()
    assert statuses == [401, 202]


async def test_no_request_line_does_worse_than_a_refusal(edge: Edge) -> None:
    generator = random.Random(1)
    targets = [
        "*",
        "http://x/",
        f"http://x{PATH}",
        "x:1",
        "/",
        "//",
        PATH + "?a=b",
        PATH + "#f",
        PATH.replace("d0", "a b"),
    ]
    alphabet = string.printable.replace("\r", "").replace("\n", "") + "é\x00\x7f%%%//"
    targets += [
        PATH.replace(
            generator.choice(["d0", "acme", "telemetry"]),
            "".join(generator.choices(alphabet, k=generator.randrange(8))),
        )
        for _ in range(300)
    ]
    for target in targets:
        request = f"POST {target} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 2\r\n\r\n{{}}"
        answer = await talk(edge, request.encode("latin-1"))
        assert 400 <= int(answer.split()[1]) < 500, (target, answer)


async def test_a_path_that_is_none_of_ours_is_404_as_a_problem(edge: Edge) -> None:
    for path in ("/", "/nothing", "/ingest", "/ingest/v1/nothing"):
        answer = await edge.ask(path, PAYLOAD)
        assert (answer.status, answer.told["status"]) == (404, 404)
        assert answer.headers["content-type"] == "application/problem+json"


async def test_beyond_its_connections_it_is_503_with_a_time_to_come_again(nats: NatsServer) -> None:
    settings = Settings(nats_url=nats.url, gateway_port=ports.free_port(), gateway_connections_max=1)
    async with (
        prepared(nats) as client,
        serving(client, settings) as url,
        aiohttp.ClientSession() as first,
        aiohttp.ClientSession() as second,
    ):
        assert (await Edge(url, client, first).ask(PATH, PAYLOAD)).status == 202
        answer = await Edge(url, client, second).ask(PATH, PAYLOAD)
        assert (answer.status, answer.told["reason"], answer.headers["retry-after"]) == (503, "overloaded", "1")
        assert answer.headers["content-type"] == "application/problem+json"


async def test_five_bad_rows_of_a_hundred_refuse_only_themselves(edge: Edge) -> None:
    rows: list[dict[str, Any]] = [{"payload": {"metrics": {"number": number}}} for number in range(100)]
    bad = {
        3: {"payload": {"metrics": {}}},
        17: {"device_id": "*", **rows[17]},
        40: {"token": "wrong", **rows[40]},
        41: {"payload": {"metrics": {"a": 1}, "ts": 0}},
        99: {"payload": {"metrics": {"a": "\0"}}},
    }
    for index, row in bad.items():
        rows[index] = row
    body = json.dumps({"tenant_id": "acme", "device_id": "d1", "messages": rows}).encode()
    answer = await edge.ask(BATCH, zstandard.compress(body), content_encoding="zstd")
    assert answer.status == 207
    assert (answer.told["accepted"], answer.told["rejected"]) == (95, 5)
    for index, result in enumerate(answer.told["results"]):
        assert result["index"] == index
        if index in bad:
            assert result["status"] in {401, 422}
            assert result["reason"]
        else:
            assert (await edge.stored(result["seq"]))["payload"] == {"metrics": {"number": index}}
    state = await edge.client.jetstream().stream_info("TELEMETRY")
    assert state.state.messages == 95


async def test_one_device_beyond_its_rate_is_429_and_the_others_are_served(nats: NatsServer) -> None:
    """A hundred times its rate, while the others of its tenant and another tenant send at theirs."""
    settings = Settings(
        nats_url=nats.url,
        gateway_port=ports.free_port(),
        device_messages_per_s=0.01,
        device_messages_burst=5,
        tenant_messages_per_s=0.01,
        tenant_messages_burst=20,
    )
    other = Tenant("other", enabled=True, limits=TenantLimits(messages=Rate(1000, 1000)))
    async with (
        prepared(nats, ["acme", "other"], devices=20) as client,
        serving(client, settings) as url,
        aiohttp.ClientSession() as session,
    ):
        edge = Edge(url, client, session)
        await project(client, [other])

        async def statuses(path: str, count: int) -> list[int]:
            return sorted([(await edge.ask(path, PAYLOAD)).status for _ in range(count)])

        assert await statuses(PATH, 500) == [202] * 5 + [429] * 495
        answer = await edge.ask(PATH, PAYLOAD)
        assert (answer.told["limit"], answer.told["limit_value"]) == ("device_messages_per_s", 0.01)
        assert 1 <= int(answer.headers["retry-after"]) <= 100
        assert await statuses(PATH.replace("d0", "d1"), 5) == [202] * 5
        for number in range(2, 4):
            assert await statuses(PATH.replace("d0", f"d{number}"), 5) == [202] * 5
        answer = await edge.ask(PATH.replace("d0", "d5"), PAYLOAD)
        assert (answer.status, answer.told["limit"]) == (429, "tenant_messages_per_s")
        for number in range(20):
            assert await statuses(PATH.replace("acme", "other").replace("d0", f"d{number}"), 5) == [202] * 5


async def test_a_device_at_100_times_its_rate_and_a_tenant_at_10_times_its_own_take_nothing_from_the_others(
    nats: NatsServer,
) -> None:
    """All at the same time; of what was refused, each answer names the limit that its sender met."""
    share, tenant_share = 10, 40
    settings = Settings(
        nats_url=nats.url,
        gateway_port=ports.free_port(),
        device_messages_per_s=0.001,
        device_messages_burst=share,
    )
    limits = TenantLimits(messages=Rate(0.001, tenant_share), device_messages=Rate(0, 1))
    answers = {sender: Counter[tuple[int, str]]() for sender in ("device", "tenant", "others")}
    async with prepared(nats, ["acme", "loud"], devices=20) as client, aiohttp.ClientSession() as session:
        await project(client, [Tenant("loud", enabled=True, limits=limits)])
        async with serving(client, settings) as url, asyncio.TaskGroup() as group:
            edge = Edge(url, client, session)

            async def send(sender: str, tenant_id: str, number: int, count: int) -> None:
                path = PATH.replace("acme", tenant_id).replace("d0", f"d{number}")
                for _ in range(count):
                    answer = await edge.ask(path, PAYLOAD)
                    answers[sender][answer.status, answer.told.get("limit", "")] += 1

            for _ in range(10):
                group.create_task(send("device", "acme", 0, 10 * share))
            for number in range(20):
                group.create_task(send("tenant", "loud", number, 10 * tenant_share // 20))
            for number in range(1, 20):
                group.create_task(send("others", "acme", number, share))
    assert answers["others"] == {(202, ""): 19 * share}
    assert answers["device"] == {(202, ""): share, (429, "device_messages_per_s"): 99 * share}
    assert answers["tenant"] == {(202, ""): tenant_share, (429, "tenant_messages_per_s"): 9 * tenant_share}


async def test_a_tenants_own_limits_are_felt_while_the_gateway_runs(nats: NatsServer, edge: Edge) -> None:
    """Like a disabled device: within a second, here at most LIMIT_S."""
    limits = TenantLimits(messages=Rate(0.01, 3), device_messages=Rate(0.02, 2))
    await project(edge.client, [Tenant("acme", enabled=True, limits=limits)])
    async with asyncio.timeout(LIMIT_S):
        while (answer := await edge.ask(PATH, PAYLOAD)).status != 429:
            assert answer.status == 202
    assert (answer.told["limit"], answer.told["limit_value"]) == ("device_messages_per_s", 0.02)
    others = [await edge.ask(PATH.replace("d0", "d1"), PAYLOAD) for _ in range(2)]
    assert [each.status for each in others] == [202, 429]
    assert (others[1].told["limit"], others[1].told["limit_value"]) == ("tenant_messages_per_s", 0.01)
    await project(edge.client, [Tenant("acme", enabled=True)])
    async with asyncio.timeout(LIMIT_S):
        while (await edge.ask(PATH, PAYLOAD)).status != 202:
            pass


async def test_while_nats_is_away_it_is_503_at_once_and_afterwards_it_recovers(nats: NatsServer, edge: Edge) -> None:
    first = await edge.ask(PATH, PAYLOAD)
    nats.kill()
    async with asyncio.timeout(LIMIT_S):
        while (answer := await edge.ask(PATH, PAYLOAD)).status != 503:
            pass
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.told["reason"] == "unavailable"
    batch = b'{"tenant_id":"acme","device_id":"d0","messages":[{"payload":{"metrics":{"a":1}}}]}'
    assert (await edge.ask(BATCH, batch)).status == 503
    assert (await edge.ask(PATH, b"{")).status == 400
    nats.start()
    async with asyncio.timeout(LIMIT_S):
        while (answer := await edge.ask(PATH, PAYLOAD)).status != 202:  # noqa: ASYNC110 - NATS is another process
            await asyncio.sleep(0.02)
    assert answer.told["seq"] > first.told["seq"]
