"""Device HTTP: what a device sends, as raw ASGI.

    POST /ingest/v1/tenant/{tenant_id}/device/{device_id}/{telemetry|heartbeat}  →  202
    POST /ingest/v1/batch                                                        →  a result a row, see api/batch.py

The body is the payload's JSON, gzip or zstd if it says so; the token comes as `Authorization: Bearer …` or
`X-Provision-Token`. Who it is and how often it may send is asked before the body is read. No framework stands
between: taking a path apart and writing one of a dozen answers is all there is to do, a hundred thousand times over.
Source: ASGI 3.0 HTTP specification.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec
import structlog

from pulse.api.batch import JSON, NDJSON, BatchApi
from pulse.api.bodies import BodyBounds, BodyReader, ClientGone
from pulse.api.headers import IDEMPOTENCY_KEY, Headers, read_headers
from pulse.api.problem import Answer, answer_to, problem, problem_of
from pulse.domain.errors import Outage, Refusal
from pulse.domain.identity import check_device_id, check_tenant_id
from pulse.domain.receipt import Receipt
from pulse.domain.subjects import MessageType
from pulse.services.gateway import Gateway, GatewayMetrics, retry_id_of_key

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = structlog.get_logger()

INGEST = "/ingest/"
TENANT, DEVICE, BATCH_PATH = b"/ingest/v1/tenant/", b"/device/", b"/ingest/v1/batch"
MESSAGE_TYPES = {kind.value.encode(): kind for kind in MessageType}
OTHER = "other"
"""The kind of a request that is none of ours."""
WHERE = "POST /ingest/v1/tenant/{tenant_id}/device/{device_id}/{telemetry|heartbeat}, or /ingest/v1/batch"


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a 202; `duplicate` is true where the same message id was accepted before, as `seq`."""

    status: str = "accepted"
    stream: str
    seq: int
    durability: str
    duplicate: bool


class DeviceApi:
    """The ASGI application; `other` answers all paths that are not below `/ingest/`."""

    def __init__(
        self, *, gateway: Gateway, metrics: GatewayMetrics, durability: str, bounds: BodyBounds, other: App
    ) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._durability = durability
        self._bounds = bounds
        self._other = other
        self._bodies = BodyReader(pending_bytes_max=bounds.gateway_bodies_bytes_max, received=metrics.received)
        self._batches = BatchApi(
            gateway=gateway,
            durability=durability,
            rows_max=bounds.batch_rows_max,
            payload_bytes_max=bounds.body_bytes_max,
        )
        self._pending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith(INGEST):
            await self._other(scope, receive, send)
            return
        started = time.perf_counter()
        target = find_target(scope["raw_path"])
        self._pending += 1
        self._metrics.pending(self._pending)
        try:
            status, headers, body = await self._answer(target, scope, receive)
        except (Refusal, Outage) as error:
            if isinstance(error, Outage):
                log.debug("refused for an outage", error=str(error))
            self._metrics.refused(problem_of(error).reason)
            status, headers, body = answer_to(error)
        except ClientGone:
            return
        finally:
            self._pending -= 1
            self._metrics.pending(self._pending)
        kind = OTHER if target is None else target.kind
        self._metrics.answered(kind, status, time.perf_counter() - started)
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, target: Target | None, scope: Scope, receive: Receive) -> Answer:
        if target is None:
            return problem(404, WHERE)
        if scope["method"] != "POST":
            return problem(405, "only POST is allowed here", headers=((b"allow", b"POST"),))
        headers = read_headers(scope["headers"])
        if target.message_type is None:
            return await self._batch(headers, receive)
        return await self._single(target, target.message_type, headers, receive)

    async def _single(self, target: Target, message_type: MessageType, headers: Headers, receive: Receive) -> Answer:
        tenant_id = check_tenant_id(_decoded(target.tenant_id))
        device_id = check_device_id(_decoded(target.device_id))
        self._gateway.authenticate(tenant_id, device_id, headers.token)
        self._gateway.admit(tenant_id, device_id)
        headers.check_media_type(JSON)
        key = headers.idempotency_key
        retry_id = None if key is None else retry_id_of_key(key, field=IDEMPOTENCY_KEY)
        payload = await self._bodies.read(
            receive,
            bytes_max=self._bounds.body_bytes_max,
            limit="body_bytes_max",
            length=headers.content_length,
            encoding=headers.content_encoding,
        )
        receipt = await self._gateway.submit(
            tenant_id=tenant_id,
            device_id=device_id,
            message_type=message_type,
            payload=payload,
            source="http",
            retry_id=retry_id,
        )
        return self._accepted(receipt)

    def _accepted(self, receipt: Receipt) -> Answer:
        accepted = Accepted(
            stream=receipt.stream, seq=receipt.seq, durability=self._durability, duplicate=receipt.duplicate
        )
        return 202, [(b"content-type", JSON)], msgspec.json.encode(accepted)

    async def _batch(self, headers: Headers, receive: Receive) -> Answer:
        media_type = headers.check_media_type(JSON, NDJSON)
        body = await self._bodies.read(
            receive,
            bytes_max=self._bounds.batch_body_bytes_max,
            limit="batch_body_bytes_max",
            length=headers.content_length,
            encoding=headers.content_encoding,
        )
        outcomes = self._batches.submit(body, headers, media_type=media_type)
        del body
        self._metrics.rows(len(outcomes))
        answer, reasons = await self._batches.answer(outcomes)
        for reason in reasons:
            self._metrics.refused(reason)
        return answer


class Target(msgspec.Struct, frozen=True, gc=False):
    """What a path means; the ids are as they came, `message_type` is None for a batch."""

    kind: str
    message_type: MessageType | None = None
    tenant_id: bytes = b""
    device_id: bytes = b""


BATCH = Target("batch")


def find_target(path: bytes) -> Target | None:
    """Take a raw path apart, before `%2F` becomes a slash; None where there is nothing.

    Whatever stands where an id belongs is the id, slashes included, and is refused as one.
    """
    if not path.startswith(TENANT):
        return BATCH if path == BATCH_PATH else None
    ids, _, kind = path[len(TENANT) :].rpartition(b"/")
    tenant_id, found, device_id = ids.partition(DEVICE)
    message_type = MESSAGE_TYPES.get(kind)
    if message_type is None or not found:
        return None
    return Target(message_type.value, message_type, tenant_id, device_id)


def _decoded(part: bytes) -> str:
    return (unquote_to_bytes(part) if b"%" in part else part).decode("utf-8", "replace")
