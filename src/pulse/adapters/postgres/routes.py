"""Routes in PostgreSQL: the truth, of which the registry at the edge has what matching needs.

Every method is one transaction. They raise Outage where PostgreSQL is away, Refusal NOT_FOUND for what is not there,
and ConfigurationError where something has to be sealed or opened and no key does it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime

import asyncpg

from pulse.adapters.postgres.pool import Connection, Database, transaction
from pulse.adapters.postgres.route_rows import (
    ROUTE_COLUMNS,
    NoSeals,
    Seals,
    attempt_of,
    context_of,
    definition_of,
    health_of,
    opened_route_of,
    route_of,
    sealed_headers,
    stored_route_of,
)
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.route import Route, Webhook
from pulse.domain.stored_route import RouteAttempt, RouteHealth, StoredRoute
from pulse.domain.webhook import SECRET_RANDOM_BYTES, SigningSecrets, make_secret

ROUTES_MAX = 1000
"""Of one tenant: a message that meets a thousand different expressions costs 2.6 ms (ADR 16)."""

COLUMNS = f"{ROUTE_COLUMNS}, made_at, previous_until FROM routes AS route LEFT JOIN route_secrets AS secret USING (tenant_id, route_id)"  # noqa: E501
# Two that make routes of one tenant take turns: else each could make the last one.
TAKE_TURN = "SELECT pg_advisory_xact_lock(hashtextextended('routes/' || $1, 0))"
COUNT_ROUTES = "SELECT count(*) FROM routes WHERE tenant_id = $1"
INSERT_ROUTE = """
    INSERT INTO routes (tenant_id, route_id, definition, headers, enabled) VALUES ($1, $2, $3::json, $4, $5)
"""
INSERT_HEALTH = "INSERT INTO route_health (tenant_id, route_id) VALUES ($1, $2)"
SELECT_ROUTE = f"SELECT {COLUMNS} WHERE route.tenant_id = $1 AND route.route_id = $2"
SELECT_ROUTES = f"""
    SELECT {COLUMNS}
    WHERE route.tenant_id = $1 AND route.route_id > $2 AND ($3::boolean IS NULL OR enabled = $3)
    ORDER BY route.route_id LIMIT $4
"""
LOCK_ROUTE = f"""
    SELECT {ROUTE_COLUMNS} FROM routes AS route WHERE tenant_id = $1 AND route_id = $2 FOR UPDATE
"""  # noqa: S608 - constants
UPDATE_ROUTE = """
    UPDATE routes SET definition = $3::json, headers = $4, enabled = $5, revision = revision + 1, updated_at = now(),
        disabled_reason = CASE WHEN $5 THEN '' ELSE disabled_reason END,
        disabled_at = CASE WHEN $5 THEN NULL ELSE coalesce(disabled_at, now()) END
    WHERE tenant_id = $1 AND route_id = $2
"""
TOUCH_ROUTE = """
    UPDATE routes SET revision = revision + 1, updated_at = now() WHERE tenant_id = $1 AND route_id = $2
"""
FORGIVE = """
    UPDATE route_health SET failures = 0, failing_since = NULL WHERE tenant_id = $1 AND route_id = $2
"""
DELETE_ROUTE = "DELETE FROM routes WHERE tenant_id = $1 AND route_id = $2"
SELECT_CURRENT = "SELECT current FROM route_secrets WHERE tenant_id = $1 AND route_id = $2"
PUT_SIGNING = """
    INSERT INTO route_secrets (tenant_id, route_id, current, previous, previous_until) VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (tenant_id, route_id) DO UPDATE
    SET current = excluded.current, made_at = now(), previous = excluded.previous,
        previous_until = excluded.previous_until
"""
END_SIGNING = "DELETE FROM route_secrets WHERE tenant_id = $1 AND route_id = $2"
SELECT_ATTEMPTS = """
    SELECT at, webhook_id, device_id, attempt, outcome, status, failure, error, elapsed_ms, excerpt FROM route_attempts
    WHERE tenant_id = $1 AND route_id = $2 ORDER BY number DESC LIMIT $3
"""
SELECT_HEALTH = """
    SELECT circuit, delivered, dead, failures, failing_since, last_success_at, last_failure_at,
        updated_at AS health_told_at, jobs, no_room, unanswered,
        (SELECT coalesce(sum(line.jobs), 0)::bigint FROM ordered_lines AS line WHERE tenant_id = $1 AND route_id = $2)
            AS in_line
    FROM route_health LEFT JOIN route_matches USING (tenant_id, route_id) WHERE tenant_id = $1 AND route_id = $2
"""


class RouteStore:
    """Reads and changes routes; satisfies `services.control_routes.Routes`. Without `seals` nothing is sealed."""

    def __init__(self, database: Database, *, seals: Seals | None, routes_max: int = ROUTES_MAX) -> None:
        self._database = database
        self._seals: Seals = NoSeals() if seals is None else seals
        self._routes_max = routes_max

    async def add(self, route: Route) -> tuple[StoredRoute, str]:
        """Make a route, with revision 1; returns it with its signing secret, empty where nothing is signed."""
        key = (route.tenant_id, route.route_id)
        try:
            async with transaction(self._database) as connection:
                await self._check_room(connection, route.tenant_id)
                headers = sealed_headers(route, self._seals)
                await connection.execute(INSERT_ROUTE, *key, definition_of(route), headers, route.enabled)
                await connection.execute(INSERT_HEALTH, *key)
                secret = await self._sign(connection, route) if isinstance(route.destination, Webhook) else ""
                return await _stored(connection, *key), secret
        except asyncpg.UniqueViolationError as error:
            raise Refusal(Reason.CONFLICT, f"route {route.route_id!r} is there already", field="route_id") from error
        except asyncpg.ForeignKeyViolationError as error:
            raise Refusal(Reason.NOT_FOUND, f"there is no tenant {route.tenant_id!r}", field="tenant_id") from error

    async def route(self, tenant_id: str, route_id: str) -> StoredRoute:
        """The route of that id."""
        async with transaction(self._database) as connection:
            return await _stored(connection, tenant_id, route_id)

    async def routes(
        self, tenant_id: str, *, after: str = "", enabled: bool | None = None, limit: int = 100
    ) -> list[StoredRoute]:
        """A page of at most `limit`, by id, of those behind `after`."""
        async with transaction(self._database) as connection:
            return [
                stored_route_of(row) for row in await connection.fetch(SELECT_ROUTES, tenant_id, after, enabled, limit)
            ]

    async def change(self, tenant_id: str, route_id: str, decide: Callable[[Route], Route]) -> tuple[StoredRoute, str]:
        """Make the route what `decide` makes of it, one revision on; what that raises undoes all.

        `decide` sees and returns the values of headers. Enabled again, its failures are forgiven.
        """
        async with transaction(self._database) as connection:
            before = opened_route_of(await _locked(connection, tenant_id, route_id), self._seals)
            after = decide(before)
            headers = sealed_headers(after, self._seals)
            await connection.execute(UPDATE_ROUTE, tenant_id, route_id, definition_of(after), headers, after.enabled)
            if after.enabled and not before.enabled:
                await connection.execute(FORGIVE, tenant_id, route_id)
            secret = ""
            if isinstance(after.destination, Webhook) and not isinstance(before.destination, Webhook):
                secret = await self._sign(connection, after)
            elif not isinstance(after.destination, Webhook):
                await connection.execute(END_SIGNING, tenant_id, route_id)
            return await _stored(connection, tenant_id, route_id), secret

    async def delete(self, tenant_id: str, route_id: str, check: Callable[[Route], None]) -> None:
        """Remove the route, its secrets and its record, unless `check` raises; that sees no values of headers."""
        async with transaction(self._database) as connection:
            check(route_of(await _locked(connection, tenant_id, route_id)))
            await connection.execute(DELETE_ROUTE, tenant_id, route_id)

    async def rotate_secret(self, tenant_id: str, route_id: str, *, overlap_s: int) -> tuple[StoredRoute, str]:
        """Give a webhook a new secret; the one before is valid for `overlap_s` more.

        Raises Refusal CONFLICT where nothing is signed.
        """
        async with transaction(self._database) as connection:
            route = route_of(await _locked(connection, tenant_id, route_id))
            sealed = await connection.fetchval(SELECT_CURRENT, tenant_id, route_id)
            if sealed is None:
                raise Refusal(Reason.CONFLICT, "what this route sends is not signed", field="destination")
            now_s = int(time.time())
            context = context_of(tenant_id, route_id)
            current = SigningSecrets(self._seals.open(sealed, context=context).decode())
            rotated = current.rotated(_new_secret(), now_s=now_s, overlap_s=overlap_s)
            await self._put_secrets(connection, route, rotated)
            await connection.execute(TOUCH_ROUTE, tenant_id, route_id)
            return await _stored(connection, tenant_id, route_id), rotated.current

    async def attempts(self, tenant_id: str, route_id: str, *, limit: int = 100) -> list[RouteAttempt]:
        """The last attempts, newest first."""
        async with transaction(self._database) as connection:
            return [attempt_of(row) for row in await connection.fetch(SELECT_ATTEMPTS, tenant_id, route_id, limit)]

    async def health(self, tenant_id: str, route_id: str) -> RouteHealth | None:
        """How its destination is; None where there is no such route."""
        async with transaction(self._database) as connection:
            row = await connection.fetchrow(SELECT_HEALTH, tenant_id, route_id)
        return None if row is None else health_of(row)

    async def _check_room(self, connection: Connection, tenant_id: str) -> None:
        await connection.execute(TAKE_TURN, tenant_id)
        if await connection.fetchval(COUNT_ROUTES, tenant_id) >= self._routes_max:
            message = f"a tenant may have {self._routes_max} routes"
            raise LimitExceeded(Reason.TOO_LARGE, message, limit="routes_max", value=self._routes_max)

    async def _sign(self, connection: Connection, route: Route) -> str:
        """Give it its first secret."""
        secret = _new_secret()
        await self._put_secrets(connection, route, SigningSecrets(secret))
        return secret

    async def _put_secrets(self, connection: Connection, route: Route, signing: SigningSecrets) -> None:
        context = context_of(route.tenant_id, route.route_id)
        previous = self._seals.seal(signing.previous.encode(), context=context) if signing.previous else None
        until = datetime.fromtimestamp(signing.previous_until_s, UTC) if signing.previous else None
        current = self._seals.seal(signing.current.encode(), context=context)
        await connection.execute(PUT_SIGNING, route.tenant_id, route.route_id, current, previous, until)


def _new_secret() -> str:
    return make_secret(secrets.token_bytes(SECRET_RANDOM_BYTES))


async def _stored(connection: Connection, tenant_id: str, route_id: str) -> StoredRoute:
    row = await connection.fetchrow(SELECT_ROUTE, tenant_id, route_id)
    if row is None:
        raise _no_route(tenant_id, route_id)
    return stored_route_of(row)


async def _locked(connection: Connection, tenant_id: str, route_id: str) -> asyncpg.Record:
    row = await connection.fetchrow(LOCK_ROUTE, tenant_id, route_id)
    if row is None:
        raise _no_route(tenant_id, route_id)
    return row


def _no_route(tenant_id: str, route_id: str) -> Refusal:
    message = f"tenant {tenant_id!r} has no route {route_id!r}"
    return Refusal(Reason.NOT_FOUND, message, field="route_id")
