"""Routes in a real PostgreSQL: what is kept in clear, what is sealed, and whose it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec
import pytest

from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, Scoped, open_connection, open_pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.adapters.postgres.route_matches import RouteMatches
from pulse.adapters.postgres.routes import RouteStore
from pulse.adapters.sealing.box import Sealer
from pulse.domain.errors import ConfigurationError, LimitExceeded, Reason, Refusal
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.registry import record_key, route_key
from pulse.domain.route import Match, Republish, Route, Webhook

SEALER = Sealer(["k" * 32])
HEADERS = {"X-Api-Key": "swordfish", "X-Other": "second"}
HOOK = Webhook(url="https://hooks.example.com/", headers=HEADERS)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=4, timeout_s=10, application_name="test") as pool:
        identities = IdentityStore(pool, presence_after=PRESENCE_AFTER)
        await identities.add_tenant("acme")
        await identities.add_tenant("other")
        yield pool


def hook(route_id: str = "hot", *, tenant_id: str = "acme", **values: Any) -> Route:
    return Route(tenant_id=tenant_id, route_id=route_id, **{"destination": HOOK, **values})


def refused(raised: pytest.ExceptionInfo[Refusal]) -> Reason:
    return raised.value.reason


async def test_what_is_secret_is_told_once_and_nowhere_to_be_read(pool: Pool) -> None:
    store = RouteStore(pool, seals=SEALER)
    stored, secret = await store.add(hook(match=Match(expression="metrics.temp > 80.0")))
    assert secret.startswith("whsec_")
    assert stored.signed_since is not None
    told = stored.route.destination
    assert isinstance(told, Webhook)
    assert told.headers == dict.fromkeys(HEADERS, "")
    assert await store.route("acme", "hot") == stored
    rows = await pool.fetch(
        "SELECT routes::text AS text FROM routes UNION ALL SELECT route_secrets::text FROM route_secrets"
    )
    text = "".join(row["text"] for row in rows)
    for piece in (*HEADERS.values(), secret, secret.encode().hex(), b"swordfish".hex()):
        assert piece not in text


async def test_a_change_sees_the_values_of_headers_and_is_one_revision_on(pool: Pool) -> None:
    store = RouteStore(pool, seals=SEALER)
    await store.add(hook())
    seen: list[Route] = []

    def disable(route: Route) -> Route:
        seen.append(route)
        return msgspec.structs.replace(route, enabled=False, name="off")

    stored, secret = await store.change("acme", "hot", disable)
    assert (seen[0].destination, seen[0].revision) == (HOOK, 1)
    assert (stored.route.name, stored.route.enabled, stored.route.revision, secret) == ("off", False, 2, "")

    def refuse(route: Route) -> Route:
        raise Refusal(Reason.CONFLICT, "no")

    with pytest.raises(Refusal, match="no"):
        await store.change("acme", "hot", refuse)
    assert await store.route("acme", "hot") == stored


async def test_enabling_forgives_what_pulse_had_disabled_it_for(pool: Pool) -> None:
    store = RouteStore(pool, seals=SEALER)
    await store.add(hook())
    await pool.execute("UPDATE routes SET enabled = false, disabled_reason = 'gone', disabled_at = now()")
    await pool.execute("UPDATE route_health SET failures = 9, failing_since = now()")
    assert (await store.route("acme", "hot")).disabled_reason == "gone"
    stored, _ = await store.change("acme", "hot", lambda route: msgspec.structs.replace(route, enabled=True))
    assert (stored.route.enabled, stored.disabled_reason) == (True, "")
    health = await store.health("acme", "hot")
    assert health is not None
    assert (health.failures, health.failing_since) == (0, None)


async def test_only_a_webhook_has_a_secret_and_one_that_becomes_a_webhook_gets_one(pool: Pool) -> None:
    store = RouteStore(pool, seals=SEALER)
    stored, secret = await store.add(hook(destination=Republish(topic="x")))
    assert (secret, stored.signed_since) == ("", None)
    with pytest.raises(Refusal) as raised:
        await store.rotate_secret("acme", "hot", overlap_s=0)
    assert refused(raised) is Reason.CONFLICT
    stored, secret = await store.change("acme", "hot", lambda route: msgspec.structs.replace(route, destination=HOOK))
    assert secret.startswith("whsec_")
    stored, secret = await store.change(
        "acme", "hot", lambda route: msgspec.structs.replace(route, destination=Republish(topic="y"))
    )
    assert (secret, stored.signed_since) == ("", None)
    assert await pool.fetchval("SELECT count(*) FROM route_secrets") == 0


async def test_of_a_rotation_both_secrets_are_kept_until_the_overlap_is_over(pool: Pool) -> None:
    store = RouteStore(pool, seals=SEALER)
    _, first = await store.add(hook())
    stored, second = await store.rotate_secret("acme", "hot", overlap_s=3600)
    assert second != first
    assert stored.previous_secret_until is not None
    assert stored.previous_secret_until > datetime.now(UTC)
    assert stored.route.revision == 2
    row = await pool.fetchrow("SELECT current, previous FROM route_secrets")
    assert row is not None
    assert [SEALER.open(sealed, context="route/acme/hot") for sealed in row] == [second.encode(), first.encode()]
    stored, _ = await store.rotate_secret("acme", "hot", overlap_s=0)
    assert stored.previous_secret_until is None


async def test_without_a_key_nothing_is_sealed_and_what_needs_none_works(pool: Pool) -> None:
    store = RouteStore(pool, seals=None)
    with pytest.raises(ConfigurationError, match="secret_keys"):
        await store.add(hook())
    assert await store.routes("acme") == []
    await store.add(hook("mqtt", destination=Republish(topic="x")))
    await store.change("acme", "mqtt", lambda route: msgspec.structs.replace(route, name="named"))
    assert [each.route.name for each in await store.routes("acme")] == ["named"]


async def test_routes_are_listed_by_page_and_each_tenant_has_so_many(pool: Pool) -> None:
    store = RouteStore(pool, seals=SEALER, routes_max=3)
    for number in range(3):
        await store.add(hook(f"r-{number}", enabled=number != 1))
    with pytest.raises(LimitExceeded):
        await store.add(hook("r-9"))
    await store.add(hook("r-9", tenant_id="other"))
    assert [each.route.route_id for each in await store.routes("acme", limit=2)] == ["r-0", "r-1"]
    assert [each.route.route_id for each in await store.routes("acme", after="r-1")] == ["r-2"]
    assert [each.route.route_id for each in await store.routes("acme", enabled=False)] == ["r-1"]


async def test_what_is_not_there_or_there_already_is_refused(pool: Pool) -> None:
    store = RouteStore(pool, seals=SEALER)
    await store.add(hook())
    for doing, reason in (
        (store.add(hook()), Reason.CONFLICT),
        (store.add(hook(tenant_id="nobody")), Reason.NOT_FOUND),
        (store.route("other", "hot"), Reason.NOT_FOUND),
        (store.change("other", "hot", lambda route: route), Reason.NOT_FOUND),
        (store.delete("other", "hot", lambda _: None), Reason.NOT_FOUND),
        (store.rotate_secret("other", "hot", overlap_s=0), Reason.NOT_FOUND),
    ):
        with pytest.raises(Refusal) as raised:
            await doing
        assert refused(raised) is reason


async def test_a_tenants_role_sees_and_changes_its_own_routes_alone(pool: Pool) -> None:
    everything = RouteStore(pool, seals=SEALER)
    await everything.add(hook())
    await everything.add(hook("theirs", tenant_id="other"))
    own = RouteStore(Scoped(pool=pool, tenant_id="acme"), seals=SEALER)
    await own.add(hook("mine"))
    await own.change("acme", "mine", lambda route: msgspec.structs.replace(route, enabled=False))
    await own.change("acme", "mine", lambda route: msgspec.structs.replace(route, enabled=True))
    await own.rotate_secret("acme", "mine", overlap_s=60)
    assert await own.attempts("acme", "mine") == []
    assert await own.health("acme", "mine") is not None
    assert await own.routes("other") == []
    assert await own.health("other", "theirs") is None
    with pytest.raises(Refusal):
        await own.change("other", "theirs", lambda route: route)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await own.add(hook("planted", tenant_id="other"))
    await own.delete("acme", "mine", lambda _: None)
    assert [each.route.route_id for each in await everything.routes("acme")] == ["hot"]


async def test_the_edge_is_told_of_routes_without_their_headers(pool: Pool) -> None:
    store = RouteStore(pool, seals=SEALER)
    await store.add(hook(enabled=False))
    truth = RegistryTruth(pool)
    bare = hook(destination=Webhook(url=HOOK.url), enabled=False)
    assert await truth.load([route_key("acme", "hot"), route_key("acme", "gone")]) == {route_key("acme", "hot"): bare}
    assert [each async for page in truth.pages(1) for each in page if record_key(each).startswith("route")] == [bare]


async def test_what_workers_made_of_routes_adds_up_and_is_nothing_for_a_route_that_is_gone(pool: Pool) -> None:
    store, matches = RouteStore(pool, seals=SEALER), RouteMatches(pool)
    await store.add(hook())
    for _ in range(2):
        await matches.add_matches({("acme", "hot"): (3, 2, 1), ("acme", "gone"): (9, 9, 9)})
    health = await store.health("acme", "hot")
    assert health is not None
    assert (health.jobs, health.no_room, health.unanswered) == (6, 4, 2)
    await store.delete("acme", "hot", lambda _: None)
    assert await pool.fetchval("SELECT count(*) FROM route_matches") == 0
