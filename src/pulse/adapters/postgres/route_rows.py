"""A route as its rows hold it: the definition in clear, header values and signing secrets sealed.

What is sealed is bound to its route: copied to another row it does not open there (ADR 17).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import asyncpg
import msgspec

from pulse.domain.errors import ConfigurationError
from pulse.domain.route import Route, Webhook, decode_route, encode_route
from pulse.domain.stored_route import RouteAttempt, RouteHealth, StoredRoute

ROUTE_COLUMNS = """
    route.tenant_id, route.route_id, definition, headers, enabled, revision, disabled_reason, created_at, updated_at
"""

_headers = msgspec.json.Decoder(dict[str, str])


class Seals(Protocol):
    """Seals secrets and opens them; `adapters/sealing`."""

    def seal(self, secret: bytes, *, context: str) -> bytes:
        """`secret`, sealed for `context`."""

    def open(self, sealed: bytes, *, context: str) -> bytes:
        """The secret; ConfigurationError where it does not open."""


class NoSeals:
    """Where no key is set nothing can be sealed or opened; satisfies Seals by refusing."""

    def seal(self, secret: bytes, *, context: str) -> bytes:
        """Raises ConfigurationError."""
        raise _no_key()

    def open(self, sealed: bytes, *, context: str) -> bytes:
        """Raises ConfigurationError."""
        raise _no_key()


def _no_key() -> ConfigurationError:
    return ConfigurationError("there is no key to seal secrets of routes with", hint="set the setting `secret_keys`")


def context_of(tenant_id: str, route_id: str) -> str:
    """What the secrets of a route are sealed for."""
    return f"route/{tenant_id}/{route_id}"


def headers_of(route: Route) -> Mapping[str, str]:
    """The headers beside ours; none for what is no webhook."""
    return route.destination.headers if isinstance(route.destination, Webhook) else {}


def with_headers(route: Route, headers: Mapping[str, str]) -> Route:
    """The same route with these headers, if it is a webhook's."""
    if not isinstance(route.destination, Webhook):
        return route
    return msgspec.structs.replace(route, destination=msgspec.structs.replace(route.destination, headers=headers))


def definition_of(route: Route) -> str:
    """What stands in clear: the route without the values of its headers."""
    return encode_route(with_headers(route, dict.fromkeys(headers_of(route), ""))).decode()


def sealed_headers(route: Route, seals: Seals) -> bytes | None:
    """The values of its headers, sealed; None where there are none."""
    headers = headers_of(route)
    if not headers:
        return None
    return seals.seal(msgspec.json.encode(headers), context=context_of(route.tenant_id, route.route_id))


def route_of(row: asyncpg.Record) -> Route:
    """The route of a row with ROUTE_COLUMNS, the values of its headers empty."""
    route = decode_route(row["definition"].encode())
    return msgspec.structs.replace(route, enabled=row["enabled"], revision=row["revision"])


def opened_route_of(row: asyncpg.Record, seals: Seals) -> Route:
    """The same with the values of its headers."""
    route, sealed = route_of(row), row["headers"]
    if sealed is None:
        return route
    opened = seals.open(sealed, context=context_of(route.tenant_id, route.route_id))
    return with_headers(route, _headers.decode(opened))


def stored_route_of(row: asyncpg.Record) -> StoredRoute:
    """The route of a row that has the columns of its secret as well."""
    return StoredRoute(
        route=route_of(row),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        signed_since=row["made_at"],
        previous_secret_until=row["previous_until"],
        disabled_reason=row["disabled_reason"],
    )


def attempt_of(row: asyncpg.Record) -> RouteAttempt:
    """One attempt from its row."""
    return RouteAttempt(
        at=row["at"],
        message_id=row["webhook_id"],
        device_id=row["device_id"],
        attempt=row["attempt"],
        outcome=row["outcome"],
        status=row["status"],
        failure=row["failure"] or "",
        error=row["error"],
        elapsed_ms=row["elapsed_ms"],
        excerpt=bytes(row["excerpt"]).decode("utf-8", "replace"),
    )


def health_of(row: asyncpg.Record) -> RouteHealth:
    """The health of a destination, with what workers made for it, from their rows."""
    return RouteHealth(
        circuit=row["circuit"],
        delivered=row["delivered"],
        dead=row["dead"],
        failures=row["failures"],
        failing_since=row["failing_since"],
        last_delivered_at=row["last_success_at"],
        last_failed_at=row["last_failure_at"],
        told_at=row["health_told_at"],
        jobs=row["jobs"] or 0,
        no_room=row["no_room"] or 0,
        unanswered=row["unanswered"] or 0,
        in_line=row.get("in_line") or 0,
    )
