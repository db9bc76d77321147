"""What the delivery role asks and tells: routes with their secrets, what was attempted, and that a route is disabled.

It works for all tenants, as the workers do. Who locks rows of several routes locks them in the order of their keys.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

import asyncpg
import structlog

from pulse.adapters.postgres.pool import Pool, transaction
from pulse.adapters.postgres.route_rows import ROUTE_COLUMNS, Seals, context_of, opened_route_of, route_of
from pulse.domain.delivery import Record
from pulse.domain.errors import ConfigurationError
from pulse.domain.route import Route
from pulse.domain.stored_route import RouteAttempt
from pulse.domain.webhook import SigningSecrets

log = structlog.get_logger()

Key = tuple[str, str]

CHECK_TABLES = "SELECT FROM routes, route_secrets, route_health, route_attempts LIMIT 0"
SELECT_ROUTES = f"""
    SELECT asked.tenant_id AS asked_tenant_id, asked.route_id AS asked_route_id,
        {ROUTE_COLUMNS}, secret.current, secret.previous, secret.previous_until
    FROM unnest($1::text[], $2::text[], $3::bigint[]) AS asked (tenant_id, route_id, known)
    LEFT JOIN routes AS route
        ON route.tenant_id = asked.tenant_id AND route.route_id = asked.route_id
    LEFT JOIN route_secrets AS secret
        ON secret.tenant_id = route.tenant_id AND secret.route_id = route.route_id
    WHERE route.revision IS DISTINCT FROM asked.known OR asked.known IS NULL
"""  # noqa: S608 - constants
UPDATE_HEALTH = """
    WITH told AS MATERIALIZED (
        SELECT * FROM unnest(
            $1::text[], $2::text[], $3::int[], $4::bigint[], $5::bigint[], $6::boolean[], $7::bigint[],
            $8::timestamptz[], $9::timestamptz[], $10::timestamptz[], $11::text[]
        ) AS told (
            tenant_id, route_id, attempts, delivered, dead, has_delivered, failures,
            failing_since, last_success_at, last_failure_at, circuit
        )
    ), locked AS MATERIALIZED (
        SELECT tenant_id, route_id FROM route_health JOIN told USING (tenant_id, route_id)
        ORDER BY tenant_id, route_id FOR UPDATE OF route_health
    )
    UPDATE route_health AS health
    SET attempts = health.attempts + told.attempts,
        delivered = health.delivered + told.delivered,
        dead = health.dead + told.dead,
        failures = CASE WHEN told.has_delivered THEN 0 ELSE health.failures END + told.failures,
        failing_since = CASE
            WHEN told.has_delivered THEN told.failing_since
            ELSE coalesce(health.failing_since, told.failing_since)
        END,
        last_success_at = coalesce(told.last_success_at, health.last_success_at),
        last_failure_at = coalesce(told.last_failure_at, health.last_failure_at),
        circuit = told.circuit,
        updated_at = now()
    FROM told JOIN locked USING (tenant_id, route_id)
    WHERE health.tenant_id = told.tenant_id AND health.route_id = told.route_id
    RETURNING health.tenant_id, health.route_id, health.attempts, health.failures, health.failing_since
"""
INSERT_ATTEMPTS = """
    INSERT INTO route_attempts (
        tenant_id, route_id, slot, number, at, webhook_id, device_id, attempt, outcome, status, failure, error,
        elapsed_ms, excerpt
    )
    SELECT tenant_id, route_id, number % 100, number, at, webhook_id, device_id, attempt, outcome, status,
        nullif(failure, ''), error, elapsed_ms, excerpt
    FROM unnest(
        $1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::text[], $6::text[], $7::int[], $8::text[],
        $9::int[], $10::text[], $11::text[], $12::float8[], $13::bytea[]
    ) AS attempt (
        tenant_id, route_id, number, at, webhook_id, device_id, attempt, outcome, status, failure, error,
        elapsed_ms, excerpt
    )
    ON CONFLICT (tenant_id, route_id, slot) DO UPDATE SET
        number = excluded.number, at = excluded.at, webhook_id = excluded.webhook_id, device_id = excluded.device_id,
        attempt = excluded.attempt, outcome = excluded.outcome, status = excluded.status, failure = excluded.failure,
        error = excluded.error, elapsed_ms = excluded.elapsed_ms, excerpt = excluded.excerpt
"""
DISABLE_ROUTE = """
    WITH disabled AS (
        UPDATE routes
        SET enabled = false, disabled_reason = $3, disabled_at = now(), revision = revision + 1, updated_at = now()
        WHERE tenant_id = $1 AND route_id = $2 AND enabled
        RETURNING tenant_id, route_id, disabled_reason
    )
    INSERT INTO audit_log (actor, action, tenant_id, target, details)
    SELECT 'delivery', 'route.disable', tenant_id, route_id, jsonb_build_object('reason', disabled_reason)
    FROM disabled RETURNING true
"""


class Found(NamedTuple):
    """A route with what it signs with; `is_sealed`: we cannot open it, as the key is not one of ours."""

    route: Route
    secrets: SigningSecrets | None
    is_sealed: bool = False


class Told(Protocol):
    """What there is to tell of one route; `services.delivery_record` says it."""

    @property
    def attempts(self) -> Sequence[RouteAttempt]: ...

    @property
    def delivered(self) -> int: ...

    @property
    def dead(self) -> int: ...

    @property
    def has_delivered(self) -> bool: ...

    @property
    def record(self) -> Record: ...

    @property
    def last_success_at(self) -> datetime | None: ...

    @property
    def last_failure_at(self) -> datetime | None: ...

    @property
    def circuit(self) -> str: ...


class DeliveryStore:
    """Satisfies `services.route_book.RouteSource` and `services.delivery_record.RecordStore`.

    `tell_edge` makes the edge know of a route that was disabled. Every call raises Outage.
    """

    def __init__(self, pool: Pool, seals: Seals, *, tell_edge: Callable[[str, str], Awaitable[None]]) -> None:
        self._pool = pool
        self._seals = seals
        self._tell_edge = tell_edge

    async def check(self) -> None:
        """Returns where routes could be asked for."""
        async with transaction(self._pool) as connection:
            await connection.execute(CHECK_TABLES)

    async def load(self, known: Mapping[Key, int | None]) -> dict[Key, Found | None]:
        """Those of `known` whose revision is another one by now, opened; None for a route that is not there."""
        tenants, routes = zip(*known, strict=True)
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(SELECT_ROUTES, tenants, routes, list(known.values()))
        return {(row["asked_tenant_id"], row["asked_route_id"]): self._opened(row) for row in rows}

    async def record(self, told: Mapping[Key, Told]) -> dict[Key, Record]:
        """Write it down in one transaction; returns the failures of those that have some now."""
        keys = sorted(told)
        each = [told[key] for key in keys]
        columns = (
            [key[0] for key in keys],
            [key[1] for key in keys],
            [len(one.attempts) for one in each],
            [one.delivered for one in each],
            [one.dead for one in each],
            [one.has_delivered for one in each],
            [one.record.failures for one in each],
            [one.record.since() for one in each],
            [one.last_success_at for one in each],
            [one.last_failure_at for one in each],
            [str(one.circuit) for one in each],
        )
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(UPDATE_HEALTH, *columns)
            numbered = [
                (row["tenant_id"], row["route_id"], row["attempts"] - back, attempt)
                for row in rows
                for back, attempt in enumerate(reversed(told[row["tenant_id"], row["route_id"]].attempts))
            ]
            if numbered:
                await connection.execute(INSERT_ATTEMPTS, *zip(*map(_columns, numbered), strict=True))
        return {
            (row["tenant_id"], row["route_id"]): Record(row["failing_since"].timestamp(), row["failures"])
            for row in rows
            if row["failing_since"] is not None
        }

    async def disable(self, key: Key, reason: str) -> bool:
        """Disable the route, in the audit log too; False where it is disabled, or gone, already."""
        tenant_id, route_id = key
        async with transaction(self._pool) as connection:
            disabled = bool(await connection.fetchval(DISABLE_ROUTE, tenant_id, route_id, _storable(reason)))
        if disabled:
            await self._tell_edge(tenant_id, route_id)
        return disabled

    def _opened(self, row: asyncpg.Record) -> Found | None:
        if row["route_id"] is None:
            return None
        try:
            return Found(opened_route_of(row, self._seals), self._secrets(row))
        except ConfigurationError as error:
            log.error("a route's secrets do not open", error=str(error))
            return Found(route_of(row), None, is_sealed=True)

    def _secrets(self, row: asyncpg.Record) -> SigningSecrets | None:
        if row["current"] is None:
            return None
        context = context_of(row["tenant_id"], row["route_id"])
        current = self._seals.open(row["current"], context=context).decode()
        until: datetime | None = row["previous_until"]
        if until is None:
            return SigningSecrets(current)
        return SigningSecrets(
            current, self._seals.open(row["previous"], context=context).decode(), int(until.timestamp())
        )


def _columns(numbered: tuple[str, str, int, RouteAttempt]) -> tuple[object, ...]:
    tenant_id, route_id, number, one = numbered
    return (
        tenant_id,
        route_id,
        number,
        one.at,
        one.message_id,
        one.device_id,
        one.attempt,
        one.outcome,
        one.status,
        one.failure,
        _storable(one.error),
        one.elapsed_ms,
        one.excerpt.encode("utf-8", "replace"),
    )


def _storable(text: str) -> str:
    """PostgreSQL's text has no U+0000 and no lone surrogates."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
