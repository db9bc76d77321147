"""Keeps webhooks from where they must not go: an address is checked when it is resolved, and again when it is dialled.

    name ─► lookup ─► all its addresses allowed? ─► exactly these are dialled ─► socket: allowed? ─► connect
                      one is not: refused whole                                  no: never opened

A name is resolved once for a connection, so a second answer (rebinding) is never asked for. The second check is behind
everything that a URL parser, a resolver or the HTTP library could get wrong.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from pulse.domain.addresses import Network, why_text_refused

LOOKUP_THREADS = 16
"""Names that are looked up at the same time; one that hangs holds one of them, however often it is asked for."""
ADDRESSES_MAX = 16
"""Of one name; more are left out."""

Lookup = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a host name now; OSError where it has none."""


class ForbiddenAddress(OSError):
    """An address that nothing may be sent to; it is not named, as a tenant could read names of the inside with that.

    An OSError, as aiohttp passes on no other from a resolver or a socket.
    """


class SystemLookup:
    """Asks the operating system, in threads of its own: a name server that hangs delays nobody else's file or DNS."""

    def __init__(self, *, threads: int = LOOKUP_THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="webhook-lookup")
        self._running: dict[str, asyncio.Future[Sequence[str]]] = {}

    async def __call__(self, host: str) -> Sequence[str]:
        """The addresses of `host`; who asks for a name that is being looked up waits for the same answer."""
        running = self._running.get(host)
        if running is None:
            running = asyncio.get_running_loop().run_in_executor(self._pool, _look_up, host)
            self._running[host] = running
            running.add_done_callback(lambda done: self._forget(host, done))
        return await asyncio.shield(running)

    def _forget(self, host: str, done: asyncio.Future[Sequence[str]]) -> None:
        del self._running[host]
        if not done.cancelled():
            done.exception()

    def close(self) -> None:
        """Start no other lookup; one that hangs ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str) -> Sequence[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class GuardedResolver(AbstractResolver):
    """Hands aiohttp the addresses of a name, or none of them: with ForbiddenAddress where one is not allowed.

    With `networks` None every address is allowed: for the host names that the operator allows.
    """

    def __init__(self, lookup: Lookup, networks: Sequence[Network] | None) -> None:
        self._lookup = lookup
        self._networks = networks

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """What is dialled: addresses as numbers, so that nothing behind this resolves again."""
        addresses = list(dict.fromkeys(await self._lookup(host)))[:ADDRESSES_MAX]
        if not addresses:
            raise OSError(socket.EAI_NONAME, f"{host} has no address")
        if self._networks is not None:
            for address in addresses:
                check_address(address, self._networks)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """There is nothing of its own to close."""


def guarded_socket(networks: Sequence[Network]) -> Callable[[Any], socket.socket]:
    """aiohttp's `socket_factory`: a socket for exactly the address that is dialled next, if that is allowed."""

    def make(address_info: Any) -> socket.socket:
        family, kind, protocol, _, address = address_info
        check_address(str(address[0]), networks)
        made = socket.socket(family=family, type=kind, proto=protocol)
        made.setblocking(False)
        return made

    return make


def check_address(address: str, networks: Sequence[Network]) -> None:
    """Raise ForbiddenAddress where nothing may be sent to `address`."""
    if why := why_text_refused(address, networks):
        raise ForbiddenAddress(f"an address of this host is not allowed: {why} (see webhook_networks_allowed)")
