"""Device HTTP: what a device sends, as raw ASGI.

    POST /ingest/v1/tenant/{tenant_id}/device/{device_id}/{telemetry|heartbeat|shadow|commands-ack}   →  202
    POST /ingest/v1/batch                                          →  a result a row, see api/batch.py

The body is the payload's JSON, gzip or zstd if it says so; the token comes as `Authorization: Bearer …` or
`X-Provision-Token`. Who it is and how often it may send is asked before the body is read. No framework stands
between: taking a path apart and writing one of a dozen answers is all there is to do, a hundred thousand times over.
Source: ASGI 3.0 HTTP specification.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import msgspec
import structlog

from pulse.api.batch import JSON, NDJSON, BatchApi
from pulse.api.bodies import BodyBounds, BodyReader, ClientGone
from pulse.api.device_paths import INGEST, MESSAGE_TYPES, OTHER, WHERE, Target, decoded, find_target, shadow_name
from pulse.api.headers import IDEMPOTENCY_KEY, Headers, read_headers
from pulse.api.problem import OVERLOADED, Answer, Header, answer_to, problem, problem_of, retry_after
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
Respond = Callable[[int, Sequence[Header], bytes], None]

log = structlog.get_logger()

_JSON_BODY = ((b"content-type", JSON),)
_encode = msgspec.json.Encoder().encode


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
        metrics.watch(lambda: self._pending)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith(INGEST):
            await self._other(scope, receive, send)
            return
        target = find_target(scope["raw_path"])
        kind = OTHER if target is None else target.kind
        started = self.begin()
        try:
            answer = await self._answer(target, scope, receive)
        except (Refusal, Outage) as error:
            answer = self.refused(error)
        except ClientGone:
            self.give_up()
            return
        except BaseException:
            self.give_up()
            raise
        self.end(kind, answer[0], started)
        await _send(send, answer)

    async def overloaded(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer a request on a connection more than may be open."""
        self._metrics.refused(OVERLOADED)
        self._metrics.answered(OTHER, 503, 0.0)
        detail = "as many connections are open as gateway_connections_max allows; nothing was accepted"
        close = (b"connection", b"close")
        await _send(send, problem(503, detail, reason=OVERLOADED, headers=(retry_after(1.0), close)))

    def direct(self, match: re.Match[bytes], headers: Sequence[Header], body: bytes, respond: Respond) -> None:
        """Answer a POST that has arrived whole and whose target SINGLE matches, as `__call__` would.

        `respond` is called once with status, headers but for Content-Length, and body; now or later.
        """
        tenant_id, device_id, kind = map(bytes.decode, match.groups())
        waiting = _Waiting(self, kind, self.begin(), respond)
        try:
            found = read_headers(headers)
            retry_id = self._admit(tenant_id, device_id, found)
            payload = self._bodies.whole(
                body,
                bytes_max=self._bounds.body_bytes_max,
                limit="body_bytes_max",
                length=found.content_length,
                encoding=found.content_encoding,
            )
            prepared = self._gateway.prepare(
                tenant_id=tenant_id,
                device_id=device_id,
                message_type=MESSAGE_TYPES[kind],
                payload=payload,
                source="http",
                retry_id=retry_id,
            )
            self._gateway.send(prepared, waiting)
        except (Refusal, Outage) as error:
            waiting.set_exception(error)
        except BaseException:
            waiting.give_up()
            raise

    def begin(self) -> float:
        """A request is here; when, for `end`."""
        self._pending += 1
        return time.perf_counter()

    def end(self, kind: str, status: int, started: float) -> None:
        """A request has its answer."""
        self._pending -= 1
        self._metrics.answered(kind, status, time.perf_counter() - started)

    def give_up(self) -> None:
        """A request gets no answer."""
        self._pending -= 1

    def refused(self, error: Refusal | Outage) -> Answer:
        """The answer to a request that is at fault or came while a system is away."""
        if isinstance(error, Outage):
            log.debug("refused for an outage", error=str(error))
        self._metrics.refused(problem_of(error).reason)
        return answer_to(error)

    async def _answer(self, target: Target | None, scope: Scope, receive: Receive) -> Answer:
        if target is None:
            return problem(404, WHERE)
        if scope["method"] != "POST":
            return problem(405, "only POST is allowed here", headers=((b"allow", b"POST"),))
        headers = read_headers(scope["headers"])
        if target.message_type is None:
            return await self._batch(headers, receive)
        name = shadow_name(scope["query_string"]) if target.message_type is MessageType.SHADOW else ""
        return await self._single(target, target.message_type, headers, receive, name)

    async def _single(
        self, target: Target, message_type: MessageType, headers: Headers, receive: Receive, name: str
    ) -> Answer:
        tenant_id = check_tenant_id(decoded(target.tenant_id))
        device_id = check_device_id(decoded(target.device_id))
        retry_id = self._admit(tenant_id, device_id, headers)
        payload = await self._bodies.read(
            receive,
            bytes_max=self._bounds.body_bytes_max,
            limit="body_bytes_max",
            length=headers.content_length,
            encoding=headers.content_encoding,
        )
        prepared = self._gateway.prepare(
            tenant_id=tenant_id,
            device_id=device_id,
            message_type=message_type,
            payload=payload,
            source="http",
            retry_id=retry_id,
            name=name,
        )
        return 202, _JSON_BODY, self.accepted(await self._gateway.submit(prepared))

    def _admit(self, tenant_id: str, device_id: str, headers: Headers) -> str | None:
        """Whether this device may send now, asked before its body is read; the message's `retry_id`."""
        self._gateway.authenticate(tenant_id, device_id, headers.token)
        self._gateway.admit(tenant_id, device_id)
        headers.check_media_type(JSON)
        key = headers.idempotency_key
        return None if key is None else retry_id_of_key(key, field=IDEMPOTENCY_KEY)

    def accepted(self, receipt: Receipt) -> bytes:
        """The body of the answer to a message that is on disk."""
        return _encode(
            Accepted(stream=receipt.stream, seq=receipt.seq, durability=self._durability, duplicate=receipt.duplicate)
        )

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


class _Waiting:
    """Answers on the direct way as soon as there is something to answer; a `domain.receipt.Waiting`."""

    __slots__ = ("_api", "_ended", "_kind", "_respond", "_started")

    def __init__(self, api: DeviceApi, kind: str, started: float, respond: Respond) -> None:
        self._api = api
        self._kind = kind
        self._started = started
        self._respond = respond
        self._ended = False

    def done(self) -> bool:
        """An answer that nobody waits for any more is not written; that is the connection's matter."""
        return False

    def set_result(self, receipt: Receipt, /) -> None:
        self._answer(202, _JSON_BODY, self._api.accepted(receipt))

    def set_exception(self, error: Refusal | Outage, /) -> None:
        self._answer(*self._api.refused(error))

    def give_up(self) -> None:
        """A bug leaves the answer to the connection: the request is not to count as pending for ever."""
        if not self._ended:
            self._ended = True
            self._api.give_up()

    def _answer(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        self._ended = True
        self._api.end(self._kind, status, self._started)
        self._respond(status, headers, body)


async def _send(send: Send, answer: Answer) -> None:
    status, headers, body = answer
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
