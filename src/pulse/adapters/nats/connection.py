"""One connection to NATS: found at the start within a bound, kept for ever, closed in order.

What nats-py leaves open, and is settled here:

- its first connect either gives up after a count or tries for ever; here it ends at once, or after `wait_s`;
- a password in a URL is sent as it stands there (percent-encoded), and not at all to servers that the cluster itself
  told of; here it is taken out of the URL, decoded and given to every server;
- an error sent by the server (credentials revoked, payload too large) closes it for good; here it reconnects;
- its wait between two attempts is fixed; here it grows and is random, so that a fleet does not come back as one;
- answers to all users come to `_INBOX.>`; here to `_INBOX.{user}.>`, so that permissions can keep them apart;
- a permission that is missing shows only as a timeout; here it is logged and kept, see `PulseClient.denied_since`.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import nats.errors
import structlog
from nats.aio.client import Client, Server
from nats.aio.msg import Msg
from nats.protocol.parser import PERMISSIONS_ERR, STALE_CONNECTION

from pulse.adapters.nats.closing import abandon
from pulse.adapters.nats.errors import IS_IT_RUNNING, SYSTEM, to_pulse_error
from pulse.adapters.nats.frames import FrameParser
from pulse.domain.errors import ConfigurationError, Outage, PulseError

log = structlog.get_logger()

SCHEMES = frozenset({"nats", "tls", "ws", "wss"})
DEFAULT_PORT = 4222
RECONNECT_DELAY_S_MIN = 0.05
RECONNECT_DELAY_S_MAX = 2.0
PING_INTERVAL_S = 10
"""With two pings unanswered the connection counts as dead: after 30 s at most, not nats-py's six minutes."""
PENDING_BYTES_MAX = 8 * 1024 * 1024
"""What may wait for the socket or for a reconnect; one byte more and a publish is refused (an Outage)."""
SUBJECT_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
CREDENTIALS_REFUSED = ("authorization violation", "user authentication", "account authentication")
"""How the protocol's -ERR line begins; it has no codes. Source: nats-server, server/errors.go."""

Callback = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the servers are, without credentials; and the credentials."""

    urls: tuple[str, ...]
    user: str | None = None
    password: str | None = None
    token: str | None = None

    def __str__(self) -> str:
        return ", ".join(urlsplit(url).netloc for url in self.urls)


class PulseClient(Client):
    """nats-py's client, which also remembers a refused permission and survives an error that the server sends."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = FrameParser(self)
        self._denied: tuple[float, str] = (float("-inf"), "")

    @property
    def clustered(self) -> bool:
        """Whether the server that it is connected to belongs to a cluster."""
        return bool(self._server_info.get("cluster"))

    def denied_since(self, moment: float) -> str:
        """The last permission that the server refused since `moment` (time.monotonic), in its words; else empty."""
        at, text = self._denied
        return text if at >= moment else ""

    async def close(self) -> None:
        """Close at once; what is not sent by then is given up where the connection is lost."""
        if not self.is_connected:
            abandon(self)
        await super().close()

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        # nats-py 2.16 ends its read loop on a subject that is not UTF-8, which the server lets anybody publish.
        names = [name.decode("utf-8", "surrogateescape") for name in (subject, reply)]
        return Msg(_client=self, subject=names[0], reply=names[1], data=data, headers=headers, _sid=sid)

    async def _process_err(self, err_msg: str) -> None:
        # Replaces the method of nats-py 2.16, which closes for good on all but these two.
        error = nats.errors.Error(f"nats: {err_msg.strip(chr(39))}")
        if PERMISSIONS_ERR in err_msg:
            self._denied = (time.monotonic(), err_msg.strip("'"))
            await self._error_cb(error)
            return
        self._err = nats.errors.StaleConnectionError() if STALE_CONNECTION in err_msg else error
        await self._error_cb(self._err)
        await self._process_op_err(self._err)


def parse_address(url: str) -> Address:
    """Read a comma-separated list of NATS URLs (`nats://user:password@host:4222`, `nats://token@host`).

    Raises ConfigurationError, never showing a password, for a URL that is none and for URLs with different credentials.
    """
    urls: list[str] = []
    credentials: set[tuple[str | None, str | None]] = set()
    for position, one in enumerate(url.split(","), start=1):
        text = one.strip()
        try:
            parts = urlsplit(text if "://" in text else f"nats://{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or parts.scheme not in SCHEMES:
            raise ConfigurationError(
                f"nats_url: the URL number {position} is not a NATS URL",
                hint="it needs nats:// or tls://, a host and a port",
            )
        if parts.username is not None:
            credentials.add((parts.username, parts.password))
        default = {"ws": 80, "wss": 443}.get(parts.scheme, DEFAULT_PORT)
        urls.append(f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port or default}{parts.path}")
    if len(credentials) > 1:
        raise ConfigurationError("nats_url: the URLs of one cluster must name the same user and password")
    user, password = credentials.pop() if credentials else (None, None)
    if password is None:
        return Address(urls=tuple(urls), token=unquote(user) if user else None)
    return Address(urls=tuple(urls), user=unquote(user or ""), password=unquote(password))


async def connect(
    url: str,
    *,
    name: str,
    wait_s: float = 0.0,
    connect_timeout_s: float = 2.0,
    drain_s_max: float = 4.0,
    pending_bytes_max: int = PENDING_BYTES_MAX,
    on_disconnect: Callback | None = None,
    on_reconnect: Callback | None = None,
) -> PulseClient:
    """Connect to one of the servers that `url` lists, and stay connected until `close`.

    `name` is what NATS monitoring shows; `connect_timeout_s` is for one server. While no server answers, it is tried
    again for `wait_s`: 0 for a command, which says so at once, more for a service, which waits out an outage.

    Raises Outage where no server answers, ConfigurationError where the URL or the credentials are wrong.
    """
    address = parse_address(url)
    options = {
        "name": name,
        "drain_timeout": drain_s_max,
        "pending_size": pending_bytes_max,
        "inbox_prefix": _inbox_prefix(address.user),
    }
    deadline = time.monotonic() + wait_s
    delay_s = RECONNECT_DELAY_S_MIN
    while True:
        events = _Events(address, on_disconnect, on_reconnect)
        try:
            return await _connect_once(address, events, options, connect_timeout_s)
        except Outage as outage:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise
            if delay_s == RECONNECT_DELAY_S_MIN:
                log.warning("waiting for NATS", servers=str(address), reason=outage.message, wait_s=wait_s)
            await asyncio.sleep(min(left_s, random.uniform(delay_s / 2, delay_s)))  # noqa: S311
            delay_s = min(2 * delay_s, RECONNECT_DELAY_S_MAX)


@asynccontextmanager
async def connection(
    url: str, *, name: str, wait_s: float = 0.0, connect_timeout_s: float = 2.0, drain_s_max: float = 4.0
) -> AsyncIterator[PulseClient]:
    """`connect`; at the end send what is on its way and close, in `drain_s_max` seconds at most."""
    client = await connect(url, name=name, wait_s=wait_s, connect_timeout_s=connect_timeout_s, drain_s_max=drain_s_max)
    try:
        yield client
    finally:
        await close(client, drain_s_max=drain_s_max)


async def close(client: PulseClient, *, drain_s_max: float = 4.0) -> None:
    """Drain where the connection stands, and close; what is unsent after `drain_s_max` seconds is given up."""
    if client.is_closed:
        return
    if client.is_connected:
        try:
            async with asyncio.timeout(drain_s_max):
                await client.drain()
        except (nats.errors.Error, OSError) as error:
            log.warning("the connection to NATS did not drain", error=str(error) or type(error).__name__)
            abandon(client)
    if not client.is_closed:
        await client.close()


def _inbox_prefix(user: str | None) -> str:
    """`_INBOX.{user}` where the user's name can be a token of a subject."""
    return f"_INBOX.{user}" if user and SUBJECT_TOKEN.fullmatch(user) else "_INBOX"


async def _connect_once(
    address: Address, events: _Events, options: Mapping[str, object], timeout_s: float
) -> PulseClient:
    client = events.client
    bounds: dict[str, Any] = {
        # Each server twice, then NoServersError; both are set anew below, for the time after the first connect.
        "max_reconnect_attempts": 1,
        "reconnect_time_wait": RECONNECT_DELAY_S_MIN,
        "connect_timeout": timeout_s,
        "ping_interval": PING_INTERVAL_S,
        "reconnect_to_server_handler": _next_server,
        "error_cb": events.error,
        "disconnected_cb": events.disconnected,
        "reconnected_cb": events.reconnected,
        "user": address.user,
        "password": address.password,
        "token": address.token,
        **options,
    }
    try:
        async with asyncio.timeout(2 * len(address.urls) * (timeout_s + RECONNECT_DELAY_S_MIN)):
            await client.connect(list(address.urls), **bounds)
    except (nats.errors.Error, OSError) as error:
        raise events.why_not_connected(error) from error
    client.options["max_reconnect_attempts"] = -1
    events.connected = True
    return client


def _next_server(servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
    """The server that has failed least, and how long to wait before it: up to 2 s, doubling, with jitter."""
    failures = min(server.reconnects for server in servers)
    longest_s = min(RECONNECT_DELAY_S_MIN * 2 ** min(failures, 16), RECONNECT_DELAY_S_MAX)
    candidates = [server for server in servers if server.reconnects == failures]
    return random.choice(candidates), random.uniform(longest_s / 2, longest_s)  # noqa: S311


class _Events:
    """What nats-py calls back with: kept until the first connect stands or fails, logged from then on."""

    def __init__(self, address: Address, on_disconnect: Callback | None, on_reconnect: Callback | None) -> None:
        self.client = PulseClient()
        self.connected = False
        self._address = address
        self._on_disconnect = on_disconnect
        self._on_reconnect = on_reconnect
        self._failures: list[Exception] = []
        self._last_logged = ""

    async def error(self, error: Exception) -> None:
        if not self.connected:
            self._failures.append(error)
            return
        if isinstance(error, nats.errors.UnexpectedEOF):
            return  # `disconnected` follows
        text = str(error) or type(error).__name__
        if PERMISSIONS_ERR in text:
            log.error("NATS refuses a permission", error=text)
        elif text != self._last_logged:
            log.warning("error on the connection to NATS", error=text)
        self._last_logged = text

    async def disconnected(self) -> None:
        if not self.connected or self.client.is_closed:
            return
        log.warning("the connection to NATS is lost", servers=str(self._address))
        if self._on_disconnect is not None:
            await self._on_disconnect()

    async def reconnected(self) -> None:
        server = self.client.connected_url
        log.info("the connection to NATS is back", server=server.netloc if server else "")
        self._last_logged = ""
        if self._on_reconnect is not None:
            await self._on_reconnect()

    def why_not_connected(self, error: Exception) -> PulseError:
        """What the failures of a first connect amount to: wrong credentials before anything else."""
        for failure in self._failures:
            if str(failure).removeprefix("nats: ").strip("'").lower().startswith(CREDENTIALS_REFUSED):
                return ConfigurationError(
                    f"NATS at {self._address} refuses these credentials", hint="check the user and password in nats_url"
                )
        doing = f"cannot connect to NATS at {self._address}"
        cause = self._failures[-1] if self._failures else error
        return to_pulse_error(cause, doing=doing) or Outage(SYSTEM, f"{doing}: {cause}", hint=IS_IT_RUNNING)
