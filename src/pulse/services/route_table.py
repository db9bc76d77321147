"""The routes of all tenants in memory, compiled, as PostgreSQL has them; and how they stay so.

    the registry's feed, routes alone ─┬─ read from scratch ──► all routes from PostgreSQL ──► ready
                                       └─ a change ───────────► that route, before the next message is matched

What the bucket holds is only believed to be a change: a bucket that was made anew, and is not repaired yet, takes no
route away from anybody. Who has no routes yet has to wait: a message that is acked without a look at them is lost to
them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from typing import NamedTuple, Protocol

import structlog

from pulse.domain.errors import Outage, Refusal
from pulse.domain.registry import Complete, Put, Reading, Removed, split_route_key
from pulse.domain.route import Route
from pulse.domain.route_index import Candidate, Predicate, RouteIndex
from pulse.domain.routed import RoutedMessage
from pulse.services.registry import RegistryFeed

log = structlog.get_logger()

PAGE_ROUTES = 1000
TURN_S_MAX = 0.005
"""For so long the event loop may be held."""
RETRY_S = 1.0
TELL_S = 5.0
"""How often what became of routes is written down."""

RouteKey = tuple[str, str]
"""Tenant and route."""


class Compiler(Protocol):
    """Makes predicates of expressions; `adapters/expressions`."""

    def compile(self, text: str, *, told: Callable[[str], None]) -> Predicate:
        """The predicate that `text` is; `told` hears why it had no answer. Raises Refusal where it is none."""

    def scope(self, message: RoutedMessage) -> object:
        """What predicates look at."""


class Matches(NamedTuple):
    """What a worker made of one route: jobs, those that found no room, and messages that had no answer."""

    jobs: int = 0
    no_room: int = 0
    unanswered: int = 0


class Truth(Protocol):
    """The routes in PostgreSQL; raises Outage where it is away."""

    def routes(self, size: int) -> AsyncGenerator[list[Route], None]:
        """All of them, in pages of at most `size`."""
        ...


class Records(Protocol):
    """Where it is written down what became of routes; raises Outage where it is away."""

    async def add_matches(self, matches: Mapping[RouteKey, Matches]) -> None:
        """Add these to what is known; routes that are gone are passed over."""


class TableMetrics(Protocol):
    """What is counted."""

    def unanswered(self, reason: str) -> None:
        """An expression had no answer for a message."""

    def routes(self, count: int) -> None:
        """So many are known."""


class _Asked(NamedTuple):
    predicate: Predicate
    unanswered: Counter[str]


class _OfTenant:
    """The routes of one tenant, and the predicates of their expressions by text, each compiled once."""

    __slots__ = ("asked", "needs_attributes", "routes")

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.asked: dict[str, _Asked] = {}
        self.needs_attributes = False


class RouteTable:
    """Routes by tenant; one writer, any number of readers, one event loop. Readers call `refresh` first."""

    def __init__(self, *, compiler: Compiler, metrics: TableMetrics) -> None:
        self.index = RouteIndex()
        self.ready = asyncio.Event()
        """Set once all routes have been read."""
        self.scope = compiler.scope
        self._compiler = compiler
        self._metrics = metrics
        self._tenants: dict[str, _OfTenant] = {}
        self._stale: dict[str, None] = {}
        self._compiling = asyncio.Lock()

    def __len__(self) -> int:
        return sum(len(of_tenant.routes) for of_tenant in self._tenants.values())

    def put(self, route: Route) -> None:
        """A route as it is now; an older one than is known changes nothing."""
        routes = self._tenants.setdefault(route.tenant_id, _OfTenant()).routes
        known = routes.get(route.route_id)
        if known is None or known.revision < route.revision:
            routes[route.route_id] = route
            self._stale[route.tenant_id] = None

    def remove(self, tenant_id: str, route_id: str) -> None:
        """There is no such route any more."""
        of_tenant = self._tenants.get(tenant_id)
        if of_tenant is not None and of_tenant.routes.pop(route_id, None) is not None:
            self._stale[tenant_id] = None

    def replace(self, routes: Iterable[Route]) -> None:
        """These are all that there are."""
        by_tenant: dict[str, dict[str, Route]] = {}
        for route in routes:
            by_tenant.setdefault(route.tenant_id, {})[route.route_id] = route
        for tenant_id in {*self._tenants, *by_tenant}:
            self._tenants.setdefault(tenant_id, _OfTenant()).routes = by_tenant.get(tenant_id, {})
            self._stale[tenant_id] = None
        self.ready.set()

    def needs_attributes(self, tenant_id: str) -> bool:
        """Whether some route of the tenant looks at its devices' attributes."""
        of_tenant = self._tenants.get(tenant_id)
        return of_tenant is not None and of_tenant.needs_attributes

    async def refresh(self) -> None:
        """Compile what has changed; a tenant's old routes hold until its new ones are compiled."""
        while self._stale or self._compiling.locked():
            async with self._compiling:
                while self._stale:
                    tenant_id = next(iter(self._stale))
                    del self._stale[tenant_id]
                    await self._compile(tenant_id, self._tenants[tenant_id])
                    self._metrics.routes(len(self))

    def take_unanswered(self) -> dict[RouteKey, int]:
        """Of how many messages each route's expression had no answer, since this was last asked."""
        taken: dict[RouteKey, int] = {}
        for tenant_id, of_tenant in self._tenants.items():
            for route in of_tenant.routes.values():
                asked = of_tenant.asked.get(route.match.expression)
                if asked is not None and asked.unanswered:
                    taken[tenant_id, route.route_id] = asked.unanswered.total()
            for asked in of_tenant.asked.values():
                asked.unanswered.clear()
        return taken

    async def _compile(self, tenant_id: str, of_tenant: _OfTenant) -> None:
        asked: dict[str, _Asked] = {}
        candidates: list[Candidate] = []
        needs_attributes = False
        turn = time.monotonic()
        for route in sorted(of_tenant.routes.values(), key=lambda route: route.route_id):
            text = route.match.expression
            if not route.enabled:
                continue
            if text and text not in asked:
                try:
                    asked[text] = of_tenant.asked.get(text) or self._ask(text)
                except Refusal as refusal:
                    log.warning(
                        "a route does not compile and matches nothing",
                        tenant_id=tenant_id,
                        route_id=route.route_id,
                        reason=str(refusal),
                    )
                    continue
            candidates.append(Candidate(route, asked[text].predicate if text else None))
            needs_attributes |= bool(route.match.devices.attributes) or "device" in text
            if time.monotonic() - turn > TURN_S_MAX:
                await asyncio.sleep(0)
                turn = time.monotonic()
        of_tenant.asked = asked
        of_tenant.needs_attributes = needs_attributes
        self.index.replace(tenant_id, candidates)
        if not of_tenant.routes:
            self._tenants.pop(tenant_id, None)

    def _ask(self, text: str) -> _Asked:
        unanswered: Counter[str] = Counter()
        return _Asked(self._compiler.compile(text, told=partial(self._told, unanswered)), unanswered)

    def _told(self, unanswered: Counter[str], reason: str) -> None:
        unanswered[reason] += 1
        self._metrics.unanswered(reason)


class RouteMirror:
    """The service that keeps a RouteTable as PostgreSQL and the feed say, and writes down what became of routes."""

    name = "routes"

    def __init__(
        self,
        *,
        feed: RegistryFeed,
        truth: Truth,
        table: RouteTable,
        records: Records,
        take_matches: Callable[[], dict[RouteKey, Matches]],
        tell_s: float = TELL_S,
    ) -> None:
        self._feed = feed
        self._truth = truth
        self._table = table
        self._records = records
        self._take_matches = take_matches
        self._tell_s = tell_s
        self._untold: dict[RouteKey, Matches] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Follow until `stop`; an error of the feed that is no outage ends it. What is known then is told once more."""
        async with asyncio.TaskGroup() as tasks:
            follower = tasks.create_task(self._follow(), name="routes-follow")
            while not stop.is_set():
                try:
                    await asyncio.wait_for(stop.wait(), self._tell_s)
                except TimeoutError:
                    await self._tell()
            follower.cancel()
        await self._tell()

    async def _follow(self) -> None:
        from_scratch = True
        async with aclosing(self._feed.watch()) as changes:
            async for change in changes:
                match change:
                    case Reading():
                        from_scratch = change.from_scratch
                    case Complete():
                        if from_scratch:
                            await self._read()
                        from_scratch = False
                    case Put(record=Route() as route) if not from_scratch:
                        self._table.put(route)
                    case Removed() if not from_scratch and (ids := split_route_key(change.key)) is not None:
                        self._table.remove(*ids)

    async def _read(self) -> None:
        """All routes from PostgreSQL; what changed meanwhile comes by the feed, behind this."""
        waiting = False
        while True:
            routes: list[Route] = []
            try:
                async with aclosing(self._truth.routes(PAGE_ROUTES)) as pages:
                    async for page in pages:
                        routes += page
            except Outage as outage:
                if not waiting:
                    log.warning("the routes cannot be read yet", reason=str(outage))
                waiting = True
                await asyncio.sleep(RETRY_S)
                continue
            self._table.replace(routes)
            log.info("routes are complete", routes=len(routes))
            return

    async def _tell(self) -> None:
        """Write down what is new; where PostgreSQL is away it is told the next time."""
        for key, more in self._take_matches().items():
            known = self._untold.get(key, Matches())
            self._untold[key] = Matches(*(one + other for one, other in zip(known, more, strict=True)))
        if not self._untold:
            return
        try:
            await self._records.add_matches(self._untold)
        except Outage as outage:
            log.debug("what became of routes is not told yet", reason=str(outage))
        else:
            self._untold = {}
