"""Jobs for the delivery role, destinations for them, and the oracle.

The oracle is always the same: of each job that JetStream has taken, the destination has been sent its webhook-id at
least once and has answered well, or there is a dead letter of it; and nothing else was ever sent.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from chaos.load import TENANT
from pulse.adapters.nats.committer import GroupCommitter
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.pool import open_pool
from pulse.adapters.postgres.routes import RouteStore
from pulse.adapters.sealing.box import Sealer
from pulse.domain.dead_letter import Condemned
from pulse.domain.envelope import wrap
from pulse.domain.route import DestinationSpec, Route, Webhook, make_job, message_id
from pulse.domain.subjects import MessageType

HOST = "127.0.0.1"
KEY = secrets.token_urlsafe(32)
SETTINGS = {
    "PULSE_SECRET_KEYS": KEY,
    "PULSE_WEBHOOK_NETWORKS_ALLOWED": "127.0.0.0/8",
    "PULSE_ROUTE_RETRY_S_MIN": "0.2",
    "PULSE_ROUTE_RETRY_S_MAX": "1",
    "PULSE_ROUTE_CIRCUIT_S_MIN": "0.5",
    "PULSE_ROUTE_CIRCUIT_S_MAX": "1",
}
"""Of a delivery role whose destinations are here."""

Answer = Callable[["Destination", "Request"], bytes | None]
"""What a destination answers; None: nothing, ever."""


def answer(status: int, *headers: str, body: str = "ok") -> bytes:
    """An HTTP answer."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", body]
    return "\r\n".join(lines).encode()


OK = answer(200)


@dataclass
class Request:
    """One that came."""

    webhook_id: str
    headers: dict[str, str]
    body: bytes
    at: float
    answered: int | None = None


@dataclass
class Destination:
    """A webhook's other side, on a port of its own."""

    answers: Answer
    port: int = 0
    requests: list[Request] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/hook"

    @property
    def delivered(self) -> Counter[str]:
        """How often each webhook-id was answered well."""
        return Counter(each.webhook_id for each in self.requests if each.answered and 200 <= each.answered <= 299)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                pairs = [line.split(": ", 1) for line in head.split("\r\n")[1:] if line]
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers["content-length"]))
                request = Request(headers["webhook-id"], headers, body, time.monotonic())
                self.requests.append(request)
                response = self.answers(self, request)
                if response is None:
                    await reader.read()
                    return
                request.answered = int(response[9:12])
                writer.write(response)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.transport.abort()


@asynccontextmanager
async def destinations(*answers: Answer) -> AsyncIterator[list[Destination]]:
    """One for each of `answers`."""
    async with AsyncExitStack() as stack:
        made = []
        for each in answers:
            destination = Destination(each)
            server = await asyncio.start_server(destination.serve, HOST, 0)
            stack.callback(server.close)
            destination.port = server.sockets[0].getsockname()[1]
            made.append(destination)
        yield made


async def add_routes(database_url: str, targets: dict[str, DestinationSpec | str], **fields: object) -> dict[str, str]:
    """A route of TENANT for each target, by its id; returns their secrets."""
    async with open_pool(database_url, size_max=1, timeout_s=10, application_name="test") as pool:
        store = RouteStore(pool, seals=Sealer([KEY]))
        made = {}
        for route_id, target in targets.items():
            destination = Webhook(url=target, timeout_s=5.0) if isinstance(target, str) else target
            route = Route(tenant_id=TENANT, route_id=route_id, destination=destination, **fields)  # type: ignore[arg-type]
            _, made[route_id] = await store.add(route)
        return made


def envelope(number: int, *, device_id: str = "d0") -> bytes:
    """A message of a device."""
    return wrap(
        tenant_id=TENANT,
        device_id=device_id,
        message_type=MessageType.TELEMETRY,
        received_ms=time.time_ns() // 1_000_000,
        source="http",
        payload=b'{"metrics":{"n":%d}}' % number,
    )


async def publish_jobs(client: PulseClient, jobs: Sequence[tuple[int, str]]) -> list[str]:
    """Have JetStream take a job for each (position, route id); returns their ids."""
    async with GroupCommitter(client, streams={"routes": "ROUTES"}, timeout_s=60.0) as committer:
        ids = [message_id(position, route_id) for position, route_id in jobs]
        await asyncio.gather(
            *[
                committer.publish(
                    f"routes.{TENANT}",
                    make_job(envelope(position), route_id=route_id, position=position),
                    message_id=name,
                )
                for (position, route_id), name in zip(jobs, ids, strict=True)
            ]
        )
    return ids


async def letters(client: PulseClient) -> list[Condemned]:
    """The dead letters of jobs that stand in DEAD_LETTERS; nobody rescues here."""
    state = await stream_state(client, "DEAD_LETTERS")
    found = []
    for sequence in range(max(1, state.first_seq), state.last_seq + 1):
        message = await client.jetstream().get_msg("DEAD_LETTERS", sequence)
        assert message.data is not None
        if (message.subject or "").startswith("dead."):
            found.append(msgspec.json.decode(message.data, type=Condemned))
    return found


def job_of(letter: Condemned) -> str:
    """The webhook-id of the job of a letter."""
    job = msgspec.json.decode(letter.body)
    return message_id(job["position"], job["route_id"])


async def are_gone(client: PulseClient) -> bool:
    """Whether no job stands anywhere any more."""
    return not any([(await stream_state(client, stream)).messages for stream in ("ROUTES", "LATER")])
