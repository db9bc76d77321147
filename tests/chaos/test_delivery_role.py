"""What the delivery role does beside delivering: it signs, records, disables, and goes on while PostgreSQL is away."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from brokers import NEEDS_MOSQUITTO, Mosquitto, NatsBroker
from chaos.load import TENANT
from chaos.system import DRAIN_S_MAX, System, eventually
from deliveries import (
    KEY,
    OK,
    SETTINGS,
    Destination,
    Request,
    add_routes,
    answer,
    are_gone,
    destinations,
    job_of,
    letters,
    publish_jobs,
)
from mqtt_client import Device
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.pool import open_pool
from pulse.adapters.postgres.routes import RouteStore
from pulse.adapters.sealing.box import Sealer
from pulse.domain.errors import Reason
from pulse.domain.route import Republish

TIMEOUT_S = 10


def well(_destination: Destination, _request: Request) -> bytes:
    return OK


def verifies(secret: str, request: Request) -> bool:
    try:
        Verifier(secret).verify(request.body, request.headers)
    except WebhookVerificationError:
        return False
    return True


def has_had(destination: Destination, count: int) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return sum(destination.delivered.values()) >= count

    return holds


def has_letters(client: PulseClient, count: int) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return len(await letters(client)) >= count

    return holds


async def test_every_request_is_verified_by_a_real_verifier_while_its_secret_is_rotated(system: System) -> None:
    async with (
        destinations(well) as [destination],
        connection(system.nats.url, name="test") as client,
        open_pool(system.database_url, size_max=1, timeout_s=TIMEOUT_S, application_name="test") as pool,
        system.role("delivery", **SETTINGS).supervised(),
    ):
        old = (await add_routes(system.database_url, {"r": destination.url}))["r"]
        await publish_jobs(client, [(1, "r")])
        await eventually(has_had(destination, 1), "the first job is delivered")
        store = RouteStore(pool, seals=Sealer([KEY]))
        _, new = await store.rotate_secret(TENANT, "r", overlap_s=3600)
        async with asyncio.timeout(DRAIN_S_MAX):
            for position in itertools.count(2):
                await publish_jobs(client, [(position, "r")])
                await eventually(has_had(destination, position), "one more job is delivered")
                if verifies(new, destination.requests[-1]):
                    break
        # The one before is valid still: who verifies with it takes them all.
        assert all(verifies(old, request) for request in destination.requests)
        assert not verifies(new, destination.requests[0])

        async def is_on_record() -> bool:
            health = await store.health(TENANT, "r")
            return health is not None and health.delivered == len(destination.requests)

        await eventually(is_on_record, "the attempts are on record")
        attempts = await store.attempts(TENANT, "r")
    came = [each.webhook_id for each in destination.requests]
    assert [each.message_id for each in reversed(attempts)] == came[-len(attempts) :]
    assert {(each.outcome, each.status, each.attempt, each.excerpt) for each in attempts} == {
        ("delivered", 200, 1, "ok")
    }


async def test_a_destination_that_is_gone_disables_its_route_on_record_until_it_is_enabled_again(
    system: System,
) -> None:
    async with (
        destinations(lambda destination, _: answer(410) if len(destination.requests) == 1 else OK) as [destination],
        connection(system.nats.url, name="test") as client,
        open_pool(system.database_url, size_max=1, timeout_s=TIMEOUT_S, application_name="test") as pool,
        system.role("delivery", **SETTINGS).supervised(),
    ):
        await add_routes(system.database_url, {"r": destination.url})
        store = RouteStore(pool, seals=Sealer([KEY]))
        await publish_jobs(client, [(1, "r")])

        async def is_disabled() -> bool:
            return not (await store.route(TENANT, "r")).route.enabled

        await eventually(is_disabled, "the route is disabled")
        assert "410" in (await store.route(TENANT, "r")).disabled_reason
        [logged] = await system.fetch("SELECT actor, target FROM audit_log WHERE action = 'route.disable'")
        assert tuple(logged) == ("delivery", "r")

        await publish_jobs(client, [(2, "r")])
        await eventually(has_letters(client, 2), "what comes for a route that is disabled is dead")
        await store.change(TENANT, "r", lambda route: msgspec.structs.replace(route, enabled=True))
        async with asyncio.timeout(DRAIN_S_MAX):
            for position in itertools.count(3):
                await publish_jobs(client, [(position, "r")])
                await eventually(lambda: are_gone(client), "the job has its end")
                if len(destination.requests) > 1:
                    break
        reasons = {job_of(letter): letter.reason for letter in await letters(client)}
    assert reasons["1:r"] == Reason.DESTINATION_GONE
    assert reasons["2:r"] == Reason.ROUTE_GONE
    assert sum(destination.delivered.values()) == 1


async def test_known_routes_are_served_while_postgresql_is_away_and_the_others_wait(
    mortal: System, postgres: PostgresServer
) -> None:
    async with (
        destinations(well, well) as [known, unknown],
        connection(mortal.nats.url, name="test") as client,
        mortal.role("delivery", **SETTINGS).supervised() as role,
    ):
        await add_routes(mortal.database_url, {"known": known.url, "unknown": unknown.url})
        await publish_jobs(client, [(1, "known")])
        await eventually(has_had(known, 1), "the first job is delivered")
        await asyncio.to_thread(postgres.kill)
        await publish_jobs(client, [(2, "unknown"), *[(position, "known") for position in range(3, 50)]])
        await eventually(has_had(known, 48), "deliveries go on")
        assert not unknown.requests
        await asyncio.to_thread(postgres.restart)
        await eventually(has_had(unknown, 1), "the job of the other route is delivered")
        await eventually(lambda: are_gone(client), "each job has its end")
        assert await letters(client) == []
        assert role.deaths == []


@pytest.mark.parametrize("kind", [NatsBroker, pytest.param(Mosquitto, marks=NEEDS_MOSQUITTO)])
async def test_what_is_republished_waits_for_a_broker_that_is_away_and_arrives_below_the_tenants_own_topics(
    system: System, scratch: Path, kind: type[NatsBroker] | type[Mosquitto]
) -> None:
    broker = kind(folder=scratch / "broker")
    account = {
        "PULSE_MQTT_URL": broker.url,
        "PULSE_MQTT_USERNAME": broker.username,
        "PULSE_MQTT_PASSWORD": broker.password,
    }
    route = Republish(topic="alerts/${device.id}/${metrics.n}")
    async with (
        connection(system.nats.url, name="test") as client,
        system.role("delivery", **SETTINGS, **account).supervised(),
    ):
        await add_routes(system.database_url, {"r": route}, template='{"n":"${metrics.n}"}')
        ids = await publish_jobs(client, [(position, "r") for position in range(1, 21)])

        async def all_wait() -> bool:
            return (await stream_state(client, "LATER")).messages == len(ids)

        await eventually(all_wait, "the jobs wait, as there is no broker")
        await asyncio.to_thread(broker.start)
        listener = Device(port=broker.port, user=broker.username, token=broker.password, client_id="listener")
        try:
            assert listener.connect()
            assert listener.subscribe("#" if kind is Mosquitto else "tenant/#")
            await eventually(lambda: are_gone(client), "each job has its end")
            await asyncio.to_thread(listener.wait, lambda: len(listener.heard.messages) >= len(ids), "all messages")
            assert set(listener.heard.messages) == {
                (f"tenant/{TENANT}/route/alerts/d0/{n}", b'{"n":%d}' % n) for n in range(1, 21)
            }
            assert await letters(client) == []
        finally:
            listener.end()
            broker.kill()
