"""The control API on shadows: read, patched, deleted, raced for; a wrong request changes nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest

from control_api import Api, control_api, served
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.postgres.pool import transaction
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.domain.shadow import Sections, Shadow, ShadowBounds, ShadowKey, Update
from pulse.domain.shadow_requests import Changed, change

BOILER = "/tenants/acme/devices/boiler"
SHADOW = f"{BOILER}/shadow"
KEY = ShadowKey("acme", "boiler")
ROUNDS = 200


@pytest.fixture
async def api(database: str, nats: NatsServer) -> AsyncIterator[Api]:
    async with control_api(database, nats) as made:
        yield made


async def report(api: Api, reported: dict[str, object], key: ShadowKey = KEY) -> None:
    """What the shadow worker would make of a device's report."""
    bounds = ShadowBounds(shadow_bytes_max=8192, shadow_depth_max=8)

    def decide(shadow: Shadow) -> Changed:
        return change(key, shadow, Update(Sections(reported=reported)), at_ms=5000, who="device", bounds=bounds)

    await ShadowStore(api.pool, names_max=16).change(key, decide)


async def said(api: Api) -> list[tuple[str, dict[str, object]]]:
    """What devices are to hear: topic and body."""
    async with transaction(api.pool) as database:
        rows = await database.fetch("SELECT topic, body FROM outbox ORDER BY id")
    return [(row["topic"], json.loads(row["body"])) for row in rows]


async def test_what_is_desired_is_patched_and_the_device_hears_what_is_left(api: Api) -> None:
    assert (await api.get(SHADOW)).status_code == 404
    first = await api.patch(SHADOW, {"desired": {"power": "on", "light": {"red": 1, "blue": 2}}}, key=api.acme)
    assert (first.status_code, first.headers["etag"]) == (200, '"1"')
    assert first.json()["state"] == {
        "desired": {"power": "on", "light": {"red": 1, "blue": 2}},
        "reported": {},
        "delta": {"power": "on", "light": {"red": 1, "blue": 2}},
    }
    await report(api, {"power": "on"})
    patched = await api.patch(SHADOW, {"desired": {"light": {"blue": None}}})
    assert patched.json()["version"] == 3
    shown = await api.get(SHADOW, key=api.acme_reader)
    assert shown.headers["etag"] == '"3"'
    assert shown.json()["state"] == {
        "desired": {"power": "on", "light": {"red": 1}},
        "reported": {"power": "on"},
        "delta": {"light": {"red": 1}},
    }
    assert shown.json()["metadata"]["reported"] == {"power": 5000}
    assert shown.json()["metadata"]["desired"]["light"].keys() == {"red"}
    deltas = [body["state"] for topic, body in await said(api) if topic == "shadow/update/delta"]
    assert deltas[0] == {"power": "on", "light": {"red": 1, "blue": 2}}
    assert deltas[-1] == {"light": {"red": 1}}
    emptied = await api.patch(SHADOW, {"desired": None})
    assert emptied.json()["state"] == {"desired": {}, "reported": {"power": "on"}, "delta": {}}


async def test_named_shadows_are_each_for_itself(api: Api) -> None:
    await api.patch(SHADOW, {"desired": {"power": "on"}})
    await api.patch(SHADOW, {"desired": {"rate": 5}}, params={"name": "config"})
    assert (await api.get(f"{BOILER}/shadows")).json() == {"names": ["", "config"]}
    named = await api.get(SHADOW, params={"name": "config"})
    assert (named.json()["state"]["desired"], named.json()["version"]) == ({"rate": 5}, 1)
    missing = await api.get(SHADOW, params={"name": "other"})
    assert (missing.status_code, missing.json()["field"]) == (404, "name")
    assert {topic for topic, _ in await said(api)} >= {"shadow/update/delta", "shadow/name/config/update/delta"}


async def test_a_change_for_another_version_is_409_with_the_version_that_there_is(api: Api) -> None:
    for version in ('"0"', "1", '"2"'):
        done = await api.patch(SHADOW, {"desired": {"at": version}}, headers={"If-Match": version})
        assert done.status_code == 200, version
    before, heard = (await api.get(SHADOW)).json(), await said(api)
    for version in ('"2"', "4", '"0"'):
        for method, body in (("PATCH", {"desired": {"at": "late"}}), ("DELETE", None)):
            late = await api.call(method, SHADOW, headers={"If-Match": version}, json=body)
            assert (late.status_code, late.json()["version"], late.json()["field"]) == (409, 3, "If-Match")
            assert late.json()["reason"] == "conflict"
    assert (await api.get(SHADOW)).json() == before
    assert await said(api) == heard


async def test_a_deleted_shadow_goes_on_counting_when_it_is_made_again(api: Api) -> None:
    await api.patch(SHADOW, {"desired": {"power": "on"}})
    assert (await api.call("DELETE", SHADOW, headers={"If-Match": '"1"'})).status_code == 204
    assert (await api.get(SHADOW)).status_code == 404
    assert (await api.call("DELETE", SHADOW)).status_code == 404
    assert (await api.get(f"{BOILER}/shadows")).json() == {"names": []}
    again = await api.patch(SHADOW, {"desired": {"power": "off"}})
    assert (again.json()["version"], again.json()["state"]["desired"]) == (3, {"power": "off"})


async def test_the_last_changes_say_who_asked_for_what(api: Api) -> None:
    await api.patch(SHADOW, {"desired": {"power": "on"}}, key=api.acme)
    await report(api, {"power": "on"})
    await api.call("DELETE", SHADOW)
    changes = (await api.get(f"{SHADOW}/changes")).json()["changes"]
    assert [(each["version"], each["who"], each["patch"]) for each in changes] == [
        (3, "operator", None),
        (2, "device", {"reported": {"power": "on"}}),
        (1, "acme's", {"desired": {"power": "on"}}),
    ]
    assert changes[1]["at"] == "1970-01-01T00:00:05Z"
    log = (await api.get("/audit-log", key=api.acme)).json()["changes"]
    assert [(each["actor"], each["action"], each["target"]) for each in log] == [
        ("operator", "shadow.delete", "boiler"),
        ("acme's", "shadow.change", "boiler"),
    ]
    assert log[1]["details"] == {"name": "", "desired": {"power": "on"}}


async def test_only_a_devices_own_tenant_and_who_may_change_reach_its_shadow(api: Api) -> None:
    await api.patch(SHADOW, {"desired": {"power": "on"}})
    body = {"desired": {"power": "off"}}
    requests: list[tuple[str, str, object]] = [
        ("GET", SHADOW, None),
        ("GET", f"{BOILER}/shadows", None),
        ("GET", f"{SHADOW}/changes", None),
        ("PATCH", SHADOW, body),
        ("DELETE", SHADOW, None),
    ]
    for method, path, content in requests:
        assert (await api.call(method, path, key=api.other, json=content)).status_code == 403, path
        expected = 200 if method == "GET" else 403
        assert (await api.call(method, path, key=api.acme_reader, json=content)).status_code == expected, path
        unknown = path.replace("boiler", "nobody")
        assert (await api.call(method, unknown, json=content)).status_code == 404, unknown
    assert (await api.get(SHADOW)).json()["version"] == 1
    async with transaction(api.pool) as database:
        assert await database.fetchval("SELECT count(*) FROM shadows WHERE device_id = 'nobody'") == 0


def nested(levels: int) -> bytes:
    """`{"desired": …}` with so many objects within one another."""
    return b'{"desired":' + b'{"a":' * (levels - 1) + b"{}" + b"}" * levels


WRONG: tuple[tuple[bytes, int, str], ...] = (
    (b"", 422, "body"),
    (b"{", 400, ""),
    (b"[]", 422, "body"),
    (b"{}", 422, "desired"),
    (b'{"desired":[]}', 422, "desired"),
    (b'{"desired":"on"}', 422, "desired"),
    (b'{"desired":1}', 422, "desired"),
    (b'{"desired":{},"reported":{}}', 422, "reported"),
    (b'{"desired":{},"version":1}', 422, "version"),
    (b'{"state":{"desired":{}}}', 422, "desired"),
    (b'{"desired":{"a":1,"a":2}}', 422, ""),
    (b'{"desired":{"a":NaN}}', 400, ""),
    (b'{"desired":{"a":{"b":9223372036854775808}}}', 422, "desired.a.b"),
    (b'{"desired":{"a":["x","\\u0000"]}}', 422, "desired.a[1]"),
    (b'{"desired":{"a\\u0000":1}}', 422, "desired"),
    (b'{"desired":{"a":"\\ud800"}}', 400, ""),
    (b'{"desired":{"a":"' + b"x" * 8192 + b'"}}', 413, "desired"),
    (b'{"desired":{"a":"' + b"x" * 70_000 + b'"}}', 413, ""),
    (nested(9), 413, "desired"),
    (b'{"desired":{"a":' + b"[" * 8 + b"]" * 8 + b"}}", 413, "desired"),
    *((nested(levels), 413, "desired") for levels in (100, 500, 800)),
)
WRONG_VERSIONS = ("", "x", '"x"', "1.5", '"-1"', "-1", 'W/"1"', '"1", "2"', "*", "9" * 19, '"1')


async def test_what_cannot_be_a_shadow_is_refused_with_its_path_and_changes_nothing(api: Api) -> None:
    await api.patch(SHADOW, {"desired": {"power": "on"}})
    before = (await api.get(SHADOW)).json()
    for content, status, field in WRONG:
        answer = await api.call("PATCH", SHADOW, content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json().get("field", "")) == (status, field), (content[:60], answer.text)
    for version in WRONG_VERSIONS:
        answer = await api.patch(SHADOW, {"desired": {}}, headers={"If-Match": version})
        assert (answer.status_code, answer.json()["field"]) == (422, "If-Match"), version
    for name in ("a.b", "x" * 65, "a/b", "\x00"):
        assert (await api.get(SHADOW, params={"name": name})).json()["field"] == "name", name
    large = await api.patch(SHADOW, {"desired": {"a": "x" * 8192}})
    assert (large.json()["limit"], large.json()["limit_value"]) == ("shadow_bytes_max", 8192)
    deep = await api.call("PATCH", SHADOW, content=nested(9), headers={"content-type": "application/json"})
    assert (deep.json()["limit"], deep.json()["limit_value"]) == ("shadow_depth_max", 8)
    assert (await api.get(SHADOW)).json() == before


async def test_no_depth_of_json_is_a_500(api: Api) -> None:
    """Whatever reads it first: our own bound, or the end of a stack, which is not the same for all of them."""
    for levels in range(820, 1020, 5):
        answer = await api.call("PATCH", SHADOW, content=nested(levels), headers={"content-type": "application/json"})
        assert answer.status_code in {400, 413}, levels


async def test_a_shadow_as_large_and_deep_as_it_may_be_is_taken(api: Api) -> None:
    full = {"a": "x" * (8192 - len('{"a":""}'))}
    assert len(msgspec.json.encode(full)) == 8192
    assert (await api.patch(SHADOW, {"desired": full})).status_code == 200
    more = await api.patch(SHADOW, {"desired": {"b": 1}})
    assert (more.status_code, more.json()["field"]) == (413, "desired")
    deepest = await api.call("PATCH", SHADOW, content=nested(8), headers={"content-type": "application/json"})
    assert deepest.status_code == 200


async def test_a_device_has_so_many_named_shadows_at_the_most(api: Api) -> None:
    for number in range(16):
        made = await api.patch(SHADOW, {"desired": {}}, params={"name": f"n{number}"})
        assert made.status_code == 200
    more = await api.patch(SHADOW, {"desired": {}}, params={"name": "more"})
    assert (more.status_code, more.json()["field"], more.json()["limit"]) == (413, "name", "shadow_names_max")
    assert (await api.patch(SHADOW, {"desired": {}}, params={"name": "n3"})).json()["version"] == 2
    await api.call("DELETE", SHADOW, params={"name": "n3"})
    assert (await api.patch(SHADOW, {"desired": {}}, params={"name": "more"})).status_code == 200


async def test_two_writers_race_200_times_and_no_update_is_lost(api: Api) -> None:
    """Over real HTTP: of two that read one version only one writes, and the other one is told the version there is."""
    async with served(api) as base_url:
        limits = httpx.Limits(max_connections=2)
        async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=120, limits=limits) as http:
            keys = (api.operator, api.acme)
            wins = conflicts = 0
            version = 0
            for number in range(ROUNDS):
                start = asyncio.Barrier(2)

                async def write(who: int, number: int = number, seen: int = version) -> httpx.Response:
                    await start.wait()  # noqa: B023 - awaited within the round
                    return await http.patch(
                        SHADOW,
                        json={"desired": {"round": number, f"writer{who}": number}},
                        headers={"Authorization": f"Bearer {keys[who]}", "If-Match": f'"{seen}"'},
                    )

                answers = await asyncio.gather(write(0), write(1))
                [winner] = [answer for answer in answers if answer.status_code == 200]
                [loser] = [answer for answer in answers if answer.status_code == 409]
                assert winner.json()["version"] == loser.json()["version"] == version + 1
                version += 1
                who = answers.index(loser)
                again = await http.patch(
                    SHADOW,
                    json={"desired": {f"writer{who}": number}},
                    headers={"Authorization": f"Bearer {keys[who]}", "If-Match": f'"{loser.json()["version"]}"'},
                )
                assert again.status_code == 200
                state = again.json()["state"]["desired"]
                assert (state["round"], state["writer0"], state["writer1"]) == (number, number, number)
                version += 1
                wins, conflicts = wins + 2, conflicts + 1
    assert (wins, conflicts, version) == (2 * ROUNDS, ROUNDS, 2 * ROUNDS)
    assert (await api.get(SHADOW)).json()["version"] == version


async def test_writers_without_a_version_lose_nothing_either(api: Api) -> None:
    async with served(api) as base_url:
        limits = httpx.Limits(max_connections=3)
        headers = {"Authorization": f"Bearer {api.operator}"}
        async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=120, limits=limits) as http:

            async def write(number: int) -> int:
                body = {"desired": {f"n{number}": number}}
                answer = await http.patch(SHADOW, json=body, headers=headers)
                return int(answer.raise_for_status().json()["version"])

            versions = await asyncio.gather(*(write(number) for number in range(100)))
    assert sorted(versions) == list(range(1, 101))
    shown = (await api.get(SHADOW)).json()
    assert shown["state"]["desired"] == {f"n{number}": number for number in range(100)}
    topics = [topic for topic, _ in await said(api)]
    assert topics.count("shadow/update/delta") == 100
