"""Device HTTP: what a device asks for, as raw ASGI.

    GET /device/v1/tenant/{tenant_id}/device/{device_id}/shadow            → 200, the shadow; ETag is its version
    GET /device/v1/tenant/{tenant_id}/device/{device_id}/shadow?name={n}     the same of a named one
    GET /device/v1/tenant/{tenant_id}/device/{device_id}/commands?wait=20  → 200 {"commands":[…]}, at once or when there
                                                                             are any; empty after so many seconds

Token, rates and errors are those of what a device sends (api/device.py). There is no database here: roles that have
one are asked (adapters/nats/ask.py), and where they are away the answer is 503. A device that hangs up frees its place.
It has a few places and no more (429): what can wait, and what can be asked, is everybody's.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
import structlog

from pulse.api.batch import JSON
from pulse.api.device import App, Receive, Scope, Send
from pulse.api.device_paths import DEVICE, OTHER, decoded, shadow_name
from pulse.api.headers import read_headers
from pulse.api.problem import Answer, Header, answer_to, problem, problem_of
from pulse.domain.errors import LimitExceeded, Outage, Reason, Refusal
from pulse.domain.identity import check_device_id, check_tenant_id
from pulse.services.gateway import Gateway, GatewayMetrics
from pulse.services.polls import Asker, Polls

T = TypeVar("T")

log = structlog.get_logger()

READS = "/device/"
TENANT = b"/device/v1/tenant/"
SHADOW, COMMANDS = "shadow", "commands"
KINDS = {SHADOW: "shadow-get", COMMANDS: "commands"}
"""What is counted, of each last part of a path."""
WHERE = "GET /device/v1/tenant/{tenant_id}/device/{device_id}/{shadow|commands}"
WAIT_LENGTH_MAX = 16
NO_STORE: Header = (b"cache-control", b"no-store")
NOT_MODIFIED = 304
PLACE_RETRY_AFTER_S = 1.0


class _Versioned(msgspec.Struct, frozen=True):
    version: int


_version_of = msgspec.json.Decoder(_Versioned).decode


class DeviceReads:
    """The ASGI application; `other` answers all paths that are not below `/device/`.

    `wait_s_max` bounds a poll: who asks for more waits that long. `device_reads_max` is how much one device may ask at
    the same time.
    """

    def __init__(
        self,
        *,
        gateway: Gateway,
        asker: Asker,
        polls: Polls,
        metrics: GatewayMetrics,
        wait_s_max: float,
        device_reads_max: int,
        other: App,
    ) -> None:
        self._gateway = gateway
        self._asker = asker
        self._polls = polls
        self._metrics = metrics
        self._wait_s_max = wait_s_max
        self._device_reads_max = device_reads_max
        self._other = other
        self._reads: Counter[tuple[str, str]] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith(READS):
            await self._other(scope, receive, send)
            return
        tenant_id, device_id, kind = _take_apart(scope["raw_path"])
        started, waited_s = time.perf_counter(), 0.0
        try:
            if kind not in KINDS:
                answer = problem(404, WHERE)
            elif scope["method"] != "GET":
                answer = problem(405, "only GET is allowed here", headers=((b"allow", b"GET"),))
            else:
                self._admit(tenant_id, device_id, scope["headers"])
                with self._place(tenant_id, device_id):
                    found = await _unless_gone(self._read(kind, tenant_id, device_id, scope), receive)
                if found is None:
                    return
                answer, waited_s = found
        except (Refusal, Outage) as error:
            if isinstance(error, Outage):
                log.debug("refused for an outage", error=str(error))
            self._metrics.refused(problem_of(error).reason)
            answer = answer_to(error)
        # Without the time in which there was nothing to do: a device that waits is not being kept waiting.
        seconds = time.perf_counter() - started - waited_s
        self._metrics.answered(KINDS.get(kind, OTHER), answer[0], seconds)
        await _send(send, answer)

    def _admit(self, tenant_id: str, device_id: str, headers: Sequence[Header]) -> None:
        check_tenant_id(tenant_id)
        check_device_id(device_id)
        self._gateway.authenticate(tenant_id, device_id, read_headers(headers).token)
        self._gateway.admit(tenant_id, device_id)

    @contextmanager
    def _place(self, tenant_id: str, device_id: str) -> Iterator[None]:
        """Counts the request for its device. Raises LimitExceeded."""
        device, bound = (tenant_id, device_id), self._device_reads_max
        if self._reads[device] >= bound:
            raise LimitExceeded(
                Reason.RATE_LIMITED,
                f"a device may ask for {bound} things at the same time",
                limit="gateway_device_reads_max",
                value=bound,
                retry_after_s=PLACE_RETRY_AFTER_S,
            )
        self._reads[device] += 1
        try:
            yield
        finally:
            self._reads[device] -= 1
            if not self._reads[device]:
                del self._reads[device]

    async def _read(self, kind: str, tenant_id: str, device_id: str, scope: Scope) -> tuple[Answer, float]:
        """The answer, and for how long of the time it was waited for commands."""
        query: bytes = scope.get("query_string", b"")
        if kind == COMMANDS:
            wait_s = min(_wait_s(query), self._wait_s_max)
            body, waited_s = await self._polls.commands(tenant_id, device_id, wait_s=wait_s)
            return (200, [(b"content-type", JSON), NO_STORE], body), waited_s
        name = shadow_name(query)
        body = await self._asker.ask(SHADOW, tenant_id, device_id, name.encode())
        etag = b'"%d"' % _version_of(body).version
        if etag in [value for key, value in scope["headers"] if key == b"if-none-match"]:
            return (NOT_MODIFIED, [(b"etag", etag), NO_STORE], b""), 0.0
        return (200, [(b"content-type", JSON), (b"etag", etag), NO_STORE], body), 0.0


def _take_apart(path: bytes) -> tuple[str, str, str]:
    """Tenant, device and kind as they stand in a raw path; empty where there are none."""
    ids, _, kind = path.removeprefix(TENANT).rpartition(b"/")
    tenant_id, found, device_id = ids.partition(DEVICE)
    if not found or not path.startswith(TENANT):
        return "", "", ""
    return decoded(tenant_id), decoded(device_id), kind.decode("latin-1")


def _wait_s(query: bytes) -> float:
    """The seconds that `?wait=` names, 0 where it is not there. Raises Refusal."""
    try:
        parameters = dict(parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=2))
    except ValueError as error:
        raise Refusal(Reason.INVALID_REQUEST, "the query cannot be read", field="wait") from error
    text = parameters.pop("wait", "0")
    for unknown in parameters:
        raise Refusal(Reason.INVALID_REQUEST, "commands have no parameter but `wait`", field=unknown)
    try:
        seconds = float(text) if len(text) <= WAIT_LENGTH_MAX else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise Refusal(Reason.INVALID_REQUEST, "must be a number of seconds", field="wait")
    return seconds


async def _unless_gone(work: Awaitable[T], receive: Receive) -> T | None:
    """What `work` returns or raises; None, and `work` cancelled, where the client hangs up before."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.wait((working, gone))


async def _gone(receive: Receive) -> None:
    """Returns when the client has hung up; a body, which a GET should not have, is read and left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, answer: Answer) -> None:
    status, headers, body = answer
    length = [] if status == NOT_MODIFIED else [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": body})
