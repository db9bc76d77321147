"""The control API on routes: made, changed, tried on what is stored, and never another tenant's; secrets told once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
import pytest

from control_api import Api, control_api, served
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.ask import Answerer
from pulse.adapters.postgres.pool import transaction
from pulse.domain.route_trial import Trial
from pulse.domain.webhook import read_secret

ROUTES = "/tenants/acme/routes"
URL = "https://hooks.test/pulse"
WEBHOOK: dict[str, Any] = {"kind": "webhook", "url": URL, "headers": {"Authorization": "Bearer hidden-value"}}
HOT: dict[str, Any] = {
    "route_id": "hot",
    "name": "too hot",
    "match": {"expression": "metrics.temp > 80.0"},
    "destination": WEBHOOK,
    "template": '{"text": "${device.id} is at ${metrics.temp}"}',
}
AT = datetime(2026, 3, 1, 11, 0, tzinfo=UTC)


@pytest.fixture
async def api(database: str, nats: NatsServer) -> AsyncIterator[Api]:
    async with control_api(database, nats) as made:
        yield made


async def hear(api: Api, tenant: str = "acme", device: str = "boiler") -> None:
    """Note that the device was heard of, as a worker does."""
    async with transaction(api.pool) as database:
        await database.execute(
            "INSERT INTO device_state (tenant_id, device_id, last_seen) VALUES ($1, $2, now())", tenant, device
        )


async def test_a_route_is_made_shown_listed_changed_and_deleted_and_its_workers_are_told(api: Api) -> None:
    made = await api.post(ROUTES, HOT, key=api.acme)
    assert (made.status_code, made.headers["etag"], made.json()["projected"]) == (201, '"1"', True)
    read_secret(made.json()["secret"])
    shown = await api.get(f"{ROUTES}/hot", key=api.acme_reader)
    assert shown.json() == made.json()["route"]
    assert shown.json()["destination"] == {
        "kind": "webhook", "url": URL, "header_names": ["Authorization"], "timeout_s": 10.0,
    }  # fmt: skip
    assert shown.json()["match"] == {
        "message_types": ["telemetry"],
        "devices": {"ids": [], "prefix": "", "attributes": {}},
        "expression": "metrics.temp > 80.0",
    }
    assert shown.json()["signing"]["previous_until"] is None
    nameless = (await api.post(ROUTES, {"destination": {"kind": "mqtt", "topic": "alerts/${device.id}"}})).json()
    assert (nameless["secret"], nameless["route"]["signing"]) == (None, None)
    first = (await api.get(ROUTES, params={"limit": 1})).json()
    second = (await api.get(ROUTES, params={"limit": 1, "after": first["next"]})).json()
    listed = [each["route_id"] for page in (first, second) for each in page["routes"]]
    assert (listed, second["next"]) == (["hot", nameless["route"]["route_id"]], None)
    changed = await api.patch(f"{ROUTES}/hot", {"match": {"expression": "metrics.temp > 90.0"}, "template": None})
    assert (changed.json()["route"]["revision"], changed.json()["secret"]) == (2, None)
    assert changed.json()["route"]["match"]["expression"] == "metrics.temp > 90.0"
    assert changed.json()["route"]["template"] is None
    assert (await api.call("DELETE", f"{ROUTES}/hot")).status_code == 204
    assert (await api.get(f"{ROUTES}/hot")).status_code == 404
    assert (await api.call("DELETE", f"{ROUTES}/hot")).status_code == 404


async def test_what_workers_are_told_has_neither_secrets_nor_headers(api: Api) -> None:
    secret = (await api.post(ROUTES, HOT)).json()["secret"]
    told = (await api.nats.jetstream().get_last_msg("KV_registry", "$KV.registry.route.acme.hot")).data or b""
    assert json.loads(told)["match"] == {"expression": "metrics.temp > 80.0"}
    assert secret.encode() not in told
    assert b"hidden-value" not in told
    async with transaction(api.pool) as database:
        rows = [dict(row) for row in await database.fetch("SELECT * FROM routes, route_secrets")]
        logged = [dict(row) for row in await database.fetch("SELECT * FROM audit_log")]
    for text in (repr(rows), repr(logged)):
        assert "hidden-value" not in text
        assert secret not in text


async def test_a_change_for_another_revision_is_409_with_the_one_that_there_is(api: Api) -> None:
    await api.post(ROUTES, HOT)
    for method, body in (("PATCH", {"name": "late"}), ("DELETE", None)):
        late = await api.call(method, f"{ROUTES}/hot", headers={"If-Match": '"2"'}, json=body)
        assert (late.status_code, late.json()["version"], late.json()["field"]) == (409, 1, "If-Match")
    assert (await api.patch(f"{ROUTES}/hot", {"name": "now"}, headers={"If-Match": '"1"'})).status_code == 200
    assert (await api.post(ROUTES, HOT)).status_code == 409


async def test_values_of_headers_are_kept_but_never_for_another_host(api: Api) -> None:
    await api.post(ROUTES, HOT)
    more = await api.patch(f"{ROUTES}/hot", {"destination": {"headers": {"X-Site": "north"}, "url": f"{URL}/2"}})
    assert more.json()["route"]["destination"]["header_names"] == ["Authorization", "X-Site"]
    elsewhere = {"url": "https://evil.example.com/"}
    stolen = await api.patch(f"{ROUTES}/hot", {"destination": elsewhere})
    assert (stolen.status_code, stolen.json()["field"]) == (422, "destination.headers.Authorization")
    given = {**elsewhere, "headers": {"Authorization": "another", "X-Site": None}}
    moved = await api.patch(f"{ROUTES}/hot", {"destination": given})
    assert moved.json()["route"]["destination"]["header_names"] == ["Authorization"]
    republished = await api.patch(f"{ROUTES}/hot", {"destination": {"kind": "mqtt", "topic": "a/b"}})
    assert republished.json()["route"]["destination"] == {"kind": "mqtt", "topic": "a/b"}
    assert republished.json()["route"]["signing"] is None
    back = await api.patch(f"{ROUTES}/hot", {"destination": {"kind": "webhook", "url": URL}})
    assert back.json()["route"]["destination"]["header_names"] == []
    read_secret(back.json()["secret"])


async def test_a_secret_is_told_once_and_the_one_before_is_valid_for_a_while(api: Api) -> None:
    first = (await api.post(ROUTES, HOT)).json()["secret"]
    rotated = (await api.post(f"{ROUTES}/hot/secret", {"overlap_s": 60})).json()
    assert rotated["secret"] not in (None, first)
    until = datetime.fromisoformat(rotated["route"]["signing"]["previous_until"])
    assert timedelta(0) < until - datetime.now(UTC) <= timedelta(seconds=60)
    at_once = (await api.post(f"{ROUTES}/hot/secret", {"overlap_s": 0})).json()
    assert at_once["route"]["signing"]["previous_until"] is None
    assert (await api.post(f"{ROUTES}/hot/secret")).status_code == 200
    for path in ("", "/hot", "/hot/attempts", "/hot/health"):
        text = (await api.get(f"{ROUTES}{path}")).text
        assert not any(secret in text for secret in (first, rotated["secret"], at_once["secret"], "whsec_"))
    await api.post(ROUTES, {"route_id": "plain", "destination": {"kind": "mqtt", "topic": "a"}})
    assert (await api.post(f"{ROUTES}/plain/secret")).status_code == 409


async def test_a_disabled_route_says_so_and_is_enabled_again(api: Api) -> None:
    await api.post(ROUTES, HOT)
    assert (await api.post(f"{ROUTES}/hot/disable")).json()["route"]["enabled"] is False
    assert [each["route_id"] for each in (await api.get(ROUTES, params={"enabled": "false"})).json()["routes"]] == [
        "hot"
    ]
    async with transaction(api.pool) as database:
        await database.execute("UPDATE routes SET disabled_reason = 'gone'")
    assert (await api.get(f"{ROUTES}/hot")).json()["disabled_reason"] == "gone"
    enabled = (await api.post(f"{ROUTES}/hot/enable")).json()["route"]
    assert (enabled["enabled"], enabled["disabled_reason"], enabled["revision"]) == (True, "", 3)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"destination": {"kind": "ftp"}}, "destination"),
    ({"destination": {"kind": "webhook"}}, "destination.url"),
    ({"destination": {"kind": "webhook", "url": "http://127.0.0.1/"}}, "destination.url"),
    ({"destination": {"kind": "webhook", "url": "http://[::ffff:169.254.169.254]/"}}, "destination.url"),
    ({"destination": {"kind": "webhook", "url": "ftp://example.com/"}}, "destination.url"),
    ({"destination": {"kind": "webhook", "url": "https://user:pass@example.com/"}}, "destination.url"),
    ({"destination": {**WEBHOOK, "headers": {"Host": "x"}}}, "destination.headers"),
    ({"destination": {**WEBHOOK, "headers": {"X-A": "a\r\nb"}}}, "destination.headers.X-A"),
    ({"destination": {**WEBHOOK, "timeout_s": 60}}, "destination.timeout_s"),
    ({"destination": {**WEBHOOK, "method": "PUT"}}, "destination.method"),
    ({"destination": {"kind": "mqtt", "topic": "a/+/b"}}, "destination.topic"),
    ({"destination": {"kind": "mqtt", "topic": "${nobody.id}"}}, "destination.topic"),
    ({"match": {"message_types": ["shadow-get"]}}, "match.message_types[0]"),
    ({"match": {"message_types": []}}, "match.message_types"),
    ({"match": {"devices": {"ids": ["a.b"]}}}, "match.devices.ids[0]"),
    ({"match": {"devices": {"prefix": "*"}}}, "match.devices.prefix"),
    ({"match": {"devices": {"attributes": {"site": [1]}}}}, "match.devices.attributes"),
    ({"match": {"where": 1}}, "match.where"),
    ({"match": {"expression": "x" * 2000}}, "match.expression"),
    ({"template": "{"}, "template"),
    ({"template": '{"a": "${nobody}"}'}, "template.a"),
    ({"template": '{"a":1,"a":2}'}, "template"),
    ({"rate": {"per_s": -1, "burst": 1}}, "rate.per_s"),
    ({"route_id": "a.b"}, "route_id"),
    ({"name": "\x07"}, "name"),
    ({"secret": "whsec_"}, "secret"),
]


async def test_what_cannot_be_a_route_is_refused_by_its_path_and_changes_nothing(api: Api) -> None:
    await api.post(ROUTES, HOT)
    for wrong, field in BAD:
        for answer in (
            await api.post(ROUTES, {**HOT, "route_id": "other", **wrong}),
            await api.post(f"{ROUTES}/dry-run", {k: v for k, v in {**HOT, **wrong}.items() if k != "route_id"})
            if "route_id" not in wrong
            else None,
        ):
            if answer is not None:
                assert answer.status_code == 422, (wrong, answer.text)
                assert answer.json()["field"].startswith(field), (wrong, answer.json())
    assert [each["route_id"] for each in (await api.get(ROUTES)).json()["routes"]] == ["hot"]
    for wrong, field in BAD:
        if "route_id" not in wrong:
            answer = await api.patch(f"{ROUTES}/hot", wrong)
            if wrong == {"destination": {"kind": "webhook"}}:
                continue  # nothing of it is wrong in a patch
            assert answer.status_code == 422, (wrong, answer.text)
            assert answer.json()["field"].startswith(field), (wrong, answer.json())


SSRF = """
    http://127.0.0.1/ http://127.1/ http://127.0.1/ http://0/ http://0.0.0.0/ http://2130706433/ http://0x7f000001/
    http://0x7f.1/ http://017700000001/ http://0177.0.0.1/ http://localhost/ http://LOCALHOST./ http://db.localhost/
    http://nats/ http://postgres.internal/ http://router.local/ http://printer.lan/ http://10.0.0.1/ http://172.16.0.1/
    http://172.31.255.255/ http://192.168.1.1/ http://100.64.0.1/ http://169.254.169.254/latest/meta-data/
    http://[::1]/ http://[::]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/ http://[::ffff:169.254.169.254]/
    http://[::127.0.0.1]/ http://[64:ff9b::7f00:1]/ http://[64:ff9b::a9fe:a9fe]/ http://[fe80::1]/ http://[fc00::1]/
    http://[fd00:ec2::254]/ http://[2002:7f00:1::]/ http://[2001:0:7f00:1::]/ http://[ff02::1]/ http://224.0.0.1/
    http://255.255.255.255/ http://192.0.2.1/ http://198.18.0.1/ http://240.0.0.1/ ftp://example.com/ file:///etc/passwd
    gopher://example.com/ https://a@b.example.com/ https://example.com:22/ https://example.com:25/ https://exa%6dple.com/
    https://example.com\\@127.0.0.1/ https://①②⑦.0.0.1/ https:///x https://example.com#@127.0.0.1/
"""


async def test_a_webhook_goes_nowhere_inside(api: Api) -> None:
    assert len(SSRF.split()) >= 40
    await api.post(ROUTES, {"route_id": "r", "destination": {"kind": "webhook", "url": URL}})
    for url in SSRF.split():
        to = {"kind": "webhook", "url": url}
        for answer in (
            await api.post(ROUTES, {"destination": to}),
            await api.post(f"{ROUTES}/dry-run", {"destination": to}),
            await api.patch(f"{ROUTES}/r", {"destination": to}),
        ):
            assert (answer.status_code, answer.json()["field"]) == (422, "destination.url"), url
    assert len((await api.get(ROUTES)).json()["routes"]) == 1


async def test_an_expression_that_does_not_read_is_refused_with_the_position(api: Api) -> None:
    for expression, position in (
        ("metrics.temp >", 14),
        ("metrics.temp > 1 &&\n  nobody > 1", 22),
        ('"ä" == "ä" && foo', 14),
    ):
        for path in (ROUTES, f"{ROUTES}/dry-run"):
            answer = await api.post(path, {"destination": WEBHOOK, "match": {"expression": expression}})
            told = answer.json()
            assert (answer.status_code, told["field"]) == (422, "match.expression")
            assert told["position"] == position, told
    for hostile in ("metrics.all(a, metrics.all(b, a == b))", "1 + 1", "metrics.map(m, m).size() > 1"):
        answer = await api.post(ROUTES, {"destination": WEBHOOK, "match": {"expression": hostile}})
        assert (answer.status_code, answer.json()["field"]) == (422, "match.expression")
    assert (await api.get(ROUTES)).json()["routes"] == []


async def test_a_dry_run_tells_what_would_be_sent_and_sends_nothing(api: Api) -> None:
    rows: list[tuple[datetime, dict[str, object]]] = [
        (AT + timedelta(seconds=number), {"temp": float(number)} if number % 2 else {"volume": number})
        for number in range(100)
    ]
    await api.store(rows)
    await api.store([(AT, {"temp": 99.0})], tenant="other")
    await hear(api)
    await hear(api, tenant="other")
    draft = {name: value for name, value in HOT.items() if name != "route_id"}
    ran = (await api.post(f"{ROUTES}/dry-run", draft, key=api.acme_reader)).json()
    assert (ran["examined"], ran["matched"], ran["unanswered"], ran["complete"]) == (100, 10, 50, True)
    assert [(each["why"], each["count"]) for each in ran["reasons"]] == [('Key not found in map : "temp"', 50)]
    assert json.loads(ran["samples"][0]["body"]) == {"text": "boiler is at 99.0"}
    assert ran["samples"][0]["to"] == URL
    assert "Authorization" in ran["samples"][0]["header_names"]
    assert "hidden-value" not in json.dumps(ran)
    assert ran["destination_refused"].startswith("hooks.test ")
    last = (await api.post(f"{ROUTES}/dry-run", draft, params={"messages": 10})).json()
    assert (last["examined"], last["matched"]) == (10, 5)
    await api.post(ROUTES, {**HOT, "template": None, "enabled": False})
    stored = (await api.post(f"{ROUTES}/hot/dry-run")).json()
    assert stored["matched"] == 10
    assert json.loads(stored["samples"][0]["body"])["payload"]["metrics"] == {"temp": 99.0}
    elsewhere = {**draft, "match": {"devices": {"prefix": "pump"}}}
    assert (await api.post(f"{ROUTES}/dry-run", elsewhere)).json()["examined"] == 0
    heartbeats = {**draft, "match": {"message_types": ["heartbeat"]}}
    assert (await api.post(f"{ROUTES}/dry-run", heartbeats)).json()["field"] == "match.message_types"


async def test_what_cannot_be_rendered_is_counted(api: Api) -> None:
    await api.store([(AT, {"temp": 1.0})])
    await hear(api)
    draft = {"destination": {"kind": "mqtt", "topic": "alerts/${metrics.temp}"}}
    ran = (await api.post(f"{ROUTES}/dry-run", draft)).json()
    assert (ran["matched"], ran["refused"]) == (1, 1)
    assert "destination.topic" in ran["samples"][0]["refused"]


async def test_a_key_reaches_the_routes_of_its_tenant_alone_and_a_reader_changes_nothing(api: Api) -> None:
    await api.post(ROUTES, HOT)
    calls = [
        ("GET", ROUTES, None),
        ("POST", ROUTES, HOT),
        ("POST", f"{ROUTES}/dry-run", {"destination": WEBHOOK}),
        ("GET", f"{ROUTES}/hot", None),
        ("PATCH", f"{ROUTES}/hot", {"name": "mine"}),
        ("DELETE", f"{ROUTES}/hot", None),
        ("POST", f"{ROUTES}/hot/enable", None),
        ("POST", f"{ROUTES}/hot/disable", None),
        ("POST", f"{ROUTES}/hot/secret", None),
        ("POST", f"{ROUTES}/hot/dry-run", None),
        ("GET", f"{ROUTES}/hot/attempts", None),
        ("GET", f"{ROUTES}/hot/health", None),
    ]
    for method, path, body in calls:
        assert (await api.call(method, path, key=api.other, json=body)).status_code == 403, (method, path)
        mine = path.replace("acme", "other")
        if "hot" in path:
            assert (await api.call(method, mine, key=api.other, json=body)).status_code == 404, (method, path)
            assert (await api.call(method, mine, json=body)).status_code == 404, (method, path)
        read = await api.call(method, path, key=api.acme_reader, json=body)
        assert (read.status_code == 403) is (method != "GET" and "dry-run" not in path), (method, path)
    assert (await api.get(f"{ROUTES}/hot")).json()["revision"] == 1
    assert (await api.get("/tenants/nobody/routes")).status_code == 404
    assert (await api.post("/tenants/nobody/routes", HOT)).status_code == 404


async def test_over_real_http_every_change_is_logged(api: Api) -> None:
    async with served(api) as base, httpx.AsyncClient(base_url=base.removesuffix("/api/v1")) as api.client:
        await api.post(ROUTES, HOT, key=api.acme)
        await api.patch(f"{ROUTES}/hot", {"destination": {"headers": {"X-A": "hidden-value"}}})
        logged = (await api.get("/audit-log", key=api.acme)).json()["changes"]
    assert [(each["action"], each["target"]) for each in logged] == [("route.change", "hot"), ("route.create", "hot")]
    assert logged[0]["details"]["destination"]["headers"] == {"X-A": "********"}


async def test_a_route_is_tested_by_the_role_that_delivers_and_its_answer_is_told(api: Api) -> None:
    await api.post(ROUTES, HOT, key=api.acme)
    path = f"{ROUTES}/hot/test"
    away = await api.post(path, key=api.acme)
    assert (away.status_code, away.json()["reason"]) == (503, "unavailable")
    trial = Trial(
        delivered=False, to=URL, message_id="test-1:hot", device_id="boiler", status=500, elapsed_ms=1.5, excerpt="no"
    )

    async def answer(tenant_id: str, route_id: str, _question: bytes) -> bytes:
        assert (tenant_id, route_id) == ("acme", "hot")
        return msgspec.json.encode(trial)

    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(Answerer(api.nats, kind="delivery", answer=answer).run(stop))
        await api.nats.flush()
        told = await api.post(path, key=api.acme)
        assert (told.status_code, told.json()) == (200, msgspec.to_builtins(trial))
        assert (await api.post(f"{ROUTES}/cold/test", key=api.acme)).status_code == 404
        for key in (api.acme_reader, api.other):
            assert (await api.post(path, key=key)).status_code == 403, "it sends something"
        stop.set()
    logged = (await api.get("/audit-log", params={"tenant_id": "acme"})).json()["changes"]
    assert [each["target"] for each in logged if each["action"] == "route.test"] == ["hot", "hot"]
