"""Routes of all tenants that are reached, each with how its destination is; for the console."""

from __future__ import annotations

import asyncpg

from pulse.adapters.postgres.pool import Database, transaction
from pulse.adapters.postgres.route_rows import ROUTE_COLUMNS, health_of, stored_route_of
from pulse.domain.errors import Reason, Refusal
from pulse.domain.route_search import WAITING_COUNTED_MAX, FoundRoute, RouteSearch

FOUND = f"""
    SELECT found.*, circuit, delivered, dead, failures, failing_since, last_success_at, last_failure_at,
        health.updated_at AS health_told_at, jobs, no_room, unanswered,
        (SELECT count(*) FROM (
            SELECT FROM dead_letters AS letter
            WHERE letter.route_id = found.route_id AND letter.tenant_id = found.tenant_id AND replays = 0
            LIMIT {WAITING_COUNTED_MAX}
        ) AS waiting) AS waiting,
        (SELECT coalesce(sum(line.jobs), 0)::bigint FROM ordered_lines AS line
            WHERE line.route_id = found.route_id AND line.tenant_id = found.tenant_id) AS in_line
    FROM (
        SELECT {ROUTE_COLUMNS}, made_at, previous_until
        FROM routes AS route LEFT JOIN route_secrets AS secret USING (tenant_id, route_id)
    ) AS found
    JOIN route_health AS health USING (tenant_id, route_id)
    LEFT JOIN route_matches AS made USING (tenant_id, route_id)
"""  # noqa: S608 - constants
# position() and not LIKE: what people type has no wildcards.
SEARCH_ROUTES = f"""
    {FOUND}
    WHERE (found.tenant_id, found.route_id) > ($1, $2)
      AND ($3::text IS NULL OR found.tenant_id = $3)
      AND ($4 = '' OR position(lower($4) IN lower(concat_ws(' ', found.route_id, definition ->> 'name',
          definition -> 'destination' ->> 'url', definition -> 'destination' ->> 'topic'))) > 0)
      AND ($5::text IS NULL OR $5 = CASE
          WHEN NOT enabled THEN 'disabled' WHEN failing_since IS NOT NULL THEN 'failing'
          WHEN delivered > 0 THEN 'delivering' ELSE 'idle' END)
    ORDER BY found.tenant_id, found.route_id LIMIT $6
"""
SELECT_ROUTE = f"{FOUND} WHERE found.tenant_id = $1 AND found.route_id = $2"


class RouteOverview:
    """Reads routes as people look at them; satisfies `services.console.RouteList`. Every call raises Outage."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def search(self, wanted: RouteSearch, *, after: tuple[str, str], limit: int) -> list[FoundRoute]:
        """A page of those that match, by tenant and id, behind `after`."""
        async with transaction(self._database) as connection:
            rows = await connection.fetch(
                SEARCH_ROUTES, *after, wanted.tenant_id, wanted.text, wanted.state, limit
            )  # fmt: skip
        return [_found(row) for row in rows]

    async def find(self, tenant_id: str, route_id: str) -> FoundRoute:
        """The route of that id. Refusal NOT_FOUND."""
        async with transaction(self._database) as connection:
            row = await connection.fetchrow(SELECT_ROUTE, tenant_id, route_id)
        if row is None:
            raise Refusal(Reason.NOT_FOUND, f"tenant {tenant_id!r} has no route {route_id!r}", field="route_id")
        return _found(row)


def _found(row: asyncpg.Record) -> FoundRoute:
    return FoundRoute(stored=stored_route_of(row), health=health_of(row), waiting=row["waiting"])
