"""Routes in the console: made, checked, tried, changed, switched and deleted by whoever may, and nobody else."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from console import Site, console
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.postgres.deliveries import DeliveryStore
from pulse.adapters.postgres.pool import transaction
from pulse.adapters.postgres.route_rows import NoSeals
from pulse.domain.breaker import Circuit
from pulse.domain.delivery import Record
from pulse.domain.stored_route import RouteAttempt
from pulse.domain.webhook import read_secret
from pulse.services.delivery_record import Told

URL = "https://hooks.test/pulse"
HOT = {
    "tenant_id": "acme",
    "route_id": "hot",
    "name": "too hot",
    "type_telemetry": "yes",
    "expression": "metrics.temp > 80.0",
    "template": '{"text": "${device.id} is at ${metrics.temp}"}',
    "kind": "webhook",
    "url": URL,
    "timeout_s": "5",
    "headers": "Authorization: Bearer hidden-value",
    "enabled": "yes",
}
SECRET = re.compile(r"whsec_[A-Za-z0-9+/=]+")
AT = datetime(2026, 3, 1, 11, 0, tzinfo=UTC)

WRONG: list[tuple[dict[str, str], str]] = [
    ({"expression": "metrics.temp >"}, "Condition"),
    ({"type_telemetry": ""}, "Messages"),
    ({"devices": "a b!"}, "Devices"),
    ({"prefix": "a/b"}, "Ids begin with"),
    ({"attributes": "north"}, "Attributes"),
    ({"attributes": "floor:=three"}, "Attributes"),
    ({"template": '{"a": ${b}}'}, "Body"),
    ({"url": "ftp://hooks.test/"}, "URL"),
    ({"url": "http://127.0.0.1/"}, "URL"),
    ({"timeout_s": "soon"}, "Seconds for an answer"),
    ({"timeout_s": "100"}, "Seconds for an answer"),
    ({"timeout_s": "nan"}, "Seconds for an answer"),
    ({"headers": "Authorization"}, "Headers"),
    ({"headers": "Host: elsewhere"}, "Headers"),
    ({"kind": "mqtt", "topic": "a/+/b"}, "Topic"),
    ({"per_s": "many"}, "Messages a second"),
    ({"per_s": "1", "burst": "0"}, "At once"),
    ({"per_s": "1", "burst": "x"}, "At once"),
    ({"route_id": "a b"}, "Route id"),
]


@pytest.fixture
async def site(database: str, nats: NatsServer) -> AsyncIterator[Site]:
    """A browser with the key of the tenant acme signed in."""
    async with console(database, nats, secret_keys="k" * 32) as made:
        await made.sign_in(made.acme)
        yield made


async def definition_of(site: Site, route_id: str = "hot") -> str:
    async with transaction(site.pool) as connection:
        found = await connection.fetchval("SELECT definition FROM routes WHERE route_id = $1", route_id)
    return str(found)


async def revision_in(site: Site, path: str) -> str:
    found = re.search(r'name="revision" value="(\d+)"', (await site.get(path)).text)
    assert found
    return found[1]


async def test_a_webhook_is_made_and_its_secret_is_shown_once_and_no_header_ever(site: Site) -> None:
    await site.get("/routes/add")
    made = await site.post("/routes/add", HOT)
    assert made.status_code == 200
    found = SECRET.search(made.text)
    assert found
    read_secret(found[0])
    pages = [await site.get(path) for path in ("/routes", "/routes/acme/hot", "/routes/acme/hot/edit", "/settings/log")]
    for page in (made, *pages):
        assert "hidden-value" not in page.text
    for page in pages:
        assert page.status_code == 200
        assert found[0] not in page.text
    assert "Authorization" in pages[2].text
    assert "too hot" in pages[0].text
    assert "route.create" in pages[3].text


async def test_a_republish_is_made_without_a_secret_and_gets_one_when_it_becomes_a_webhook(site: Site) -> None:
    await site.get("/routes/add")
    republish = {**HOT, "kind": "mqtt", "topic": "alerts/${device.id}", "ordered": ""}
    made = await site.post("/routes/add", republish)
    assert made.status_code == 303
    assert made.headers["location"].startswith("/routes/acme/hot?done=")
    page = (await site.get("/routes/acme/hot")).text
    assert "tenant/acme/route/alerts/${device.id}" in page
    assert "New secret" not in page
    revision = await revision_in(site, "/routes/acme/hot/edit")
    changed = await site.post("/routes/acme/hot/edit", {**HOT, "headers": "", "revision": revision})
    assert SECRET.search(changed.text)


async def test_what_cannot_be_a_route_is_kept_in_the_form_which_says_what_is_wrong(site: Site) -> None:
    await site.get("/routes/add")
    for wrong, label in WRONG:
        answer = await site.post("/routes/add", {**HOT, **wrong})
        assert answer.status_code == 422, wrong
        assert f"<b>{label}</b>: " in answer.text, wrong
        assert 'aria-invalid="true"' in answer.text, wrong
        assert 'value="too hot"' in answer.text, wrong
    assert "No routes yet" in (await site.get("/routes")).text


async def test_a_condition_is_checked_as_it_is_typed_and_the_place_is_shown(site: Site) -> None:
    await site.get("/routes/add")
    bad = await site.post("/routes/check?of=expression", {"expression": "metrics.temp > 80.0 &&& true"})
    assert bad.status_code == 200
    assert "(column " in bad.text
    assert re.search(r"metrics\.temp &gt; 80\.0 &amp;&amp;<mark>&amp;</mark> true", bad.text)
    good = await site.post("/routes/check?of=expression", {"expression": "metrics.temp > 80.0"})
    assert "It reads." in good.text
    assert "every message" in (await site.post("/routes/check?of=expression", {"expression": " "})).text
    template = await site.post("/routes/check?of=template", {"template": '{"a": "${b"}'})
    assert "not closed" in template.text
    assert "It reads." in (await site.post("/routes/check?of=template", {"template": '{"a": "${ts}"}'})).text


async def store_readings(site: Site, count: int = 20) -> None:
    async with transaction(site.pool) as connection:
        for ahead in (-1, 0):
            await connection.execute("SELECT ensure_telemetry_day(current_date + $1::int)", ahead)
        await connection.execute(
            "INSERT INTO telemetry (ts, tenant_id, device_id, metrics, position)"
            " SELECT now() - make_interval(secs => n), 'acme', 'boiler', jsonb_build_object('temp', 70.0 + n), n"
            " FROM generate_series(1, $1) AS n",
            count,
        )
        await connection.execute(
            "INSERT INTO device_state (tenant_id, device_id, last_seen) VALUES ('acme', 'boiler', now())"
        )


async def test_a_draft_is_tried_on_what_is_stored_and_nothing_is_made_of_it(site: Site) -> None:
    await store_readings(site)
    await site.get("/routes/add")
    tried = await site.post("/routes/dry-run", {**HOT, "messages": "100"})
    assert tried.status_code == 200
    assert "<b>10</b> of the last 20 messages would be sent" in tried.text
    assert "boiler is at 81" in tried.text
    assert "Nothing may be sent there" in tried.text
    assert 'value="too hot"' in tried.text
    assert "Authorization" in tried.text
    wrong = await site.post("/routes/dry-run", {**HOT, "expression": "metrics.temp >"})
    assert wrong.status_code == 200
    assert "<b>Condition</b>: " in wrong.text
    unanswered = await site.post("/routes/dry-run", {**HOT, "expression": "metrics.pressure > 1.0"})
    assert "neither yes nor no" in unanswered.text
    assert "No routes yet" in (await site.get("/routes")).text


async def test_a_dry_run_without_a_stored_message_says_what_to_do_first(site: Site) -> None:
    await site.get("/routes/add")
    assert "Send one, then try again" in (await site.post("/routes/dry-run", HOT)).text


async def test_an_edit_keeps_headers_that_it_does_not_name_and_removes_those_that_are_ticked(site: Site) -> None:
    await site.get("/routes/add")
    await site.post("/routes/add", {**HOT, "headers": "Authorization: hidden-value\nX-Site: north\nX-Old: 1"})
    path = "/routes/acme/hot/edit"
    edited = {**HOT, "headers": "X-Site: south", "remove_X-Old": "yes", "revision": await revision_in(site, path)}
    assert (await site.post(path, edited)).status_code == 303
    assert '"headers":{"Authorization":"","X-Site":""}' in await definition_of(site)
    stolen = {**edited, "url": "https://evil.test/", "revision": await revision_in(site, path)}
    refused = await site.post(path, stolen)
    assert refused.status_code == 422
    assert "give the value of Authorization again" in refused.text
    assert URL in await definition_of(site)


async def test_of_two_who_edit_one_revision_the_second_sees_what_differs_and_decides(site: Site) -> None:
    await site.get("/routes/add")
    await site.post("/routes/add", HOT)
    path = "/routes/acme/hot/edit"
    first = await revision_in(site, path)
    edited = {**HOT, "headers": "", "revision": first}
    assert (await site.post(path, {**edited, "expression": "metrics.temp > 90.0"})).status_code == 303
    late = await site.post(path, {**edited, "name": "late"})
    assert late.status_code == 409
    assert "The route has changed meanwhile" in late.text
    assert "metrics.temp &gt; 90.0" in late.text
    assert '"name":"too hot"' in await definition_of(site)
    offered = re.search(r'name="revision" value="(\d+)"', late.text)
    assert offered
    assert (await site.post(path, {**edited, "name": "late", "revision": offered[1]})).status_code == 303
    assert '"name":"late"' in await definition_of(site)


async def test_a_refused_edit_is_still_one_of_the_revision_that_it_began_with(site: Site) -> None:
    await site.get("/routes/add")
    await site.post("/routes/add", HOT)
    path = "/routes/acme/hot/edit"
    begun = await revision_in(site, path)
    await site.post(path, {**HOT, "headers": "", "name": "meanwhile", "revision": begun})
    refused = await site.post(path, {**HOT, "headers": "", "timeout_s": "soon", "revision": begun})
    assert f'name="revision" value="{begun}"' in refused.text


async def test_an_edit_neither_enables_nor_disables(site: Site) -> None:
    await site.get("/routes/add")
    await site.post("/routes/add", HOT)
    await site.post("/routes/acme/hot/switch", {"action": "disable"})
    assert "disabled" in (await site.get("/routes/acme/hot")).text
    path = "/routes/acme/hot/edit"
    edited = {**HOT, "headers": "", "name": "still off", "revision": await revision_in(site, path)}
    assert (await site.post(path, edited)).status_code == 303
    async with transaction(site.pool) as connection:
        assert await connection.fetchval("SELECT enabled FROM routes") is False
    await site.post("/routes/acme/hot/switch", {"action": "enable"})
    assert "nothing sent yet" in (await site.get("/routes/acme/hot")).text


async def test_a_rotated_secret_is_shown_once(site: Site) -> None:
    await site.get("/routes/add")
    first = SECRET.findall((await site.post("/routes/add", HOT)).text)
    rotated = await site.post("/routes/acme/hot/secret", {"overlap": "day"})
    assert SECRET.findall(rotated.text) != first
    assert "also has the signature of the one before" in rotated.text
    assert not SECRET.search((await site.get("/routes/acme/hot")).text)


async def test_a_test_that_nobody_sends_says_so_on_the_page(site: Site) -> None:
    await site.get("/routes/add")
    await site.post("/routes/add", HOT)
    tested = await site.post("/routes/acme/hot/test", {})
    assert tested.status_code == 200
    trial = tested.text.partition('<div id="trial"')[2].partition("<h2>")[0]
    assert 'class="notice bad"' in trial
    assert "deliver" in trial


async def test_deleting_asks_first(site: Site) -> None:
    await site.get("/routes/add")
    await site.post("/routes/add", HOT)
    asked = await site.get("/routes/acme/hot/delete")
    assert "Delete too hot?" in asked.text
    assert await definition_of(site) != "None"
    gone = await site.post("/routes/acme/hot/delete", {})
    assert gone.headers["location"].startswith("/routes?done=")
    assert (await site.get("/routes/acme/hot")).status_code == 404


async def fail(site: Site, *, circuit: Circuit = Circuit.OPEN, delivered: bool = False) -> None:
    """What a delivery worker tells of the route `hot`."""
    attempt = RouteAttempt(
        at=AT, message_id="7:hot", device_id="boiler", attempt=1, outcome="delivered" if delivered else "retry",
        status=200 if delivered else 503, elapsed_ms=12.5, excerpt="<b>try later</b>",
    )  # fmt: skip
    told = Told(attempts=deque([attempt]), circuit=circuit)
    if delivered:
        told.delivered, told.has_delivered, told.last_success_at = 1, True, AT
    else:
        told.record, told.last_failure_at = Record(AT.timestamp(), 5), AT + timedelta(seconds=3)

    async def nobody(_tenant_id: str, _route_id: str) -> None: ...

    await DeliveryStore(site.pool, NoSeals(), tell_edge=nobody).record({("acme", "hot"): told})


async def test_health_and_attempts_are_shown_and_what_a_destination_said_is_text(site: Site) -> None:
    await site.get("/routes/add")
    await site.post("/routes/add", HOT)
    marks = re.findall(r'data-mark="(\w+)"', (await site.get("/routes/acme/hot")).text)
    await fail(site)
    page = (await site.get("/routes/acme/hot")).text
    assert "Nothing was delivered since" in page
    assert "left alone for a while" in page
    assert "&lt;b&gt;try later&lt;/b&gt;" in page
    assert 'datetime="2026-03-01T11:00:03.000Z"' in page
    assert re.findall(r'data-mark="(\w+)"', page) != marks
    parts = (await site.get("/routes/acme/hot/parts")).text
    assert "Nothing was delivered since" in parts
    assert "<html" not in parts
    listed = (await site.get("/routes?state=failing")).text
    assert "/routes/acme/hot" in listed
    assert "circuit open" in listed
    await fail(site, circuit=Circuit.CLOSED, delivered=True)
    assert "Nothing matches" in (await site.get("/routes?state=failing")).text
    assert "/routes/acme/hot" in (await site.get("/routes?state=delivering")).text


async def test_routes_are_found_by_a_part_of_what_they_are_and_a_page_at_a_time(site: Site) -> None:
    await site.get("/routes/add")
    for number in range(53):
        fields = {
            **HOT,
            "route_id": f"r-{number:02}",
            "kind": "mqtt",
            "topic": f"to/{number:02}",
            "name": f"N{number:02}",
        }
        assert (await site.post("/routes/add", fields)).status_code == 303
    first = (await site.get("/routes")).text
    assert "r-49" in first
    assert "r-50" not in first
    later = re.search(r'href="(/routes\?[^"]*after=r-49)"', first)
    assert later
    assert "r-52" in (await site.get(later[1].replace("&amp;", "&"))).text
    for text in ("N17", "r-17", "TO/17"):
        found = (await site.get(f"/routes?text={text}")).text
        assert "/routes/acme/r-17" in found
        assert "/routes/acme/r-18" not in found


async def test_another_tenants_routes_are_neither_seen_nor_changed(site: Site) -> None:
    await site.get("/routes/add")
    await site.post("/routes/add", HOT)
    stranger = site.another()
    await stranger.sign_in(site.other)
    assert "hot" not in (await stranger.get("/routes?tenant=acme")).text.replace("No route", "")
    for path in ("", "/edit", "/parts", "/delete"):
        assert (await stranger.get(f"/routes/acme/hot{path}")).status_code == 403
    assert (await stranger.get("/events?topic=route&tenant=acme&route=hot")).status_code == 403
    for path in ("/edit", "/switch", "/test", "/secret", "/delete"):
        fields = {**HOT, "revision": "1", "action": "disable"}
        assert (await stranger.post(f"/routes/acme/hot{path}", fields)).status_code == 403
    assert (await stranger.post("/routes/add", {**HOT, "route_id": "mine"})).status_code == 403
    assert (await stranger.post("/routes/dry-run", HOT)).status_code == 403


async def test_a_key_that_reads_looks_and_tries_and_changes_nothing(site: Site) -> None:
    await site.get("/routes/add")
    await site.post("/routes/add", HOT)
    reader = site.another()
    await reader.sign_in(site.acme_reader)
    for path in ("/routes", "/routes/acme/hot"):
        page = (await reader.get(path)).text
        assert "Disable" not in page
        assert "Add a route" not in page
        assert "Delete" not in page
    for path in ("switch", "test", "secret", "delete", "edit"):
        answer = await reader.post(f"/routes/acme/hot/{path}", {**HOT, "revision": "1", "action": "disable"})
        assert answer.status_code == 403, path
    assert (await reader.post("/routes/add", {**HOT, "route_id": "mine"})).status_code == 403


async def test_without_a_key_to_seal_with_the_page_says_what_to_set(database: str, nats: NatsServer) -> None:
    async with console(database, nats) as site:
        await site.sign_in(site.acme)
        await site.get("/routes/add")
        answer = await site.post("/routes/add", HOT)
        assert answer.status_code == 422
        assert "secret_keys" in answer.text
        assert 'value="too hot"' in answer.text
