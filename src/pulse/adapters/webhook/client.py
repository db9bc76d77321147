"""One attempt at a webhook: a POST, and what came of it, bounded in time and in bytes.

No redirect is followed, no proxy or cookie of the environment is used, TLS is verified, and no answer is read beyond
its excerpt. Whatever the other side does ends as an Attempted within the request's time; only a cancellation is raised.
Who calls bounds how many attempts are under way; connections are shared by the attempts at one destination alone.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cache
from types import SimpleNamespace

import aiohttp
import msgspec
from aiohttp import hdrs
from yarl import URL

from pulse.adapters.webhook.guard import ForbiddenAddress, GuardedResolver, Lookup, SystemLookup, guarded_socket
from pulse.domain.addresses import why_refused
from pulse.domain.delivery import Attempted, Failure
from pulse.domain.webhook_url import PUBLIC, Allowed, WebhookUrl

USER_AGENT = "pulse-webhooks"
KEEP_ALIVE_S = 30.0
HEADER_BYTES_MAX = 8192
ERROR_LENGTH_MAX = 300


class WebhookRequest(msgspec.Struct, frozen=True):
    """What is sent: `headers` are the signature's and the route's own; `timeout_s` is for everything together."""

    url: WebhookUrl
    body: bytes
    headers: Mapping[str, str]
    timeout_s: float
    connect_s_max: float = 5.0


class WebhookBounds(msgspec.Struct, frozen=True, kw_only=True):
    """`excerpt_s_max` is how long is waited for the body once the status is known: it decides nothing any more."""

    connections_per_destination: int = 16
    excerpt_bytes_max: int = 1024
    excerpt_s_max: float = 1.0


class _Trace(SimpleNamespace):
    """When the connection of one attempt came to be."""

    started_s: float
    connected_s: float | None = None
    reused: bool = False


class WebhookClient:
    """Makes attempts; made by `open_webhook_client`."""

    def __init__(
        self,
        guarded: aiohttp.ClientSession,
        trusted: aiohttp.ClientSession,
        *,
        allowed: Allowed,
        bounds: WebhookBounds,
    ) -> None:
        self._guarded = guarded
        self._trusted = trusted
        self._allowed = allowed
        self._bounds = bounds

    async def attempt(self, request: WebhookRequest) -> Attempted:
        """One attempt, and what came of it."""
        trace = _Trace(started_s=time.monotonic())
        answer = await self._try(request, trace, request.timeout_s)
        left_s = trace.started_s + request.timeout_s - time.monotonic()
        if answer.failure is Failure.DISCONNECTED and trace.reused and left_s > 0:
            # The other side closed an idle connection in the moment that we used it: no fault of either.
            answer = await self._try(request, trace, left_s)
        connect_s = None if trace.connected_s is None else trace.connected_s - trace.started_s
        return msgspec.structs.replace(answer, elapsed_s=time.monotonic() - trace.started_s, connect_s=connect_s)

    async def _try(self, request: WebhookRequest, trace: _Trace, timeout_s: float) -> Attempted:
        try:
            return await self._post(request, trace, timeout_s)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            connected = trace.connected_s is not None or trace.reused
            cause = _forbidden(error) or error
            text = str(cause) or type(cause).__name__
            return Attempted(failure=_failure(cause, connected=connected), error=text[:ERROR_LENGTH_MAX])

    async def _post(self, request: WebhookRequest, trace: _Trace, timeout_s: float) -> Attempted:
        url = URL(request.url.text, encoded=True)
        host = request.url.destination.host
        if url.host != host or url.port != request.url.destination.port:
            raise ForbiddenAddress(f"{request.url.text} can be read in two ways")
        address = request.url.address
        if address is not None and (why := why_refused(address, self._allowed.networks)):
            raise ForbiddenAddress(f"{address} is not allowed: {why} (see webhook_networks_allowed)")
        session = self._trusted if host in self._allowed.hosts else self._guarded
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=min(request.connect_s_max, timeout_s))
        async with session.post(
            url,
            data=request.body,
            headers={hdrs.CONTENT_TYPE: "application/json", **request.headers},
            allow_redirects=False,
            timeout=timeout,
            trace_request_ctx=trace,
        ) as response:
            return Attempted(
                status=response.status,
                retry_after=response.headers.get(hdrs.RETRY_AFTER, "")[:ERROR_LENGTH_MAX],
                excerpt=await self._excerpt(response),
            )

    async def _excerpt(self, response: aiohttp.ClientResponse) -> bytes:
        """The beginning of the body; where there is more, or it does not come, aiohttp closes the connection."""
        excerpt = bytearray()
        bytes_max = self._bounds.excerpt_bytes_max
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with asyncio.timeout(self._bounds.excerpt_s_max):
                while len(excerpt) < bytes_max and (chunk := await response.content.read(bytes_max - len(excerpt))):
                    excerpt += chunk
        return bytes(excerpt)


@asynccontextmanager
async def open_webhook_client(
    *,
    allowed: Allowed = PUBLIC,
    bounds: WebhookBounds | None = None,
    lookup: Lookup | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[WebhookClient]:
    """A client that sends to the public Internet and to what is `allowed` beside it.

    `lookup` stands for the operating system's resolver, `tls` for its certificates.
    """
    bounds = bounds or WebhookBounds()
    system = None if lookup else SystemLookup()
    find = lookup or system
    assert find is not None
    tls = tls or _system_tls()
    try:
        async with (
            _session(GuardedResolver(find, allowed.networks), bounds, tls, allowed) as guarded,
            _session(GuardedResolver(find, None), bounds, tls, None) as trusted,
        ):
            yield WebhookClient(guarded, trusted, allowed=allowed, bounds=bounds)
    finally:
        if system is not None:
            system.close()


@cache
def _system_tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _session(
    resolver: GuardedResolver, bounds: WebhookBounds, tls: ssl.SSLContext, checked: Allowed | None
) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(
        resolver=resolver,
        use_dns_cache=False,
        limit=0,  # a bound on all of them together would let the destinations that hang shut out the others
        limit_per_host=bounds.connections_per_destination,
        keepalive_timeout=KEEP_ALIVE_S,
        ssl=tls,
        socket_factory=None if checked is None else guarded_socket(checked.networks),
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        headers={hdrs.USER_AGENT: USER_AGENT, hdrs.ACCEPT_ENCODING: "identity"},
        max_line_size=HEADER_BYTES_MAX,
        max_field_size=HEADER_BYTES_MAX,
        trace_configs=[_connection_trace()],
    )


def _connection_trace() -> aiohttp.TraceConfig:
    config = aiohttp.TraceConfig()

    async def made(_: object, context: SimpleNamespace, __: object) -> None:
        context.trace_request_ctx.connected_s = time.monotonic()

    async def reused(_: object, context: SimpleNamespace, __: object) -> None:
        context.trace_request_ctx.reused = True

    config.on_connection_create_end.append(made)
    config.on_connection_reuseconn.append(reused)
    return config


def _failure(error: Exception, *, connected: bool) -> Failure:
    """What an error of aiohttp or of the operating system is, by its type alone."""
    for types, failure in _FAILURES:
        if isinstance(error, types):
            return failure
    if isinstance(error, TimeoutError):
        return Failure.TIMEOUT if connected else Failure.CONNECT_TIMEOUT
    return Failure.DISCONNECTED if connected else Failure.CONNECT


def _forbidden(error: Exception) -> ForbiddenAddress | None:
    """The guard's own word, where aiohttp has wrapped it."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return cause if isinstance(cause, ForbiddenAddress) else None


_FAILURES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Failure], ...] = (
    (ForbiddenAddress, Failure.FORBIDDEN_TARGET),
    (aiohttp.ClientConnectorDNSError, Failure.RESOLVE),
    ((aiohttp.ClientSSLError, ssl.SSLError), Failure.TLS),
    (aiohttp.ConnectionTimeoutError, Failure.CONNECT_TIMEOUT),
    (aiohttp.ServerDisconnectedError, Failure.DISCONNECTED),
    (aiohttp.ClientResponseError, Failure.PROTOCOL),
)
"""The first that fits; the more special before the more general."""
