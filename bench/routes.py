"""What routes cost a message before anything is sent, in µs of CPU; and what one webhook client can send.

    .venv/bin/python bench/routes.py [--json] [--messages 4000]

    none here      other tenants have routes, this one has none: what a message pays that no route wants
    elsewhere      n routes of the tenant, each for a prefix of other devices
    one question   n routes that ask the same: asked once
    n questions    n routes, each with an expression of its own, of which one wants the message
    loop           the same, and each goes over all metrics

A message has some 250 bytes and ten metrics. What is measured begins with its bytes: it is decoded where a route has to
look, and once for all of them.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, cast

import click
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from publish import machine
from pulse.adapters.expressions.cel import Compiler
from pulse.adapters.webhook.client import WebhookBounds, WebhookRequest, open_webhook_client
from pulse.domain.addresses import read_networks
from pulse.domain.envelope import wrap
from pulse.domain.route import DeviceFilter, Match, Route, Webhook, make_job
from pulse.domain.route_index import Candidate, RouteIndex, wanting
from pulse.domain.routed import RoutedMessage
from pulse.domain.subjects import MessageType
from pulse.domain.template import read_template
from pulse.domain.webhook import make_secret, signed_headers
from pulse.domain.webhook_url import Allowed, read_webhook_url

PAYLOAD = (
    b'{"metrics":{"temp":21.5,"hum":40,"press":1013.2,"volt":3.71,"rssi":-70,"x":1.5,"y":2.5,"door":"open","ok":true,'
    b'"state":"running"},"seq":17,"site_id":"roof"}'
)
BODY = wrap(
    tenant_id="acme",
    device_id="boiler-17",
    message_type=MessageType.TELEMETRY,
    received_ms=1_790_000_000_000,
    source="mqtt",
    payload=PAYLOAD,
)
COUNTS = (1, 100, 1000)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
TEMPLATE = '{"device":"${device.id}","text":"${device.id} is at ${metrics.temp}","temp":"${metrics.temp}","at":"${ts}"}'

_decode = msgspec.json.Decoder(dict[str, Any]).decode


def routes(way: str, count: int) -> list[Route]:
    """`count` routes of the tenant, as the way says."""
    found = []
    for number in range(count):
        match = {
            "elsewhere": Match(devices=DeviceFilter(prefix=f"pump-{number}-"), expression="metrics.temp > 0.0"),
            "one question": Match(expression="metrics.temp > 80.0"),
            "n questions": Match(expression=f"metrics.temp > 20.0 && metrics.hum == {number + 40}"),
            "loop": Match(expression=f"metrics.exists(k, k == 'metric-{number}')"),
        }[way]
        webhook = Webhook(url="https://hooks.example.com/")
        found.append(Route(tenant_id="acme", route_id=f"r-{number}", destination=webhook, match=match))
    return found


def matching(index: RouteIndex, compiler: Compiler, tenant_id: str) -> Callable[[], list[Route]]:
    """What an ingest worker would do with one message."""

    def match() -> list[Route]:
        if not index.concerns(tenant_id, MessageType.TELEMETRY):
            return []
        near = index.near(tenant_id, MessageType.TELEMETRY, "boiler-17", {})
        if not near:
            return []
        message = said(BODY)
        return wanting(near, message, compiler.scope)

    return match


def said(body: bytes) -> RoutedMessage:
    """A message decoded, from the bytes of its envelope."""
    whole = _decode(body)
    return RoutedMessage(
        tenant_id=whole["tenant_id"],
        device_id=whole["device_id"],
        message_type=MessageType.TELEMETRY,
        source=whole["source"],
        ts_ms=whole["ts"],
        payload=whole["payload"],
        body=body,
        position=7,
    )


def cpu_us(work: Callable[[], object], times: int) -> float:
    """CPU time of one call, the best of three runs."""
    best = float("inf")
    for _ in range(3):
        before = time.process_time()
        for _ in range(times):
            work()
        best = min(best, time.process_time() - before)
    return best / times * 1e6


def measure(messages: int) -> dict[str, float]:
    """Every way by its name, in µs a message."""
    compiler = Compiler()
    found: dict[str, float] = {}
    for way in ("elsewhere", "one question", "n questions", "loop"):
        for count in COUNTS:
            index = RouteIndex()
            index.replace(
                "acme", [Candidate(each, compiler.compile(each.match.expression)) for each in routes(way, count)]
            )
            times = max(20, messages // (count if way in ("n questions", "loop") else 1))
            found[f"{way}, {count}"] = cpu_us(matching(index, compiler, "acme"), times)
            found["none here"] = cpu_us(matching(index, compiler, "quiet"), messages * 10)
    message, template = said(BODY), read_template(TEMPLATE)
    secrets = [make_secret(bytes(32)), make_secret(b"1" * 32)]
    found["decode"] = cpu_us(lambda: said(BODY), messages)
    found["scope"] = cpu_us(lambda: compiler.scope(message), messages)
    found["template"] = cpu_us(lambda: template.render(message, bytes_max=65_536), messages)
    found["job"] = cpu_us(lambda: make_job(BODY, route_id="r-1", position=7), messages)
    found["signature, one secret"] = cpu_us(lambda: sign(secrets[:1]), messages)
    found["signature, two secrets"] = cpu_us(lambda: sign(secrets), messages)
    return found


def sign(secrets: list[str]) -> object:
    """The headers of one attempt."""
    return signed_headers(secrets, message_id="7:r-1", timestamp_s=1_790_000_000, body=BODY)


def serve(told: Connection) -> None:
    """A sink that answers at once, in a process of its own."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(_Sink, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    uvloop.run(run())


class _Sink(asyncio.Protocol):
    """One answer for each request, of which the body comes with its head or behind it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(ANSWER * data.count(b"POST / HTTP/1.1\r\n"))


async def deliver(port: int, seconds: float, concurrency: int) -> tuple[float, float]:
    """(attempts a second, µs of CPU an attempt) of one client to one destination, signatures included."""
    allowed = Allowed(networks=read_networks(["127.0.0.1"]))
    url = read_webhook_url(f"http://127.0.0.1:{port}/", allowed=allowed)
    bounds = WebhookBounds(connections_per_destination=concurrency)
    secret = [make_secret(bytes(32))]
    done = 0
    end = time.monotonic() + seconds
    cpu = time.process_time()
    async with open_webhook_client(allowed=allowed, bounds=bounds) as client:

        async def one_after_the_other() -> None:
            nonlocal done
            while time.monotonic() < end:
                headers = signed_headers(secret, message_id=f"{done}:r-1", timestamp_s=1_790_000_000, body=BODY)
                said = await client.attempt(WebhookRequest(url, BODY, headers, 10.0))
                assert said.status == 200, said
                done += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(one_after_the_other())
    return done / seconds, (time.process_time() - cpu) / done * 1e6


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--messages", default=4000, show_default=True)
@click.option("--seconds", default=3.0, show_default=True)
def main(as_json: bool, messages: int, seconds: float) -> None:
    """Print the table, or the same as JSON."""
    found = measure(messages)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    sink = context.Process(target=serve, args=(theirs,), daemon=True)
    sink.start()
    rate, us = uvloop.run(deliver(ours.recv(), seconds, 32))
    sink.terminate()
    sink.join()
    found |= {"webhook attempt": us, "webhook attempts/s": rate}
    if as_json:
        print(json.dumps({"machine": machine(), **found}))
        return
    table = Table("", "µs of CPU", title=f"routes, {len(BODY)} bytes a message")
    for name, value in found.items():
        table.add_row(name, f"{value:.2f}" if value < 1000 else f"{value:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
