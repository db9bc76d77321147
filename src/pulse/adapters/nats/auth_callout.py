"""nats-server asks us who may come in, and does what we say: the auth callout. Source: ADR-26 of NATS.

    MQTT client ──CONNECT──► nats-server ──$SYS.REQ.USER.AUTH──► AuthCallout ──► services.mqtt_access
                  ◄─CONNACK──            ◄──a JWT: who, until when, which subjects──

The connection has a user of the system account, which alone sees the questions: there is a password in each. The
server's signature is not verified, as nobody else can publish there. An answer counts for MQTT only: a device that
speaks NATS is turned away, and so is whoever is no device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg

from pulse.adapters.nats.errors import mapped
from pulse.adapters.nats.nkeys import AccountKey, claims_of
from pulse.domain.errors import Outage

log = structlog.get_logger()

SUBJECT = "$SYS.REQ.USER.AUTH"
QUEUE = "pulse"
ACCOUNT = "$G"
"""Where devices are, and all of ours but this connection: the account without a name."""
CONNECTIONS = "$SYS.REQ.SERVER.PING.CONNZ"
KICK = "$SYS.REQ.SERVER.{}.KICK"
PAGE = 1024
TIMEOUT_S = 5.0


class Allowed(msgspec.Struct, frozen=True):
    """A client that is let in until `end_ms`: MQTT topics and filters that it may use."""

    user: str
    end_ms: int
    publish: Sequence[str]
    subscribe: Sequence[str]


class Asked(msgspec.Struct, frozen=True):
    """A client that wants to come in."""

    user: str
    password: str
    client_id: str
    is_mqtt: bool


Decide = Callable[[Asked], Allowed | None]


class _ClientInfo(msgspec.Struct, frozen=True):
    type: str = ""
    mqtt_id: str = ""


class _ConnectOptions(msgspec.Struct, frozen=True):
    user: str = ""
    password: str = msgspec.field(name="pass", default="")


class _Server(msgspec.Struct, frozen=True):
    id: str


class _Request(msgspec.Struct, frozen=True):
    server_id: _Server
    user_nkey: str
    client_info: _ClientInfo
    connect_opts: _ConnectOptions


class _Claims(msgspec.Struct, frozen=True):
    nats: _Request


class AuthCallout:
    """The service that answers; it holds nothing, so any number of them share the questions."""

    name = "mqtt auth callout"

    def __init__(self, client: Client, *, key: AccountKey, decide: Decide) -> None:
        self._client = client
        self._key = key
        self._decide = decide
        self._decoder = msgspec.json.Decoder(_Claims)

    async def run(self, stop: asyncio.Event) -> None:
        """Answer until `stop`. What is not answered in time, the server refuses."""
        with mapped("cannot answer nats-server who may come in"):
            subscription = await self._client.subscribe(SUBJECT, queue=QUEUE, cb=self._answer)
        await stop.wait()
        if not self._client.is_closed:
            with mapped("cannot stop answering nats-server"):
                await subscription.unsubscribe()

    async def _answer(self, message: Msg) -> None:
        try:
            request = self._decoder.decode(claims_of(message.data)).nats
        except (ValueError, msgspec.DecodeError):
            log.error("nats-server asks who may come in, and it cannot be read", bytes=len(message.data))
            return
        try:
            answer = self.respond(request)
            with mapped("cannot answer nats-server who may come in"):
                await message.respond(answer.encode())
        except Outage as outage:
            # No answer: after its timeout the server refuses, and the client comes again.
            log.warning("nats-server asks who may come in, and gets no answer", reason=str(outage))

    def respond(self, request: _Request) -> str:
        """The answer to one question, signed."""
        options = request.connect_opts
        allowed = self._decide(
            Asked(
                user=options.user,
                password=options.password,
                client_id=request.client_info.mqtt_id,
                is_mqtt=request.client_info.type == "mqtt",
            )
        )
        response: dict[str, object] = {"type": "authorization_response", "version": 2}
        if allowed is None:
            response["error"] = "refused"
        else:
            response["jwt"] = self._user_claims(request.user_nkey, allowed)
        return self._key.sign(subject=request.user_nkey, nats=response, aud=request.server_id.id)

    def _user_claims(self, user_nkey: str, allowed: Allowed) -> str:
        permissions = {
            "type": "user",
            "version": 2,
            "pub": {"allow": [each for topic in allowed.publish for each in subjects_of(topic)]},
            "sub": {"allow": [each for topic in allowed.subscribe for each in subjects_of(topic)]},
            "subs": -1,
            "data": -1,
            "payload": -1,
        }
        return self._key.sign(
            subject=user_nkey, nats=permissions, aud=ACCOUNT, name=allowed.user, exp=allowed.end_ms // 1000
        )


def subjects_of(topic: str) -> list[str]:
    """The subjects by which nats-server knows an MQTT topic or filter of ours: ids, words, `+` and `#`.

    `a/#` matches `a` as well, to which nats-server then subscribes beside `a.>`.
    """
    subject = topic.replace("/", ".").replace("+", "*").replace("#", ">")
    return [subject, subject.removesuffix(".>")] if subject.endswith(".>") else [subject]


class _Connection(msgspec.Struct, frozen=True):
    cid: int
    authorized_user: str = ""


class _Connections(msgspec.Struct, frozen=True):
    total: int
    connections: list[_Connection] = []


class _Answer(msgspec.Struct, frozen=True):
    server: _Server
    data: _Connections


class Doorkeeper:
    """Ends connections of devices; satisfies `services.mqtt_access.Broker` for one server (no cluster)."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._decoder = msgspec.json.Decoder(_Answer)

    async def disconnect(self, tenant_id: str, device_id: str | None) -> int:
        """End the connections of a device, or of all devices of a tenant; how many. Raises Outage."""
        if device_id is None:
            return await self._kick({}, lambda user: user.startswith(f"{tenant_id}/"))
        name = f"{tenant_id}/{device_id}"
        return await self._kick({"user": name}, lambda user: user == name)

    async def _kick(self, only: dict[str, str], chosen: Callable[[str], bool]) -> int:
        found: list[int] = []
        offset, total = 0, 1
        server = ""
        while offset < total:
            question = {"auth": True, "acc": ACCOUNT, "limit": PAGE, "offset": offset, **only}
            answer = self._decoder.decode(await self._ask(CONNECTIONS, question))
            found += [each.cid for each in answer.data.connections if chosen(each.authorized_user)]
            server, total = answer.server.id, answer.data.total
            offset += PAGE
        for cid in found:
            await self._ask(KICK.format(server), {"cid": cid})
        return len(found)

    async def _ask(self, subject: str, question: dict[str, object]) -> bytes:
        with mapped("cannot end the connection of a device"):
            answer = await self._client.request(subject, msgspec.json.encode(question), timeout=TIMEOUT_S)
        return bytes(answer.data)
