"""EMQX's questions about its clients, by HTTP: who may come in, and what he may do there. Source: EMQX 5.8.

    POST /internal/mqtt/auth   {"username","password","clientid","cert_common_name"}
    POST /internal/mqtt/acl    {"username","action":"publish|subscribe","topic"}
    ◄── 200 {"result":"allow|deny"}; with "allow" to the first, "acl": [{"permission","action","topic"}, …], and
        "expire_at" (seconds since 1970) for a device

EMQX keeps the rules of `acl` with the session and looks there first, so who stays within them needs no answer of ours
any more; `expire_at` ends the session, and the rules with it. What no rule names it asks at the second path.

Each question comes with `Authorization: Bearer {secret}`. EMQX takes any answer but 200 for no answer, and its
configuration then refuses. No client is a superuser. A topic of an `acl` question is a topic filter where the client
subscribes.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from pulse.api.bodies import BodyReader, ClientGone
from pulse.api.problem import Answer, Header, answer_to, problem
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.mqtt_access import (
    BRIDGE_DOWN,
    Action,
    Denial,
    bridge_may,
    bridge_up_filters,
    down_filters,
    up_filters,
)
from pulse.services.mqtt_access import Session

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PREFIX = "/internal/mqtt/"
AUTH_PATH = f"{PREFIX}auth"
ACL_PATH = f"{PREFIX}acl"
BODY_BYTES_MAX = 256 * 1024
"""Above what a CONNECT and a topic of 64 KiB each can come to in JSON."""
PENDING_BYTES_MAX = 16 * 1024 * 1024
NO_CERTIFICATE = ("", "undefined")
"""What EMQX writes for a client without one."""


class Access(Protocol):
    """The decision on devices."""

    def connect(self, user: str, token: str, *, client_id: str, certificate_name: str, now_ms: int) -> Session | Denial:
        """Let a device in or not."""

    def may(self, user: str, action: Action, topic: str) -> bool:
        """Whether a device that was let in may do that, now. Raises Outage."""


class Connecting(msgspec.Struct, frozen=True):
    """A client that wants to come in; EMQX writes an empty text, or null, for what it did not send."""

    username: str | None = None
    password: str | None = None
    clientid: str | None = None
    cert_common_name: str | None = None


class Asking(msgspec.Struct, frozen=True):
    """A client that wants to publish or subscribe."""

    action: Action
    topic: str
    username: str | None = None


class Rule(msgspec.Struct, frozen=True):
    """What a client may do without a question; `topic` is a filter."""

    permission: str
    action: Action
    topic: str


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer."""

    result: str
    expire_at: int | None = None
    acl: Sequence[Rule] = ()


def rules(*, publish: Iterable[str], subscribe: Iterable[str]) -> tuple[Rule, ...]:
    """Rules that allow these filters, and say nothing of others."""
    return (
        *(Rule("allow", Action.PUBLISH, each) for each in publish),
        *(Rule("allow", Action.SUBSCRIBE, each) for each in subscribe),
    )


ALLOW, DENY = Result("allow"), Result("deny")
ALLOW_BRIDGE = Result("allow", acl=rules(publish=bridge_up_filters(), subscribe=BRIDGE_DOWN))


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnUser:
    """The bridge's user at the broker; there is none without a name and a password."""

    name: str
    password: str = field(repr=False)

    def has(self, name: str) -> bool:
        """Whether that is its name."""
        return bool(self.name and self.password) and name == self.name


class MqttHooks:
    """The ASGI application in front of `other`, which answers all other paths."""

    def __init__(self, *, access: Access, secret: str, own_user: OwnUser, other: App) -> None:
        self._access = access
        self._secret = secret
        self._own_user = own_user
        self._other = other
        self._bodies = BodyReader(pending_bytes_max=PENDING_BYTES_MAX, received=lambda _: None)
        self._connecting = msgspec.json.Decoder(Connecting)
        self._asking = msgspec.json.Decoder(Asking)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one question."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._other(scope, receive, send)
            return
        try:
            answer = await self._answer(scope, receive)
        except ClientGone:
            return
        except (Refusal, Outage) as error:
            answer = answer_to(error)
        await _send(send, answer)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        headers = dict(scope["headers"])
        if not _same(headers.get(b"authorization", b""), b"Bearer " + self._secret.encode()):
            raise Refusal(Reason.UNAUTHENTICATED, "this is for the MQTT broker alone")
        if scope["path"] not in (AUTH_PATH, ACL_PATH):
            raise Refusal(Reason.NOT_FOUND, "there is no such question")
        if scope["method"] != "POST":
            return problem(405, "a question is a POST", headers=((b"allow", b"POST"),))
        body = await self._bodies.read(
            receive,
            bytes_max=BODY_BYTES_MAX,
            limit="BODY_BYTES_MAX",
            length=headers.get(b"content-length"),
            encoding=headers.get(b"content-encoding"),
        )
        try:
            if scope["path"] == AUTH_PATH:
                result = self._connect(self._connecting.decode(body))
            else:
                result = self._authorize(self._asking.decode(body))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refusal(Reason.INVALID_JSON, "the question cannot be read") from error
        content: Header = (b"content-type", b"application/json")
        return 200, [content], msgspec.json.encode(result)

    def _connect(self, asked: Connecting) -> Result:
        name, password = asked.username or "", asked.password or ""
        if self._own_user.has(name):
            return ALLOW_BRIDGE if _same(_bytes(password), _bytes(self._own_user.password)) else DENY
        certificate = asked.cert_common_name or ""
        decided = self._access.connect(
            name,
            password,
            client_id=asked.clientid or "",
            certificate_name="" if certificate in NO_CERTIFICATE else certificate,
            now_ms=time.time_ns() // 1_000_000,
        )
        if decided is Denial.NOT_READY:
            raise Outage("registry", "the devices have not been read yet")
        if isinstance(decided, Denial):
            return DENY
        ids = decided.tenant_id, decided.device_id
        allowed = rules(publish=up_filters(*ids, named=True), subscribe=down_filters(*ids, named=True))
        return Result("allow", expire_at=decided.end_ms // 1000, acl=allowed)

    def _authorize(self, asked: Asking) -> Result:
        name = asked.username or ""
        if self._own_user.has(name):
            return ALLOW if bridge_may(asked.action, asked.topic) else DENY
        return ALLOW if self._access.may(name, asked.action, asked.topic) else DENY


def _same(left: bytes, right: bytes) -> bool:
    return hmac.compare_digest(left, right)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


async def _send(send: Send, answer: Answer) -> None:
    status, headers, body = answer
    more: list[Header] = [(b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *more]})
    await send({"type": "http.response.body", "body": body})
