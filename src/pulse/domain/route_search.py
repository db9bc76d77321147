"""Which routes somebody looks for, and how one stands at a glance."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from pulse.domain.stored_route import RouteHealth, StoredRoute

TEXT_LENGTH_MAX = 200
WAITING_COUNTED_MAX = 1000
"""Dead letters of one route are counted up to this; a list has many routes."""


class RouteState(StrEnum):
    """How a route stands: the first of these that holds."""

    DISABLED = "disabled"
    """It takes nothing."""
    FAILING = "failing"
    """Its last attempt, and maybe those before, came to nothing."""
    DELIVERING = "delivering"
    IDLE = "idle"
    """Nothing was delivered yet, and nothing has failed."""


class RouteSearch(msgspec.Struct, frozen=True, kw_only=True):
    """What is None or empty does not matter; `text` is a part of the id, name, URL or topic, in any case."""

    tenant_id: str | None = None
    text: str = ""
    state: RouteState | None = None


class FoundRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A route with how its destination is, and how many of its dead letters wait (WAITING_COUNTED_MAX at most)."""

    stored: StoredRoute
    health: RouteHealth
    waiting: int = 0

    @property
    def state(self) -> RouteState:
        """At a glance."""
        if not self.stored.route.enabled:
            return RouteState.DISABLED
        if self.health.failing_since is not None:
            return RouteState.FAILING
        return RouteState.DELIVERING if self.health.delivered else RouteState.IDLE
