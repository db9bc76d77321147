"""The control API on tenants and devices: made, listed, changed, imported; PostgreSQL first, then the edge."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from control_api import BOUNDS, Api, control_api, lines
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.pool import transaction
from pulse.domain.identity import Device, Tenant, admits
from pulse.domain.limits import Rate, TenantLimits
from pulse.domain.registry import device_key, tenant_key

CSV = {"content-type": "text/csv"}


@pytest.fixture
async def api(database: str, nats: NatsServer) -> AsyncIterator[Api]:
    async with control_api(database, nats) as made:
        yield made


async def admitted(api: Api, device_id: str, token: str) -> bool:
    """Whether the edge lets the device in with that token, now."""
    key = device_key("acme", device_id)
    device = (await RegistryBucket(api.nats).read([key]))[key]
    assert isinstance(device, Device)
    return admits(device, token, 0)


async def actions(api: Api, **options: object) -> list[tuple[str, str, str]]:
    changes = (await api.get("/audit-log", **options)).json()["changes"]
    return [(change["actor"], change["action"], change["target"]) for change in changes]


async def test_a_tenant_is_made_disabled_and_enabled_and_the_edge_knows(api: Api) -> None:
    made = await api.post("/tenants", {"tenant_id": "new", "name": "New Ltd"})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    assert made.json()["projected"] is True
    key = tenant_key("new")
    assert await RegistryBucket(api.nats).read([key]) == {key: Tenant("new", enabled=True)}
    assert (await api.post("/tenants/new/disable")).json()["tenant"]["enabled"] is False
    assert await RegistryBucket(api.nats).read([key]) == {key: Tenant("new", enabled=False)}
    disabled = (await api.get("/tenants", params={"enabled": "false"})).json()["tenants"]
    assert [tenant["tenant_id"] for tenant in disabled] == ["new"]
    assert (await api.post("/tenants/new/enable")).json()["tenant"]["enabled"] is True
    assert (await api.get("/tenants/new")).json()["devices"] == 0
    assert (await api.post("/tenants", {"tenant_id": "new"})).status_code == 409
    assert (await api.get("/tenants/nobody")).status_code == 404
    assert (await api.post("/tenants/nobody/enable")).status_code == 404
    assert await actions(api) == [
        ("operator", "tenant.enable", "new"),
        ("operator", "tenant.disable", "new"),
        ("operator", "tenant.create", "new"),
    ]


async def test_an_operator_gives_a_tenant_limits_of_its_own_and_the_edge_knows(api: Api) -> None:
    body = {"messages": {"per_s": 50, "burst": 100}}
    limited = await api.call("PUT", "/tenants/acme/limits", json=body)
    assert (limited.status_code, limited.json()["projected"]) == (200, True)
    assert limited.json()["tenant"]["limits"] == {"messages": {"per_s": 50.0, "burst": 100}, "device_messages": None}
    limits = TenantLimits(messages=Rate(50, 100))
    bucket = RegistryBucket(api.nats)
    assert await bucket.read(["tenant.acme"]) == {"tenant.acme": Tenant("acme", True, limits)}
    for refused, status, field in (
        ({"messages": {"per_s": 1e-9, "burst": 1}}, 422, "messages.per_s"),
        ({"messages": {"per_s": 1, "burst": 0}}, 422, "messages.burst"),
        ({"devices": None}, 422, "devices"),
    ):
        answer = await api.call("PUT", "/tenants/acme/limits", json=refused)
        assert (answer.status_code, answer.json()["field"]) == (status, field)
    assert (await api.call("PUT", "/tenants/acme/limits", json={}, key=api.acme)).status_code == 403
    assert (await api.call("PUT", "/tenants/nobody/limits", json={})).status_code == 404
    assert (await api.call("PUT", "/tenants/acme/limits", json={})).json()["tenant"]["limits"]["messages"] is None
    assert await bucket.read(["tenant.acme"]) == {"tenant.acme": Tenant("acme", True)}
    assert await actions(api) == [("operator", "tenant.limit", "acme")] * 2


async def test_a_tenants_own_key_makes_a_device_that_the_edge_admits_with_the_token_shown_once(api: Api) -> None:
    body = {"device_id": "kettle", "name": "Kettle [1]", "attributes": {"site": "north", "floor": 3, "on": True}}
    made = await api.post("/tenants/acme/devices", body, key=api.acme)
    assert made.status_code == 201
    token = made.json()["token"]
    assert await admitted(api, "kettle", token)
    shown = await api.get("/tenants/acme/devices/kettle", key=api.acme_reader)
    assert shown.json()["attributes"] == body["attributes"]
    assert [item["expires_at"] for item in shown.json()["tokens"]] == [None]
    assert token not in shown.text
    assert (await api.post("/tenants/acme/devices", body, key=api.acme)).status_code == 409
    assert (await api.post("/tenants/nobody/devices", body)).status_code == 404
    assert await actions(api, key=api.acme) == [("acme's", "device.create", "kettle")]
    assert await actions(api, key=api.other) == []


async def test_rotation_with_overlap_and_disabling_reach_the_edge(api: Api) -> None:
    path = "/tenants/acme/devices/boiler"
    first = (await api.post(f"{path}/rotate", key=api.acme)).json()["token"]
    second = (await api.post(f"{path}/rotate", {"overlap_s": 3600}, key=api.acme)).json()["token"]
    assert (await admitted(api, "boiler", first), await admitted(api, "boiler", second)) == (True, True)
    last = (await api.post(f"{path}/rotate", {"overlap_s": 0}, key=api.acme)).json()["token"]
    assert [await admitted(api, "boiler", token) for token in (first, second, last)] == [False, False, True]
    assert (await api.post(f"{path}/disable", key=api.acme)).json()["device"]["enabled"] is False
    assert not await admitted(api, "boiler", last)
    assert (await api.post(f"{path}/enable", key=api.acme)).json()["projected"] is True
    assert await admitted(api, "boiler", last)
    for action in ("enable", "disable", "rotate"):
        assert (await api.post(f"/tenants/acme/devices/nobody/{action}")).status_code == 404


async def test_a_patch_merges_attributes_and_null_removes_one(api: Api) -> None:
    path = "/tenants/acme/devices/boiler"
    await api.patch(path, {"name": "Boiler", "attributes": {"site": "north", "floor": 1}})
    changed = (await api.patch(path, {"attributes": {"floor": 2, "site": None, "gone": None}})).json()
    assert (changed["name"], changed["attributes"]) == ("Boiler", {"floor": 2})
    assert (await api.patch(path, {"name": ""})).json()["name"] == ""
    many = {f"a{number}": number for number in range(64)}
    too_many = await api.patch(path, {"attributes": many})
    assert (too_many.status_code, too_many.json()["field"]) == (422, "attributes")
    assert (await api.get(path)).json()["attributes"] == {"floor": 2}
    assert (await api.patch("/tenants/acme/devices/nobody", {})).status_code == 404


async def test_devices_come_in_pages_without_gap_or_repeat_and_can_be_filtered(api: Api) -> None:
    table = "device_id\n" + "".join(f"d-{number:03}\n" for number in range(25))
    await api.call("POST", "/tenants/acme/devices/import", content=table, headers=CSV)
    await api.post("/tenants/acme/devices/d-007/disable")
    listed: list[str] = []
    after: str | None = ""
    while after is not None:
        page = (await api.get("/tenants/acme/devices", params={"after": after, "limit": 10})).json()
        assert len(page["devices"]) <= 10
        listed += [device["device_id"] for device in page["devices"]]
        after = page["next"]
    assert listed == ["boiler", *(f"d-{number:03}" for number in range(25))]
    for parameters, found in (
        ({"prefix": "d-01"}, [f"d-{number:03}" for number in range(10, 20)]),
        ({"enabled": "false"}, ["d-007"]),
        ({"prefix": "x"}, []),
    ):
        answer = (await api.get("/tenants/acme/devices", params=parameters)).json()
        assert [device["device_id"] for device in answer["devices"]] == found
        assert answer["next"] is None


async def test_an_import_answers_for_each_row_and_a_bad_row_rejects_only_itself(api: Api) -> None:
    table = (
        "\ufeffdevice_id,name,site\r\n"
        'm-1,"Meter, the first",north\r\n'
        "\r\n"
        "m.2,,\r\n"
        "boiler,,\r\n"
        "m-1,again,\r\n"
        "m-3,,south,east\r\n"
        f"m-4,{'x' * 201},\r\n"
        "m-5,a\tb,\r\n"
        "m-6,,\r\n"
    )
    answer = await api.call("POST", "/tenants/acme/devices/import", key=api.acme, content=table.encode(), headers=CSV)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
    *results, last = lines(answer)
    assert [(row["row"], row["device_id"], row["status"], row.get("reason")) for row in results] == [
        (1, "m-1", "created", None),
        (2, "m.2", "refused", "invalid_identity"),
        (3, "boiler", "refused", "conflict"),
        (4, "m-1", "refused", "conflict"),
        (5, "", "refused", "invalid_request"),
        (6, "m-4", "refused", "invalid_request"),
        (7, "m-5", "refused", "invalid_request"),
        (8, "m-6", "created", None),
    ]
    assert last == {"summary": {"created": 2, "refused": 6, "failed": 0, "projected": True}}
    assert await admitted(api, "m-1", results[0]["token"])
    made = (await api.get("/tenants/acme/devices/m-1")).json()
    assert (made["name"], made["attributes"]) == ("Meter, the first", {"site": "north"})


async def test_a_large_import_is_made_in_parts_and_can_be_sent_again(api: Api) -> None:
    table = "device_id\n" + "".join(f"d-{number:05}\n" for number in range(1200))
    for created in (1200, 0):
        *results, last = lines(await api.call("POST", "/tenants/acme/devices/import", content=table, headers=CSV))
        assert [row["row"] for row in results] == list(range(1, 1201))
        assert last["summary"]["created"] == created
    assert [action for _, action, _ in await actions(api)] == ["device.import"] * 6


TABLES = (
    (b"", 422),
    (b"name\nx\n", 422),
    (b"device_id,device_id\na,b\n", 422),
    (b"device_id\n\xff\n", 422),
    (b'device_id\n"never closed', 422),
    (b'device_id\n"a"b\n', 422),
    (b"device_id\n" + b"x" * 200_000, 422),
    (b"device_id\n" + b"a\n" * (BOUNDS.import_rows_max + 1), 413),
    (b"device_id\n" * 30_000, 413),
    (b"device_id\n\0\n", 200),
    (b"device_id\n" + "a\u2028b\n".encode(), 200),
    (b"device_id\n", 200),
)


async def test_a_table_that_cannot_be_read_makes_nothing(api: Api) -> None:
    path = "/tenants/acme/devices/import"
    for content, status in TABLES:
        answer = await api.call("POST", path, content=content, headers=CSV)
        assert answer.status_code == status, content[:40]
    assert (await api.get("/tenants/acme")).json()["devices"] == 1
    assert (await api.post(path, {})).status_code == 415
    unknown = await api.call("POST", path.replace("acme", "nobody"), content=b"device_id\na\n", headers=CSV)
    assert unknown.status_code == 404


async def test_while_nats_is_away_changes_stand_and_say_that_the_edge_does_not_know(api: Api, nats: NatsServer) -> None:
    nats.kill()
    made = await api.post("/tenants/acme/devices", {"device_id": "kettle"})
    assert (made.status_code, made.json()["projected"]) == (201, False)
    answer = await api.call("POST", "/tenants/acme/devices/import", content=b"device_id\nx\n", headers=CSV)
    assert lines(answer)[-1]["summary"] == {"created": 1, "refused": 0, "failed": 0, "projected": False}
    assert (await api.get("/tenants/acme/devices/kettle")).status_code == 200
    for path in ("/streams", "/audit"):
        away = await api.get(path)
        assert (away.status_code, away.headers["retry-after"]) == (503, "1")
        assert "nats" in away.json()["detail"]


async def test_a_change_is_recorded_with_who_and_what(api: Api) -> None:
    await api.patch("/tenants/acme/devices/boiler", {"attributes": {"site": None}}, key=api.acme)
    await api.patch("/tenants/acme/devices/boiler", {"name": "\u0000"}, key=api.acme)
    await api.post("/tenants", {"tenant_id": "acme"})
    [change] = (await api.get("/audit-log", params={"tenant_id": "acme"})).json()["changes"]
    assert change["details"] == {"attributes": {"site": None}}
    async with transaction(api.pool) as database:
        assert await database.fetchval("SELECT count(*) FROM audit_log") == 1
