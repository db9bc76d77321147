"""The routes that a delivery worker sends for, in memory: asked of PostgreSQL once, and looked at again and again.

A route that is used is read anew every `refresh_s`, all of them in one question, so that a change holds within that
time for jobs that wait, too. While PostgreSQL is away what is known is used; a route that is not known has to wait.
What was not used for IDLE_S is forgotten, and its secrets with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol

import msgspec
import structlog

from pulse.domain.errors import Outage, Refusal
from pulse.domain.route import Republish, Route, Webhook
from pulse.domain.route_topic import TopicTemplate, read_topic_template
from pulse.domain.template import Template, read_template
from pulse.domain.webhook import SigningSecrets
from pulse.domain.webhook_url import Allowed, WebhookUrl, read_webhook_url

log = structlog.get_logger()

IDLE_S = 60.0
ASK_S_MAX = 5.0
"""How long a job waits for PostgreSQL to say what its route is, before it is put off."""
ROUTES_MAX = 10_000


class RouteKey(NamedTuple):
    """Names a route."""

    tenant_id: str
    route_id: str


class Sendable(msgspec.Struct, frozen=True, kw_only=True):
    """A route with what it takes to send for it; `refusal` says why nothing can be sent as it is.

    `is_sealed`: nobody can open what it takes; its jobs wait until the operator has given us the key.

    Its headers and secrets are in clear here: it is shown nowhere.
    """

    route: Route
    secrets: SigningSecrets | None = None
    template: Template | None = None
    url: WebhookUrl | None = None
    topic: TopicTemplate | None = None
    refusal: str = ""
    is_sealed: bool = False

    def __repr__(self) -> str:
        """Nothing of what may not be in a log."""
        return f"Sendable({self.route.tenant_id}/{self.route.route_id}, revision={self.route.revision})"


class Found(Protocol):
    """A route with what it signs with; `is_sealed`: it cannot be opened, as its key is not one of ours."""

    @property
    def route(self) -> Route: ...

    @property
    def secrets(self) -> SigningSecrets | None: ...

    @property
    def is_sealed(self) -> bool: ...


class RouteSource(Protocol):
    """The database; raises Outage where it is away."""

    async def load(self, known: Mapping[RouteKey, int | None]) -> Mapping[RouteKey, Found | None]:
        """Those of `known` whose revision is another one by now, opened; None for a route that is not there.

        What is left out is as it was.
        """


def sendable(found: Found, *, allowed: Allowed) -> Sendable:
    """A route, read once for all its jobs."""
    route, secrets = found.route, found.secrets
    if found.is_sealed:
        return Sendable(route=route, is_sealed=True)
    try:
        template = None if route.template is None else read_template(route.template)
        match route.destination:
            case Webhook(url=url):
                if secrets is None:
                    return Sendable(route=route, refusal="it has no secret to sign with")
                read = read_webhook_url(url, allowed=allowed)
                return Sendable(route=route, secrets=secrets, template=template, url=read)
            case Republish(topic=topic):
                return Sendable(route=route, template=template, topic=read_topic_template(topic))
    except Refusal as refusal:
        return Sendable(route=route, refusal=str(refusal))


class _Entry:
    __slots__ = ("found", "used_at")

    def __init__(self, found: Sendable | None) -> None:
        self.found = found
        self.used_at = time.monotonic()


class RouteBook:
    """The routes in use; `run` looks them up."""

    def __init__(self, source: RouteSource, *, allowed: Allowed, refresh_s: float = 0.5) -> None:
        self._source = source
        self._allowed = allowed
        self._refresh_s = refresh_s
        self._entries: dict[RouteKey, _Entry] = {}
        self._asked: dict[RouteKey, asyncio.Future[None]] = {}
        self._is_asked = asyncio.Event()

    async def find(self, key: RouteKey) -> Sendable | None:
        """The route as it was within the last moments; None where there is none. Raises Outage where nobody knows."""
        entry = self._entries.get(key)
        if entry is None:
            asked = self._asked.get(key)
            if asked is None:
                asked = self._asked[key] = asyncio.get_running_loop().create_future()
                self._is_asked.set()
            try:
                async with asyncio.timeout(ASK_S_MAX):
                    await asyncio.shield(asked)
            except TimeoutError as error:
                raise Outage("postgresql", f"no answer within {ASK_S_MAX:g} s") from error
            entry = self._entries[key]
        entry.used_at = time.monotonic()
        return entry.found

    def disable(self, key: RouteKey) -> None:
        """Nothing more is sent for it here, whatever the database says until it knows as well."""
        entry = self._entries.get(key)
        if entry is not None and entry.found is not None:
            route = msgspec.structs.replace(entry.found.route, enabled=False)
            entry.found = msgspec.structs.replace(entry.found, route=route)

    async def run(self) -> None:
        """Look up what is asked for, and what is used anew, for ever."""
        while True:
            try:
                async with asyncio.timeout(self._refresh_s):
                    await self._is_asked.wait()
            except TimeoutError:
                pass
            self._is_asked.clear()
            self._forget()
            asked, self._asked = self._asked, {}
            if asked or self._entries:
                await self._load(asked)

    async def _load(self, asked: Mapping[RouteKey, asyncio.Future[None]]) -> None:
        known: dict[RouteKey, int | None] = dict.fromkeys(asked)
        known |= {key: entry.found.route.revision if entry.found else None for key, entry in self._entries.items()}
        try:
            found = await self._source.load(known)
        except Outage as outage:
            for future in asked.values():
                if not future.done():
                    future.set_exception(Outage(outage.system, outage.message))
                    future.exception()  # seen, even where nobody waits any more
            return
        for key, route in found.items():
            entry = self._entries.setdefault(key, _Entry(None))
            entry.found = None if route is None else sendable(route, allowed=self._allowed)
        for future in asked.values():
            if not future.done():
                future.set_result(None)

    def _forget(self) -> None:
        idle_since = time.monotonic() - IDLE_S
        if len(self._entries) > ROUTES_MAX:
            idle_since = sorted(entry.used_at for entry in self._entries.values())[len(self._entries) // 2]
        gone: Collection[RouteKey] = [key for key, entry in self._entries.items() if entry.used_at < idle_since]
        for key in gone:
            del self._entries[key]
