"""Device HTTP: what a device sends, as raw ASGI.

    POST /ingest/v1/tenant/{tenant_id}/device/{device_id}/{telemetry|heartbeat}  →  202

The body is the payload's JSON; the token comes as `Authorization: Bearer …` or `X-Provision-Token`. No framework
stands between: parsing a path of eight parts and writing one of a dozen answers is all there is to do, a hundred
thousand times over. Source: ASGI 3.0 HTTP specification.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec
import structlog

from pulse.api.problem import Answer, problem, refused, unavailable
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.identity import check_device_id, check_tenant_id
from pulse.domain.receipt import Receipt
from pulse.domain.subjects import MessageType
from pulse.services.gateway import Gateway, GatewayMetrics

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = structlog.get_logger()

JSON = (b"content-type", b"application/json")
MESSAGE_TYPES = {kind.value: kind for kind in MessageType}


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a 202; `duplicate` is true where the same message id was accepted before, as `seq`."""

    status: str = "accepted"
    stream: str
    seq: int
    durability: str
    duplicate: bool


class ClientGone(Exception):
    """The client closed the connection before its request was whole."""


class DeviceApi:
    """The ASGI application; `other` answers all paths that are not below `/ingest/`."""

    def __init__(
        self,
        *,
        gateway: Gateway,
        metrics: GatewayMetrics,
        durability: str,
        body_bytes_max: int,
        other: App,
    ) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._durability = durability
        self._body_bytes_max = body_bytes_max
        self._other = other
        self._pending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/ingest/"):
            await self._other(scope, receive, send)
            return
        started = time.perf_counter()
        kind = scope["path"].rpartition("/")[2]
        self._pending += 1
        self._metrics.pending(self._pending)
        try:
            status, headers, body = await self._answer(scope, receive)
        except ClientGone:
            return
        finally:
            self._pending -= 1
            self._metrics.pending(self._pending)
        self._metrics.answered(kind if kind in MESSAGE_TYPES else "other", status, time.perf_counter() - started)
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        try:
            match scope["path"].split("/"):
                case ["", "ingest", "v1", "tenant", tenant_id, "device", device_id, kind] if kind in MESSAGE_TYPES:
                    if scope["method"] != "POST":
                        return problem(405, "only POST is allowed here", headers=((b"allow", b"POST"),))
                    return await self._ingest(scope, receive, tenant_id, device_id, MESSAGE_TYPES[kind])
                case _:
                    return problem(404, "POST /ingest/v1/tenant/{tenant_id}/device/{device_id}/{telemetry|heartbeat}")
        except Refusal as refusal:
            return refused(refusal)
        except Outage as outage:
            log.debug("refused for an outage", error=str(outage))
            return unavailable(outage)

    async def _ingest(
        self, scope: Scope, receive: Receive, tenant_id: str, device_id: str, message_type: MessageType
    ) -> Answer:
        check_tenant_id(tenant_id)
        check_device_id(device_id)
        token, content_type, content_length, idempotency_key = _headers(scope["headers"])
        self._gateway.authenticate(tenant_id, device_id, token)
        if content_type is not None and content_type.partition(b";")[0].strip().lower() != b"application/json":
            raise Refusal(Reason.UNSUPPORTED_TYPE, "the body must be application/json", field="Content-Type")
        if content_length is not None and int(content_length) > self._body_bytes_max:
            raise self._too_large()
        payload = await self._body(receive)
        receipt = await self._gateway.accept(
            tenant_id=tenant_id,
            device_id=device_id,
            message_type=message_type,
            payload=payload,
            source="http",
            idempotency_key=idempotency_key,
        )
        return self._accepted(receipt)

    def _accepted(self, receipt: Receipt) -> Answer:
        accepted = Accepted(
            stream=receipt.stream, seq=receipt.seq, durability=self._durability, duplicate=receipt.duplicate
        )
        return 202, [JSON], msgspec.json.encode(accepted)

    async def _body(self, receive: Receive) -> bytes:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = event.get("body", b"")
        if event.get("more_body", False):
            parts = [body]
            size = len(body)
            while event.get("more_body", False):
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(event.get("body", b""))
                size += len(parts[-1])
                if size > self._body_bytes_max:
                    raise self._too_large()
            body = b"".join(parts)
        if len(body) > self._body_bytes_max:
            raise self._too_large()
        return body

    def _too_large(self) -> Refusal:
        return Refusal(Reason.TOO_LARGE, f"a body may have {self._body_bytes_max} bytes")


def _headers(
    headers: Iterable[tuple[bytes, bytes]],
) -> tuple[str | None, bytes | None, bytes | None, str | None]:
    """Token, content type, content length and idempotency key; names come in lower case."""
    token: str | None = None
    content_type: bytes | None = None
    content_length: bytes | None = None
    idempotency_key: str | None = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, credentials = value.partition(b" ")
            if scheme.lower() == b"bearer":
                token = credentials.strip().decode("latin-1")
        elif name == b"x-provision-token":
            token = token or value.decode("latin-1")
        elif name == b"content-type":
            content_type = value
        elif name == b"content-length":
            content_length = value
        elif name == b"idempotency-key":
            idempotency_key = value.decode("latin-1")
    return token, content_type, content_length, idempotency_key
