"""The gateway between a registry and a publisher that are made up, and how to ask it without a socket.

app = make_app(publisher)
answer = await ask(app, "/ingest/v1/tenant/acme/device/t-1/telemetry", PAYLOAD)
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from pulse.api.bodies import BodyBounds
from pulse.api.device import DeviceApi, Event, Receive, Scope, Send
from pulse.api.device_paths import SINGLE
from pulse.api.problem import Header
from pulse.domain.errors import PulseError
from pulse.domain.limits import Rate, RateLimits
from pulse.domain.receipt import Receipt, Waiting
from pulse.domain.shadow import ShadowBounds
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.runtime.metrics import GatewayMetrics
from pulse.runtime.settings import Settings
from pulse.services.gateway import Gateway

PAYLOAD = b'{"metrics":{"temperature":21.5}}'
TOKEN = "token"
PATH = "/ingest/v1/tenant/acme/device/t-1/telemetry"
BATCH = "/ingest/v1/batch"
NO_LIMITS = RateLimits(device=Rate(0, 1), tenant=Rate(0, 1))


@dataclass(frozen=True)
class Published:
    subject: str
    body: bytes
    message_id: str


class Publisher:
    """Answers at once; a repeated id is a duplicate. `raises` makes the error of every further message."""

    def __init__(self) -> None:
        self.published: list[Published] = []
        self.raises: Callable[[], PulseError] | None = None
        self._sequences: dict[str, int] = {}
        self._next = itertools.count(1)

    def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        if self.raises is not None:
            raise self.raises()
        self.published.append(Published(subject, body, message_id))
        duplicate = message_id in self._sequences
        seq = self._sequences[message_id] if duplicate else next(self._next)
        self._sequences[message_id] = seq
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        future.set_result(Receipt("TELEMETRY", seq, duplicate))
        return future

    def send(self, subject: str, body: bytes, *, message_id: str, waiting: Waiting) -> None:
        waiting.set_result(self.submit(subject, body, message_id=message_id).result())


class Registry:
    """Knows the devices `t-…` of `acme` and of `beta`, all with one token."""

    token = TOKEN

    def __init__(self) -> None:
        self.ready = True

    def authenticate(self, tenant_id: str, device_id: str, token: str, now_ms: int) -> bool:
        return tenant_id in {"acme", "beta"} and device_id.startswith("t-") and token == self.token


def make_gateway(publisher: Publisher, *, registry: Registry | None = None, limits: RateLimits = NO_LIMITS) -> Gateway:
    return Gateway(
        publisher=publisher,
        registry=registry or Registry(),
        decoder=PayloadDecoder(msgspec.convert(Settings(), Bounds, from_attributes=True)),
        shadow_bounds=ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8),
        limits=limits,
    )


def make_app(
    publisher: Publisher,
    *,
    registry: Registry | None = None,
    limits: RateLimits = NO_LIMITS,
    metrics: CollectorRegistry | None = None,
    **bounds: int,
) -> DeviceApi:
    shipped = msgspec.convert(Settings(), BodyBounds, from_attributes=True)
    return DeviceApi(
        gateway=make_gateway(publisher, registry=registry, limits=limits),
        metrics=GatewayMetrics(metrics or CollectorRegistry()),
        durability="disk",
        bounds=msgspec.structs.replace(shipped, **bounds),
        other=elsewhere,
    )


_past_asgi = ContextVar("_past_asgi", default=False)


@contextmanager
def past_asgi() -> Iterator[None]:
    """Within it, what may go past ASGI does."""
    token = _past_asgi.set(True)
    try:
        yield
    finally:
        _past_asgi.reset(token)


async def _ask_directly(app: DeviceApi, match: re.Match[bytes], sent: list[Header], body: bytes) -> Answer:
    answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def respond(status: int, headers: Sequence[Header], text: bytes) -> None:
        answered.set_result(Answer(status, {name.decode(): value.decode() for name, value in headers}, text))

    app.direct(match, sent, body, respond)
    return await answered


async def elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def told(self) -> dict[str, Any]:
        decoded: dict[str, Any] = msgspec.json.decode(self.body)
        return decoded


async def ask(
    app: DeviceApi,
    path: str,
    body: bytes | Iterable[bytes] = b"",
    *,
    method: str = "POST",
    token: str | None = TOKEN,
    **headers: str,
) -> Answer:
    """One request; an iterable body comes in parts. The answer's status is 0 where there was none.

    Past ASGI within `past_asgi`, if it is one that may go there.
    """
    parts = [body] if isinstance(body, bytes) else list(body)
    sent = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    if token is not None:
        sent.append((b"authorization", f"Bearer {token}".encode()))
    match = SINGLE.fullmatch(path.encode()) if _past_asgi.get() and method == "POST" and len(parts) == 1 else None
    if match is not None:
        return await _ask_directly(app, match, sent, parts[0])
    events: list[Event] = [
        {"type": "http.request", "body": part, "more_body": index < len(parts)} for index, part in enumerate(parts, 1)
    ]
    said: list[Event] = []

    async def receive() -> Event:
        return events.pop(0) if events else {"type": "http.disconnect"}

    async def send(event: Event) -> None:
        said.append(event)

    target, _, query = path.partition("?")
    scope = {
        "type": "http", "method": method, "path": target, "raw_path": target.encode(), "query_string": query.encode(),
        "headers": sent,
    }  # fmt: skip
    await app(scope, receive, send)
    if not said:
        return Answer(0)
    return Answer(
        said[0]["status"],
        {name.decode(): value.decode() for name, value in said[0]["headers"]},
        said[1]["body"],
    )
