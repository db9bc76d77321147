"""What every request to the control API passes first: its key, then its body, then its turn, all within bounds.

The key comes before the body, so that a stranger sends us nothing to read; and the body before FastAPI, which would
collect any amount of it, and whose JSON decoder takes NaN, repeated keys and lone surrogates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from pulse.api.bodies import BodyReader, ClientGone
from pulse.api.control.errors import answer_to_any
from pulse.api.problem import Answer, Header
from pulse.domain.command_requests import CommandBounds
from pulse.domain.errors import LimitExceeded, PulseError, Reason, Refusal
from pulse.domain.json_text import read_json, refuse_repeated_keys
from pulse.domain.query import QueryBounds
from pulse.domain.shadow import ShadowBounds
from pulse.services.control import Control

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PREFIX = "/api/v1"
OPENAPI_PATH = f"{PREFIX}/openapi.json"
IMPORT_SUFFIX = "/devices/import"
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
PENDING_BYTES_MAX = 64 * 1024 * 1024
"""Of all bodies that are on their way together."""
TURN_RETRY_AFTER_S = 1.0
SECURITY_HEADERS: tuple[Header, ...] = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
"""There are no CORS headers: another origin's page may not read what a browser gets here."""

_json: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlBounds:
    """The limits of the control API."""

    query: QueryBounds
    shadow: ShadowBounds
    command: CommandBounds
    body_bytes_max: int
    import_bytes_max: int
    import_rows_max: int
    key_requests_max: int


class Entrance:
    """The ASGI application in front of `app`; `other` answers all paths that are not below `/api/`."""

    def __init__(self, app: App, *, control: Control, bounds: ControlBounds, other: App) -> None:
        self._app = app
        self._control = control
        self._bounds = bounds
        self._other = other
        self._bodies = BodyReader(pending_bytes_max=PENDING_BYTES_MAX, received=lambda _: None)
        self._requests: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/api/"):
            await self._other(scope, receive, send)
            return
        secured = _secured(send)
        headers = _headers(scope["headers"])
        try:
            key_id = None
            if scope["path"] != OPENAPI_PATH:
                caller = await self._control.admit(_secret(headers.get(b"authorization")))
                scope.setdefault("state", {})["caller"] = caller
                key_id = caller.key.key_id
            if scope["method"] in METHODS_WITH_BODY:
                receive = _replay(await self._body(scope, receive, headers), receive)
                scope["headers"] = [each for each in scope["headers"] if each[0] != b"content-encoding"]
            self._check_turn(key_id)
        except ClientGone:
            return
        except PulseError as error:
            await _send(secured, answer_to_any(error))
            return
        with self._turn(key_id):
            await self._app(scope, receive, secured)

    def _check_turn(self, key_id: int | None) -> None:
        if key_id is not None and self._requests[key_id] >= self._bounds.key_requests_max:
            bound = self._bounds.key_requests_max
            raise LimitExceeded(
                Reason.RATE_LIMITED,
                f"this key may have {bound} requests at the same time",
                limit="ui_key_requests_max",
                value=bound,
                retry_after_s=TURN_RETRY_AFTER_S,
            )

    @contextmanager
    def _turn(self, key_id: int | None) -> Iterator[None]:
        """Counts the request for its key, which has one connection to PostgreSQL at most for each."""
        if key_id is None:
            yield
            return
        self._requests[key_id] += 1
        try:
            yield
        finally:
            self._requests[key_id] -= 1
            if not self._requests[key_id]:
                del self._requests[key_id]

    async def _body(self, scope: Scope, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        is_import = scope["path"].endswith(IMPORT_SUFFIX)
        body = await self._bodies.read(
            receive,
            bytes_max=self._bounds.import_bytes_max if is_import else self._bounds.body_bytes_max,
            limit="import_bytes_max" if is_import else "ui_body_bytes_max",
            length=headers.get(b"content-length"),
            encoding=headers.get(b"content-encoding"),
        )
        if not body:
            return body
        wanted = b"text/csv" if is_import else b"application/json"
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != wanted:
            raise Refusal(Reason.UNSUPPORTED_TYPE, f"the body must be {wanted.decode()}", field="Content-Type")
        if not is_import:
            # What msgspec refuses of any JSON is a number out of range, at a path that it does not spell out.
            refuse_repeated_keys(body, _key_count(read_json(_json, body, culprit=lambda _text, _path: "")))
        return body


def _key_count(value: object) -> int:
    """How many keys all objects of `value` have, at any depth."""
    count, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            count += len(one)
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
    return count


def _headers(headers: Iterable[Header]) -> dict[bytes, bytes]:
    """The last of each name; names come in lower case."""
    return dict(headers)


def _secret(authorization: bytes | None) -> str | None:
    scheme, _, credentials = (authorization or b"").partition(b" ")
    return credentials.strip().decode("latin-1") if scheme.lower() == b"bearer" else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The whole body once, then whatever the server says: that the client has gone."""
    events: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_event() -> Event:
        return events.pop() if events else await receive()

    return next_event


def _secured(send: Send) -> Send:
    async def with_headers(event: Event) -> None:
        if event["type"] == "http.response.start":
            event["headers"] = [*event["headers"], *SECURITY_HEADERS]
        await send(event)

    return with_headers


async def _send(send: Send, answer: Answer) -> None:
    status, headers, body = answer
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
