"""The control API against what is malformed, hostile or away: a problem with its reason, and never a 500."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx
import pytest

from conftest import PostgresServerFactory
from control_api import NOW, Api, control_api
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.postgres.pool import open_connection, transaction
from pulse.runtime.http import UvicornService

JSON = {"content-type": "application/json"}
DEVICES = "/tenants/acme/devices"


@pytest.fixture
async def api(database: str, nats: NatsServer) -> AsyncIterator[Api]:
    async with control_api(database, nats) as made:
        yield made


BODIES: tuple[tuple[bytes, int, str], ...] = (
    (b"", 422, "body"),
    (b"{", 400, ""),
    (b'{"device_id":"x"', 400, ""),
    (b'{"device_id":"x"}x', 400, ""),
    (b"\xff", 400, ""),
    (b"[" * 10_000, 400, ""),
    (b'{"attributes":' * 9000 + b"1" + b"}" * 9000, 413, ""),
    (b'{"a":' * 2000 + b"1" + b"}" * 2000, 400, ""),
    (b"[]", 422, "body"),
    (b"null", 422, "body"),
    (b'{"device_id":null}', 422, "device_id"),
    (b'{"device_id":1}', 422, "device_id"),
    (b'{"device_id":""}', 422, "device_id"),
    (b'{"device_id":"a.b"}', 422, "device_id"),
    (b'{"device_id":"a*"}', 422, "device_id"),
    (b'{"device_id":"a>"}', 422, "device_id"),
    (b'{"device_id":"a/b"}', 422, "device_id"),
    (b'{"device_id":"a b"}', 422, "device_id"),
    (b'{"device_id":"a\\n"}', 422, "device_id"),
    (b'{"device_id":"' + b"x" * 65 + b'"}', 422, "device_id"),
    (b'{"device_id":"x","device_id":"y"}', 422, ""),
    (b'{"device_id":"x","attributes":{"a":1,"a":2}}', 422, ""),
    (b'{"device_id":"x","unknown":1}', 422, "unknown"),
    (b'{"device_id":"x","name":"\\u0000"}', 422, "name"),
    (b'{"device_id":"x","name":"\\ud800"}', 400, ""),
    (b'{"device_id":"x","name":"' + b"n" * 201 + b'"}', 422, "name"),
    (b'{"device_id":"x","attributes":[]}', 422, "attributes"),
    (b'{"device_id":"x","attributes":{"":1}}', 422, "attributes"),
    (b'{"device_id":"x","attributes":{"a":null}}', 422, "attributes.a"),
    (b'{"device_id":"x","attributes":{"a":{}}}', 422, "attributes.a"),
    (b'{"device_id":"x","attributes":{"a":[1]}}', 422, "attributes.a"),
    (b'{"device_id":"x","attributes":{"a":NaN}}', 400, ""),
    (b'{"device_id":"x","attributes":{"a":Infinity}}', 400, ""),
    (b'{"device_id":"x","attributes":{"a":1e999}}', 422, ""),
    (b'{"device_id":"x","attributes":{"a":9223372036854775808}}', 422, "attributes.a"),
    (b'{"device_id":"x","attributes":{"a":-9223372036854775809}}', 422, "attributes.a"),
    (b'{"device_id":"x","attributes":{"a":' + b"9" * 5000 + b"}}", 422, ""),
    (b'{"device_id":"x","attributes":{"a\\u0000":1}}', 422, "attributes"),
    (b'{"device_id":"x","attributes":{"a":"\\u0000"}}', 422, "attributes.a"),
)


async def test_a_body_that_cannot_be_accepted_is_told_which_value_is_wrong(api: Api) -> None:
    for content, status, field in BODIES:
        answer = await api.call("POST", DEVICES, content=content, headers=JSON)
        found = (answer.status_code, answer.json().get("field", ""))
        assert found == (status, field), (content[:60], answer.text)
    assert (await api.get("/tenants/acme")).json()["devices"] == 1


async def test_several_wrong_values_are_all_named(api: Api) -> None:
    answer = await api.post("/keys", {"name": "", "tenant_id": "a.b", "read_only": "yes", "expires_in_s": 0})
    assert {error["field"] for error in answer.json()["errors"]} == {"name", "tenant_id", "read_only", "expires_in_s"}


async def test_a_broken_body_is_told_where(api: Api) -> None:
    answer = await api.call("POST", DEVICES, content=b'{"device_id": x}', headers=JSON)
    assert (answer.status_code, answer.json()["position"]) == (400, 14)


async def test_type_size_and_coding_of_a_body_are_checked_before_it_is_read(api: Api) -> None:
    body = b'{"device_id":"kettle"}'
    for headers, content, status in (
        ({"content-type": "text/plain"}, body, 415),
        ({}, body, 415),
        ({"content-type": "application/json; charset=utf-8", "content-encoding": "br"}, body, 415),
        ({**JSON, "content-encoding": "gzip"}, b"no gzip", 400),
        ({**JSON, "content-encoding": "gzip"}, gzip.compress(b" " * 10_000_000), 413),
        (JSON, b" " * 70_000, 413),
        ({**JSON, "content-encoding": "gzip"}, gzip.compress(body), 201),
    ):
        answer = await api.call("POST", DEVICES, content=content, headers=headers)
        assert answer.status_code == status, (headers, answer.text)


async def test_what_is_not_there_or_not_allowed_is_a_problem_too(api: Api) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/tenants/", 404),
        ("DELETE", "/tenants", 405),
        ("OPTIONS", "/tenants", 405),
        ("PUT", DEVICES, 405),
        ("GET", "/tenants/a%2Fb", 404),
        ("GET", "/tenants/a.b", 422),
        ("GET", "/tenants/%00", 422),
        ("GET", "/tenants/%FF", 422),
        ("GET", "/tenants/" + "x" * 65, 422),
        ("GET", f"{DEVICES}/a*b", 422),
        ("POST", "/keys/0/revoke", 422),
        ("POST", "/keys/999999999/revoke", 404),
        ("POST", f"/keys/{2**63}/revoke", 422),
        ("GET", f"/audit-log?before={2**64}", 422),
        ("GET", f"/keys?after={'9' * 40}", 422),
        ("GET", f"{DEVICES}?limit=1001", 422),
        ("GET", f"{DEVICES}?enabled=perhaps", 422),
        ("GET", f"{DEVICES}?after=%00", 422),
        ("GET", f"{DEVICES}?prefix=%25", 422),
    ):
        assert (await api.call(method, path)).status_code == status, path
    assert "allow" in (await api.call("DELETE", "/tenants")).headers


async def test_every_answer_forbids_caches_and_other_origins(api: Api) -> None:
    answers = [
        await api.get("/tenants"),
        await api.get("/nothing"),
        await api.post(f"{DEVICES}/boiler/rotate"),
        await api.get("/tenants", key="none", headers={"Origin": "https://elsewhere.example"}),
    ]
    for answer in answers:
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert (await api.client.get("/elsewhere")).text == "elsewhere"


NASTY: tuple[object, ...] = (
    "", " ", "a.b", "*", "%", "'", "\\", "\x00", "\n", "\U0001f4a3", "null", "-1", "0", "1e400", "NaN", "x" * 70,
    "x" * 3000, "2026-02-30T00:00:00Z", "9" * 25, "{}", "[]",
)  # fmt: skip
NASTY_JSON: tuple[object, ...] = (*NASTY, None, True, -1, 0, 2**63, 2**70, 1.5, -1e308, [], {}, [[]], {"a": {"b": []}})


def requests_of(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """For each operation of an OpenAPI document: each parameter and each body property, one nasty value at a time."""
    good = {"tenant_id": "acme", "device_id": "boiler", "key_id": "999", "command_id": "c", "fleet_id": "f"}
    good |= {"route_id": "r", "letter_id": "1"}
    for template, operations in document["paths"].items():
        for method, operation in operations.items():
            path = template.format(**good)
            for parameter in operation.get("parameters", []):
                name = parameter["name"]
                for value in NASTY:
                    if parameter["in"] == "query":
                        yield method, path, {"params": {name: value}}
                    elif value not in {"", "..", "%"}:
                        quoted = "".join(f"%{byte:02X}" for byte in str(value).encode())
                        yield method, template.format(**{**good, name: quoted}), {}
            for schema in body_schemas(document, operation):
                for name in schema.get("properties", {}):
                    known = dict.fromkeys(schema.get("required", []), "fresh")
                    for value in NASTY_JSON:
                        yield method, path, {"json": {**known, name: value}}


def body_schemas(document: Mapping[str, Any], operation: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    for each in schema.get("anyOf", [schema]):
        if reference := each.get("$ref"):
            yield document["components"]["schemas"][reference.rpartition("/")[2]]


async def test_no_value_in_any_place_of_the_openapi_document_is_a_500(api: Api) -> None:
    document = (await api.client.get("/api/v1/openapi.json")).json()
    tried = 0
    for method, path, options in requests_of(document):
        answer = await api.call(method.upper(), path.removeprefix("/api/v1"), **options)
        assert answer.status_code < 500, (method, path, options, answer.text)
        tried += 1
    assert tried > 1000
    assert {200, 201, 404, 422} <= set(api.statuses)


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(found := value.get("$ref"), str):
            yield found
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from references(each)


async def test_the_openapi_document_is_public_and_names_every_resource(api: Api) -> None:
    answer = await api.client.get("/api/v1/openapi.json")
    assert answer.status_code == 200
    schemas = {f"#/components/schemas/{name}" for name in answer.json()["components"]["schemas"]}
    used = set(references(answer.json()))
    assert used <= schemas
    assert "#/components/schemas/ReadingPage" in used
    paths = {path.removeprefix("/api/v1") for path in answer.json()["paths"]}
    device = "/tenants/{tenant_id}/devices/{device_id}"
    assert paths >= {
        "/tenants", "/tenants/{tenant_id}", "/tenants/{tenant_id}/devices/import", device, f"{device}/telemetry",
        f"{device}/latest", f"{device}/rotate", f"{device}/shadow", f"{device}/shadow/changes", f"{device}/shadows",
        f"{device}/commands", "/tenants/{tenant_id}/commands/{command_id}/cancel",
        "/tenants/{tenant_id}/fleet-commands/{fleet_id}", "/tenants/{tenant_id}/routes/dry-run",
        "/tenants/{tenant_id}/routes/{route_id}/secret", "/dead-letters/{letter_id}/replay", "/dead-letters/purge",
        "/tenants/{tenant_id}/dead-letters/{letter_id}", "/tenants/{tenant_id}/dead-letters/replay",
        "/streams", "/audit", "/audit-log", "/keys",
    }  # fmt: skip
    for operations in answer.json()["paths"].values():
        for operation in operations.values():
            assert operation["security"] == [{"api_key": []}]
            assert "application/problem+json" in operation["responses"]["422"]["content"]


async def test_while_postgresql_is_away_every_answer_is_503_and_it_comes_back_by_itself(
    postgres_server_factory: PostgresServerFactory, nats: NatsServer
) -> None:
    server = postgres_server_factory()
    server.start()
    async with control_api(server.url, nats) as api:
        assert (await api.get("/tenants")).status_code == 200
        server.kill()
        for method, path in (("GET", "/tenants"), ("GET", "/audit"), ("POST", f"{DEVICES}/boiler/rotate")):
            away = await api.call(method, path)
            assert (away.status_code, away.headers["retry-after"]) == (503, "1")
            assert "postgresql" in away.json()["detail"]
        server.start()
        async with asyncio.timeout(45):
            while (await api.get("/tenants")).status_code != 200:  # noqa: ASYNC110 - nothing tells us
                await asyncio.sleep(0.05)


async def test_streams_and_audit_tell_how_things_stand(api: Api) -> None:
    status = (await api.get("/streams")).json()
    assert (status["as_declared"], status["drift"]) == (True, [])
    [telemetry] = [stream for stream in status["streams"] if stream["name"] == "TELEMETRY"]
    await api.nats.publish("telemetry.acme", b"{}")
    await api.nats.flush()
    await api.nats.request("$JS.API.STREAM.DELETE.ROUTES", b"", timeout=30)
    status = (await api.get("/streams")).json()
    assert status["as_declared"] is False
    assert {"target": "stream ROUTES", "action": "create", "differences": []} in status["drift"]
    [telemetry] = [stream for stream in status["streams"] if stream["name"] == "TELEMETRY"]
    assert telemetry["messages"] == 1
    [workers] = [consumer for consumer in telemetry["consumers"] if consumer["name"] == "ingest-workers"]
    assert (workers["lag"], workers["lost"]) == (1, 0)
    report = (await api.get("/audit")).json()
    assert report["ok"] is True
    assert [(each["stream"], each["accepted"], each["in_flight"]) for each in report["audits"]] == [
        ("TELEMETRY", 1, 1),
        ("SHADOW", 0, 0),
        ("COMMANDS", 0, 0),
    ]


async def test_a_long_answer_that_is_cut_off_by_an_outage_has_no_end(
    postgres_server_factory: PostgresServerFactory, nats: NatsServer
) -> None:
    """A table that looks whole and is not would be worse than none."""
    server = postgres_server_factory()
    server.start()
    async with control_api(server.url, nats) as api:
        await api.store([(NOW, {"n": 0})])
        async with transaction(api.pool) as database:
            await database.execute(
                "INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position)"
                " SELECT $1, 'acme', 'boiler', jsonb_build_object('s', repeat('x', 2000)), n"
                " FROM generate_series(2, 30000) AS n",
                NOW,
            )
        service = UvicornService(name="test", app=api.app, host="127.0.0.1", port=0, setting="ui")
        service.bind()
        stop = asyncio.Event()
        serving = asyncio.create_task(service.run(stop))
        url = f"http://127.0.0.1:{service.port}/api/v1{DEVICES}/boiler/telemetry"
        parameters = {"from": str(NOW.timestamp()), "to": str(NOW.timestamp() + 60), "format": "csv"}
        headers = {"Authorization": f"Bearer {api.acme}"}
        received = 0

        async def read() -> None:
            nonlocal received
            async for part in answer.aiter_bytes():
                received += len(part)

        async with (
            httpx.AsyncClient(trust_env=False, timeout=60) as http,
            http.stream("GET", url, params=parameters, headers=headers) as answer,
        ):
            assert answer.status_code == 200
            server.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                await read()
        assert 0 < received < 60_000_000
        stop.set()
        await serving


async def test_one_key_with_slow_questions_leaves_connections_for_the_others(api: Api, database: str) -> None:
    """The pool of the test has four connections; a key may have three requests at the same time."""
    slow = "/tenants/acme/devices/boiler/telemetry"
    async with (
        asyncio.TaskGroup() as group,
        open_connection(database, timeout_s=10, application_name="test") as connection,
        connection.transaction(),
    ):
        await connection.execute("LOCK TABLE telemetry IN ACCESS EXCLUSIVE MODE")
        asked = [group.create_task(api.get(slow, key=api.acme)) for _ in range(3)]
        async with asyncio.timeout(30):
            while await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        refused = await api.get("/tenants/acme", key=api.acme)
        assert (refused.status_code, refused.json()["limit"], refused.json()["limit_value"]) == (
            429, "ui_key_requests_max", 3,
        )  # fmt: skip
        assert int(refused.headers["retry-after"]) >= 1
        assert (await api.get("/tenants/other", key=api.other)).status_code == 200
    assert [task.result().status_code for task in asked] == [200] * 3
    assert (await api.get("/tenants/acme", key=api.acme)).status_code == 200
