"""What an open page of one route is told: that it, or how its destination is, has moved.

Only a mark is told, which differs when they do: the page asks for what it shows anew, as HTML.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from pulse.domain.errors import PulseError
from pulse.domain.route_search import FoundRoute
from pulse.services.live_tail import INTERVAL_S


class Routes(Protocol):
    """Raises Outage; Refusal NOT_FOUND."""

    async def find(self, tenant_id: str, route_id: str) -> FoundRoute:
        """The route as it is, with its health."""


def mark_of(found: FoundRoute) -> str:
    """Differs where the route, its health or the count of its dead letters differs."""
    told = (found.stored.route.revision, found.stored.route.enabled, found.health, found.waiting)
    return hashlib.sha256(msgspec.json.encode(told)).hexdigest()[:16]


class RouteWatch:
    """Looks at one route once a second."""

    def __init__(self, routes: Routes, *, tenant_id: str, route_id: str) -> None:
        self._routes = routes
        self._tenant_id = tenant_id
        self._route_id = route_id

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """The mark as JSON at each look; as it was while PostgreSQL is away, or once the route is gone."""
        mark = ""
        while True:
            # `systems` tells of an outage; a route that is gone moves no more.
            with contextlib.suppress(PulseError):
                mark = mark_of(await self._routes.find(self._tenant_id, self._route_id))
            yield msgspec.json.encode(mark)
            await asyncio.sleep(INTERVAL_S)
