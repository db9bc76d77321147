"""The control API on commands: made once, listed by page, cancelled; the same of whole fleets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest

from control_api import Api, control_api
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.postgres.command_fleets import FleetLots
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.pool import transaction
from pulse.domain.identity import NewDevice
from pulse.domain.presence import PRESENCE_AFTER

ACME = "/tenants/acme"
BOILER = f"{ACME}/devices/boiler"
FLEETS = f"{ACME}/fleet-commands"
REBOOT = {"name": "reboot", "payload": {"delay_s": 5}}
EVERYTHING = {"all": False, "devices": [], "prefix": "", "attributes": {}}
JSON = {"content-type": "application/json"}


@pytest.fixture
async def api(database: str, nats: NatsServer) -> AsyncIterator[Api]:
    async with control_api(database, nats) as made:
        yield made


async def said(api: Api) -> list[dict[str, object]]:
    """What devices are to hear of commands."""
    async with transaction(api.pool) as database:
        rows = await database.fetch("SELECT body FROM outbox WHERE topic = 'commands' ORDER BY id")
    return [json.loads(row["body"]) for row in rows]


async def actions(api: Api) -> list[tuple[str, str, str]]:
    changes = (await api.get("/audit-log")).json()["changes"]
    return [(change["actor"], change["action"], change["target"]) for change in changes]


async def add_devices(api: Api, *device_ids: str, **attributes: object) -> None:
    new = [NewDevice(device_id=device_id, attributes=attributes) for device_id in device_ids]
    await IdentityStore(api.pool, presence_after=PRESENCE_AFTER).add_devices("acme", new)


async def test_a_command_is_made_and_its_device_is_told(api: Api) -> None:
    made = await api.post(f"{BOILER}/commands", {**REBOOT, "ttl_s": 60, "timeout_s": 10}, key=api.acme)
    assert made.status_code == 201
    body = made.json()
    assert (body["state"], body["payload"], body["created_by"]) == ("queued", {"delay_s": 5}, "acme's")
    assert (body["timeout_s"], body["ordered"], body["held"], body["fleet_id"]) == (10, False, False, None)
    [told] = await said(api)
    assert (told["commandId"], told["name"], told["payload"]) == (body["command_id"], "reboot", {"delay_s": 5})
    assert told["expiresAt"] == told["issuedAt"] + 60_000  # type: ignore[operator]
    shown = (await api.get(f"{ACME}/commands/{body['command_id']}", key=api.acme_reader)).json()
    moves = shown.pop("moves")
    assert shown == body
    assert [(move["state"], move["who"]) for move in moves] == [("queued", "acme's")]
    assert await actions(api) == [("acme's", "command.create", "boiler")]


async def test_what_is_not_said_is_as_the_settings_have_it(api: Api) -> None:
    made = (await api.post(f"{BOILER}/commands", {"name": "ping"})).json()
    assert (made["payload"], made["timeout_s"]) == ({}, 300)
    for payload in (None, 0, "x", [1, {"a": 2.5}], True):
        made = (await api.post(f"{BOILER}/commands", {"name": "ping", "payload": payload})).json()
        assert made["payload"] == payload


async def test_under_one_idempotency_key_a_command_is_made_once(api: Api) -> None:
    key = {"Idempotency-Key": "order 7".replace(" ", "-")}
    answers = await asyncio.gather(*(api.post(f"{BOILER}/commands", REBOOT, headers=key) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 201]
    assert len({answer.json()["command_id"] for answer in answers}) == 1
    assert len(await said(api)) == 1
    assert await actions(api) == [("operator", "command.create", "boiler")]
    await add_devices(api, "kettle")
    for path, body in (
        (BOILER, {**REBOOT, "payload": {"delay_s": 6}}),
        (BOILER, {**REBOOT, "name": "stop"}),
        (BOILER, {**REBOOT, "ttl_s": 60}),
        (BOILER, {**REBOOT, "ordered": True}),
        (f"{ACME}/devices/kettle", REBOOT),
    ):
        other = await api.post(f"{path}/commands", body, headers=key)
        assert (other.status_code, other.json()["field"]) == (409, "Idempotency-Key"), body
    # Another tenant's keys are its own.
    assert (await api.post("/tenants/other/devices/boiler/commands", REBOOT, headers=key)).status_code == 201
    assert len(await said(api)) == 2


async def test_of_ordered_commands_of_one_name_the_second_is_held(api: Api) -> None:
    first, second = [(await api.post(f"{BOILER}/commands", {**REBOOT, "ordered": True})).json() for _ in range(2)]
    assert (first["held"], second["held"]) == (False, True)
    assert [told["commandId"] for told in await said(api)] == [first["command_id"]]
    await api.post(f"{ACME}/commands/{first['command_id']}/cancel")
    assert [told["commandId"] for told in await said(api)] == [first["command_id"], second["command_id"]]


async def test_commands_are_listed_newest_first_by_page_and_filter(api: Api) -> None:
    await add_devices(api, "kettle")
    ids = []
    for number in range(5):
        device = "kettle" if number % 2 else "boiler"
        made = await api.post(f"{ACME}/devices/{device}/commands", {"name": f"n{number}"})
        ids.append(made.json()["command_id"])
    await api.post(f"{ACME}/commands/{ids[4]}/cancel")
    found, before = [], None
    while True:
        page = (await api.get(f"{ACME}/commands", params={"limit": 2} | ({"before": before} if before else {}))).json()
        assert len(page["commands"]) <= 2
        found += [command["command_id"] for command in page["commands"]]
        before = page["next"]
        if before is None:
            break
    assert sorted(found) == sorted(ids)
    created = {command_id: (await api.get(f"{ACME}/commands/{command_id}")).json()["created_at"] for command_id in ids}
    assert [created[each] for each in found] == sorted(created.values(), reverse=True)
    for params, expected in (
        ({"device_id": "kettle"}, {ids[1], ids[3]}),
        ({"state": "cancelled"}, {ids[4]}),
        ({"state": "queued", "device_id": "boiler"}, {ids[0], ids[2]}),
        ({"fleet_id": "none"}, set()),
    ):
        commands = (await api.get(f"{ACME}/commands", params=params)).json()["commands"]
        assert {command["command_id"] for command in commands} == expected, params
    of_device = (await api.get(f"{BOILER}/commands", params={"state": "cancelled"})).json()["commands"]
    assert [command["command_id"] for command in of_device] == [ids[4]]


async def test_a_command_is_cancelled_once(api: Api) -> None:
    made = (await api.post(f"{BOILER}/commands", REBOOT)).json()
    path = f"{ACME}/commands/{made['command_id']}"
    cancelled = await api.post(f"{path}/cancel", key=api.acme)
    assert (cancelled.status_code, cancelled.json()["state"], cancelled.json()["due_at"]) == (200, "cancelled", None)
    again = await api.post(f"{path}/cancel")
    assert (again.status_code, again.json()["reason"]) == (409, "conflict")
    moves = (await api.get(path)).json()["moves"]
    assert [(move["state"], move["who"]) for move in moves] == [("queued", "operator"), ("cancelled", "acme's")]
    assert (await actions(api))[0] == ("acme's", "command.cancel", made["command_id"])
    assert len(await actions(api)) == 2


async def test_a_device_has_so_many_open_commands_at_the_most(api: Api) -> None:
    async with transaction(api.pool) as database:
        await database.execute(
            "INSERT INTO commands (tenant_id, command_id, device_id, name, payload, created_ms, expires_ms, timeout_ms,"
            " due_ms, created_by) SELECT 'acme', 'c' || n, 'boiler', 'x', '{}', 1, $1, 1, $1, 'test'"
            " FROM generate_series(1, 1000) AS n",
            time.time_ns() // 1_000_000 + 3_600_000,
        )
    refused = await api.post(f"{BOILER}/commands", REBOOT)
    assert (refused.status_code, refused.json()["limit"]) == (409, "command_open_max")
    await api.post(f"{ACME}/commands/c7/cancel")
    assert (await api.post(f"{BOILER}/commands", REBOOT)).status_code == 201


WRONG: tuple[tuple[bytes, int, str], ...] = (
    (b"", 422, "body"),
    (b"{", 400, ""),
    (b"[]", 422, "body"),
    (b"{}", 422, "name"),
    (b'{"name":""}', 422, "name"),
    (b'{"name":"a b"}', 422, "name"),
    (b'{"name":1}', 422, "name"),
    (b'{"name":"' + b"x" * 65 + b'"}', 422, "name"),
    (b'{"name":"a","state":"sent"}', 422, "state"),
    (b'{"name":"a","ttl_s":"60"}', 422, "ttl_s"),
    (b'{"name":"a","ttl_s":0.5}', 422, "ttl_s"),
    (b'{"name":"a","ttl_s":-1}', 422, "ttl_s"),
    (b'{"name":"a","ttl_s":1e300}', 422, "ttl_s"),
    (b'{"name":"a","ttl_s":true}', 422, "ttl_s"),
    (b'{"name":"a","timeout_s":0}', 422, "timeout_s"),
    (b'{"name":"a","timeout_s":86401}', 422, "timeout_s"),
    (b'{"name":"a","ordered":"yes"}', 422, "ordered"),
    (b'{"name":"a","payload":{"x":NaN}}', 400, ""),
    (b'{"name":"a","payload":{"x":1,"x":2}}', 422, ""),
    (b'{"name":"a","payload":{"x":["\\u0000"]}}', 422, "payload.x[0]"),
    (b'{"name":"a","payload":{"\\u0000":1}}', 422, "payload"),
    (b'{"name":"a","payload":9223372036854775808}', 422, "payload"),
    (b'{"name":"a","payload":"' + b"x" * 8192 + b'"}', 413, "payload"),
    (b'{"name":"a","payload":' + b"[" * 33 + b"]" * 33 + b"}", 413, "payload"),
    (b'{"name":"a","payload":' + b"[" * 700 + b"]" * 700 + b"}", 413, "payload"),
)


async def test_what_cannot_be_a_command_is_refused_with_its_path_and_makes_none(api: Api) -> None:
    for content, status, field in WRONG:
        answer = await api.call("POST", f"{BOILER}/commands", content=content, headers=JSON)
        assert (answer.status_code, answer.json().get("field", "")) == (status, field), (content[:60], answer.text)
        if status in {413, 422} and content[:1] == b"{":
            whole = content[:-1] + (b',"filter":{"all":true}}' if len(content) > 2 else b'"filter":{"all":true}}')
            answer = await api.call("POST", FLEETS, content=whole, headers=JSON)
            expected = "ordered" if b"ordered" in content else field
            assert (answer.status_code, answer.json().get("field", "")) == (status, expected), (whole[:60], answer.text)
    for key in ("", " ", "a b", "é", "x" * 129):
        answer = await api.post(f"{BOILER}/commands", REBOOT, headers={"Idempotency-Key": key.encode("latin-1")})
        assert (answer.status_code, answer.json()["field"]) == (422, "Idempotency-Key"), key
    for params, field in (
        ({"state": "asleep"}, "state"),
        ({"before": "x"}, "before"),
        ({"before": "9" * 16 + "_a"}, "before"),
        ({"device_id": "a.b"}, "device_id"),
        ({"limit": "0"}, "limit"),
    ):
        answer = await api.get(f"{ACME}/commands", params=params)
        assert (answer.status_code, answer.json()["field"]) == (422, field), params
    assert (await api.get(f"{ACME}/commands")).json() == {"commands": [], "next": None}
    assert await said(api) == []
    assert await actions(api) == []


async def test_no_depth_of_a_payload_is_a_500(api: Api) -> None:
    for levels in range(820, 1020, 5):
        content = b'{"name":"a","payload":' + b"[" * levels + b"]" * levels + b"}"
        answer = await api.call("POST", f"{BOILER}/commands", content=content, headers=JSON)
        assert answer.status_code in {400, 413}, levels


async def test_only_its_tenant_reaches_a_command_and_who_may_only_read_makes_none(api: Api) -> None:
    command_id = (await api.post(f"{BOILER}/commands", REBOOT)).json()["command_id"]
    fleet_id = (await api.post(FLEETS, {**REBOOT, "filter": {"all": True}})).json()["fleet_id"]
    reads = [f"{ACME}/commands", f"{ACME}/commands/{command_id}", f"{BOILER}/commands", FLEETS, f"{FLEETS}/{fleet_id}"]
    for path in reads:
        assert (await api.get(path, key=api.acme_reader)).status_code == 200, path
        assert (await api.get(path, key=api.other)).status_code == 403, path
    changes: list[tuple[str, object]] = [
        (f"{BOILER}/commands", REBOOT),
        (f"{ACME}/commands/{command_id}/cancel", None),
        (FLEETS, {**REBOOT, "filter": {"all": True}}),
        (f"{FLEETS}/{fleet_id}/cancel", None),
    ]
    for path, body in changes:
        for key in (api.other, api.acme_reader):
            assert (await api.post(path, body, key=key)).status_code == 403, path
    # Nor through its own tenant's paths, whatever id it names.
    for method, path in (
        ("GET", f"/commands/{command_id}"),
        ("POST", f"/commands/{command_id}/cancel"),
        ("GET", f"/fleet-commands/{fleet_id}"),
        ("POST", f"/fleet-commands/{fleet_id}/cancel"),
    ):
        assert (await api.call(method, f"/tenants/other{path}", key=api.other)).status_code == 404, path
    assert (await api.get("/tenants/other/commands", key=api.other)).json()["commands"] == []
    for path in (f"{ACME}/devices/nobody/commands", "/tenants/nobody/commands", "/tenants/nobody/fleet-commands"):
        assert (await api.get(path)).status_code == 404, path
    assert (await api.post(f"{ACME}/devices/nobody/commands", REBOOT)).status_code == 404
    assert (await api.post("/tenants/nobody/fleet-commands", {**REBOOT, "filter": {"all": True}})).status_code == 404
    assert (await api.get(f"{ACME}/commands/{command_id}")).json()["state"] == "queued"


async def expand(api: Api) -> None:
    lots = FleetLots(api.pool)
    while await lots.advance(time.time_ns() // 1_000_000):
        pass


async def test_a_fleet_command_makes_one_for_each_device_and_tells_how_far_they_are(api: Api) -> None:
    await add_devices(api, "north-1", "north-2", site="north", floor=3)
    await add_devices(api, "south-1", site="south", floor=3)
    key = {"Idempotency-Key": "k"}
    body = {**REBOOT, "filter": {"attributes": {"site": "north", "floor": 3}}}
    made = await api.post(FLEETS, body, key=api.acme, headers=key)
    assert made.status_code == 201
    fleet = made.json()
    assert (fleet["stage"], fleet["devices"], fleet["counts"]) == ("expanding", 0, {})
    assert fleet["filter"]["attributes"] == {"site": "north", "floor": 3}
    again = await api.post(FLEETS, body, key=api.acme, headers=key)
    assert (again.status_code, again.json()["fleet_id"]) == (200, fleet["fleet_id"])
    other = await api.post(FLEETS, {**REBOOT, "filter": {"all": True}}, headers=key)
    assert (other.status_code, other.json()["field"]) == (409, "Idempotency-Key")
    await expand(api)
    path = f"{FLEETS}/{fleet['fleet_id']}"
    shown = (await api.get(path)).json()
    assert (shown["stage"], shown["devices"], shown["counts"]) == ("expanded", 2, {"queued": 2})
    commands = (await api.get(f"{ACME}/commands", params={"fleet_id": fleet["fleet_id"]})).json()["commands"]
    assert {command["device_id"] for command in commands} == {"north-1", "north-2"}
    await api.post(f"{ACME}/commands/{commands[0]['command_id']}/cancel")
    assert (await api.get(path)).json()["counts"] == {"queued": 1, "cancelled": 1}
    assert (await api.post(f"{path}/cancel", key=api.acme)).status_code == 200
    await expand(api)
    cancelled = (await api.get(path)).json()
    assert (cancelled["stage"], cancelled["counts"]) == ("cancelled", {"cancelled": 2})
    assert (await api.post(f"{path}/cancel")).status_code == 409
    listed = (await api.get(FLEETS)).json()
    assert [each["fleet_id"] for each in listed["fleet_commands"]] == [fleet["fleet_id"]]
    assert [action for action in await actions(api) if "fleet" in action[1]] == [
        ("acme's", "fleet_command.cancel", fleet["fleet_id"]),
        ("acme's", "fleet_command.create", "reboot"),
    ]


async def test_fleet_commands_are_listed_by_page(api: Api) -> None:
    filters: list[dict[str, object]] = [{"all": True}, {"devices": ["boiler"]}, {"prefix": "b", "attributes": {}}]
    made = [(await api.post(FLEETS, {**REBOOT, "filter": wanted})).json() for wanted in filters]
    assert [each["filter"] for each in made] == [{**EVERYTHING, **wanted} for wanted in filters]
    ids = [each["fleet_id"] for each in made]
    first = (await api.get(FLEETS, params={"limit": 2})).json()
    rest = (await api.get(FLEETS, params={"limit": 2, "before": first["next"]})).json()
    found = [each["fleet_id"] for page in (first, rest) for each in page["fleet_commands"]]
    assert sorted(found) == sorted(ids)
    assert (len(first["fleet_commands"]), rest["next"]) == (2, None)


WRONG_FILTERS: tuple[tuple[object, int, str], ...] = (
    (None, 422, "filter"),
    ([], 422, "filter"),
    ({}, 422, "filter"),
    ({"all": False}, 422, "filter"),
    ({"all": True, "prefix": "a"}, 422, "filter.all"),
    ({"everything": True}, 422, "filter.everything"),
    ({"all": 1}, 422, "filter.all"),
    ({"devices": "boiler"}, 422, "filter.devices"),
    ({"devices": ["a.b"]}, 422, "filter.devices.0"),
    ({"devices": ["boiler", "nobody"]}, 404, "filter.devices"),
    ({"devices": ["a"] * 1001}, 422, "filter.devices"),
    ({"prefix": "a*"}, 422, "filter.prefix"),
    ({"attributes": {"site": "\x00"}}, 422, "filter.attributes.site"),
    ({"attributes": {"": 1}}, 422, "filter.attributes..[key]"),
    ({"attributes": {"x" * 129: 1}}, 422, f"filter.attributes.{'x' * 129}.[key]"),
    ({"attributes": {"\x00": 1}}, 422, "filter.attributes"),
    ({"attributes": {"floor": 2**63}}, 422, "filter.attributes.floor"),
    ({"attributes": {f"n{number}": 1 for number in range(17)}}, 422, "filter.attributes"),
)


async def test_a_filter_that_is_none_is_refused_with_its_path(api: Api) -> None:
    for wanted, status, field in WRONG_FILTERS:
        answer = await api.post(FLEETS, {**REBOOT, "filter": wanted})
        assert (answer.status_code, answer.json()["field"]) == (status, field), (wanted, answer.text)
    assert (await api.get(FLEETS)).json()["fleet_commands"] == []
