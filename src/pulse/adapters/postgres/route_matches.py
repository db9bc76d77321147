"""What workers made of routes, added up in `route_matches`."""

from __future__ import annotations

from collections.abc import Mapping

from pulse.adapters.postgres.pool import Pool, transaction

# In the order of keys, so that two workers that tell at once wait for one another and never in a circle.
ADD_MATCHES = """
    INSERT INTO route_matches (tenant_id, route_id, jobs, no_room, unanswered)
    SELECT tenant_id, route_id, jobs, no_room, unanswered
    FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[])
        AS told (tenant_id, route_id, jobs, no_room, unanswered)
    JOIN routes USING (tenant_id, route_id)
    ORDER BY tenant_id, route_id
    ON CONFLICT (tenant_id, route_id) DO UPDATE
    SET jobs = route_matches.jobs + excluded.jobs, no_room = route_matches.no_room + excluded.no_room,
        unanswered = route_matches.unanswered + excluded.unanswered, told_at = now()
"""


class RouteMatches:
    """Adds to them; satisfies `services.route_table.Records`. Raises Outage."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def add_matches(self, matches: Mapping[tuple[str, str], tuple[int, int, int]]) -> None:
        """Add jobs, those without room, and messages unanswered, by tenant and route; routes that are gone are not."""
        rows = [(*key, *counts) for key, counts in sorted(matches.items())]
        columns = [list(column) for column in zip(*rows, strict=True)]
        async with transaction(self._pool) as connection:
            await connection.execute(ADD_MATCHES, *columns)
