"""What the control API needs of the routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pulse.domain.route import Route
from pulse.domain.route_trial import Trial
from pulse.domain.stored_route import RouteAttempt, RouteHealth, StoredRoute


class Routes(Protocol):
    """The routes of tenants. Refusal NOT_FOUND for what is not there."""

    async def add(self, route: Route) -> tuple[StoredRoute, str]:
        """Make a route, with revision 1; returns it with its signing secret, empty where nothing is signed.

        Raises Refusal CONFLICT where there is one of that id, LimitExceeded where its tenant has too many.
        """

    async def route(self, tenant_id: str, route_id: str) -> StoredRoute:
        """The route of that id."""

    async def routes(
        self, tenant_id: str, *, after: str = "", enabled: bool | None = None, limit: int = 100
    ) -> list[StoredRoute]:
        """A page, by id."""

    async def change(self, tenant_id: str, route_id: str, decide: Callable[[Route], Route]) -> tuple[StoredRoute, str]:
        """Make the route what `decide` makes of it, one revision on; what that raises undoes all.

        `decide` sees and returns the values of headers. Where a webhook takes the place of something that was not
        signed, it gets a secret, which is returned as `add` does; else the text is empty.
        """

    async def delete(self, tenant_id: str, route_id: str, check: Callable[[Route], None]) -> None:
        """Remove the route, its secrets and its record, unless `check` raises."""

    async def rotate_secret(self, tenant_id: str, route_id: str, *, overlap_s: int) -> tuple[StoredRoute, str]:
        """Give a webhook a new secret; the one before is valid for `overlap_s` more.

        Raises Refusal CONFLICT where nothing is signed.
        """

    async def attempts(self, tenant_id: str, route_id: str, *, limit: int = 100) -> list[RouteAttempt]:
        """The last attempts, newest first."""

    async def health(self, tenant_id: str, route_id: str) -> RouteHealth | None:
        """How its destination is; None where nothing was sent to it yet."""


class Trials(Protocol):
    """The role that delivers."""

    async def run(self, tenant_id: str, route_id: str) -> Trial:
        """Send one message to the route's destination now; what became of it.

        Raises Refusal where there is no such route or it is tried too often, Outage where nobody delivers.
        """
