"""Who gets into the console, what a form has to prove, and what a page may load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from urllib.parse import urlencode

import pytest

from console import ORIGIN, PASSWORD, Site, addresses, console, pages
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.passwords import Argon2Passwords
from pulse.adapters.postgres.access import KeyStore
from pulse.adapters.postgres.console import AccountStore, SessionStore
from pulse.adapters.postgres.pool import transaction
from pulse.domain.account import SessionLife
from pulse.services.sign_in import ATTEMPTS_BURST, SignIn

LINK = "l" * 43
OPERATORS_ALONE = ("/streams", "/streams/TELEMETRY", "/settings/keys", "/events?topic=pipeline")
PAGES = (
    "/devices", "/devices/add", "/devices/import", "/live", "/routes", "/routes/add", "/dead-letters", "/settings",
    "/settings/log",
)  # fmt: skip
HOSTILE = "</script><img src=x onerror=alert(1)>\"'"
STREAMED = ("systems", "pipeline", "tail&stream=TELEMETRY", "device&tenant=acme&device=boiler")
FIELDS = {"action": "disable", "version": "0", "desired": '{"a":1}', "name": "reboot", "payload": "{}", "ttl_s": "60"}
REFUSED = {403, 404, 422}
HARMLESS = ("/sign-in", "/sign-out", "/routes/check", "/routes/dry-run")
"""What changes nothing of the installation: signing in and out, and trying a route."""


@pytest.fixture
async def site(database: str, nats: NatsServer) -> AsyncIterator[Site]:
    """A browser that is not signed in."""
    async with console(database, nats) as made:
        yield made


async def test_every_page_and_every_form_wants_somebody_who_is_signed_in(site: Site) -> None:
    for path in [*pages(), *(f"/events?topic={topic}" for topic in STREAMED)]:
        answer = await site.client.get(path, headers={"accept": "text/html"})
        assert answer.status_code == 303, path
        assert answer.headers["location"].startswith("/sign-in"), path
        asked_by_a_script = await site.client.get(path, headers={"accept": "text/event-stream"})
        assert asked_by_a_script.status_code == 401, path
    await site.get("/sign-in")
    for path in addresses("POST"):
        if path != "/sign-in":
            assert (await site.post(path, {})).status_code == 401, path


async def test_nothing_is_changed_by_another_method_than_post(site: Site) -> None:
    for method in ("PUT", "PATCH", "DELETE"):
        assert addresses(method) == []
    await site.sign_in(site.operator)
    for path in set(addresses("POST")) - set(addresses("GET")):
        assert (await site.get(path)).status_code in {404, 405, 422}, path


async def test_every_form_wants_its_token_and_a_page_of_ours(site: Site) -> None:
    await site.sign_in(site.operator)
    for path in addresses("POST"):
        assert (await site.post(path, {"action": "x"}, token="")).status_code == 403, path
        for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
            form = {"form_token": site.token, "action": "x"}
            answer = await site.client.post(path, data=form, headers=headers)
            assert answer.status_code == 403, (path, headers)
    assert (await site.get("/devices")).status_code == 200


async def test_each_way_in_is_one_and_a_wrong_proof_is_none(site: Site) -> None:
    await SessionStore(site.pool).add_link(LINK, key_secret=site.operator, life_s=60)
    for proof in ({"key": site.operator}, {"account": "ada", "password": PASSWORD}, {"link": LINK}):
        browser = site.another()
        await browser.get("/sign-in")
        assert (await browser.post("/sign-in", proof)).status_code == 303
        assert (await browser.get("/devices")).status_code == 200
    for proof in (
        {"key": "pulsekey_" + "A" * 43},
        {"account": "ada", "password": PASSWORD + "!"},
        {"account": "nobody", "password": PASSWORD},
        {"link": LINK},
    ):
        browser = site.another()
        await browser.get("/sign-in")
        assert (await browser.post("/sign-in", proof)).status_code == 401
        assert (await browser.get("/devices")).status_code == 303


async def test_a_link_that_is_only_looked_at_is_not_used_up(site: Site) -> None:
    await SessionStore(site.pool).add_link(LINK, key_secret=site.operator, life_s=60)
    for _ in range(3):
        assert (await site.get(f"/sign-in/link?token={LINK}")).status_code == 200
    assert (await site.post("/sign-in", {"link": LINK})).status_code == 303


async def test_a_link_whose_time_is_over_signs_nobody_in(site: Site) -> None:
    await SessionStore(site.pool).add_link(LINK, key_secret=site.operator, life_s=60)
    async with transaction(site.pool) as connection:
        changed = await connection.execute("UPDATE console_links SET expires_at = now() - interval '1 second'")
    assert changed == "UPDATE 1"
    await site.get("/sign-in")
    answer = await site.post("/sign-in", {"link": LINK})
    assert answer.status_code == 401
    assert "its time is over" in answer.text


async def test_of_two_browsers_with_one_link_one_is_signed_in(site: Site) -> None:
    await SessionStore(site.pool).add_link(LINK, key_secret=site.operator, life_s=60)
    browsers = [site.another() for _ in range(4)]
    for browser in browsers:
        await browser.get("/sign-in")
    answers = await asyncio.gather(*(browser.post("/sign-in", {"link": LINK}) for browser in browsers))
    assert sorted(answer.status_code for answer in answers) == [303, 401, 401, 401]


async def test_a_cookie_from_before_signing_in_is_worth_nothing_afterwards(site: Site) -> None:
    """Session fixation: whoever planted the cookie would be signed in with it."""
    await site.get("/sign-in")
    planted = site.client.cookies["pulse"]
    await site.post("/sign-in", {"key": site.operator})
    assert site.client.cookies["pulse"] != planted
    thief = site.another()
    thief.client.cookies.set("pulse", planted)
    assert (await thief.get("/devices")).status_code == 303


async def test_the_cookie_is_kept_from_scripts_and_other_sites(database: str, nats: NatsServer) -> None:
    async with console(database, nats) as site:
        cookie = (await site.get("/sign-in")).headers["set-cookie"].lower()
        assert {"httponly", "samesite=strict", "path=/"} <= {part.strip() for part in cookie.split(";")}
        assert "secure" not in cookie


async def test_behind_https_the_cookie_goes_nowhere_else(database: str, nats: NatsServer) -> None:
    async with console(database, nats, ui_public_url="https://pulse.example") as site:
        answer = await site.get("/sign-in")
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-pulse=")
        assert "secure" in cookie.lower()
        assert "max-age" in answer.headers["strict-transport-security"]


@pytest.mark.parametrize("token", ["", "x" * 43, "ü"])
async def test_a_form_without_its_own_token_does_nothing(site: Site, token: str) -> None:
    await site.sign_in(site.operator)
    answer = await site.post("/settings/tenants", {"action": "create", "tenant_id": "made"}, token=token)
    assert answer.status_code == 403
    assert "made" not in (await site.get("/settings")).text


async def test_the_token_of_one_session_is_none_of_another(site: Site) -> None:
    await site.sign_in(site.operator)
    theirs = site.another()
    await theirs.sign_in(site.operator)
    fields = {"action": "create", "tenant_id": "made"}
    assert (await site.post("/settings/tenants", fields, token=theirs.token)).status_code == 403
    assert (await site.post("/settings/tenants", fields)).status_code == 303


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}])
async def test_a_form_of_another_site_does_nothing(site: Site, headers: dict[str, str]) -> None:
    await site.sign_in(site.operator)
    form = {"form_token": site.token, "action": "create", "tenant_id": "made"}
    assert (await site.client.post("/settings/tenants", data=form, headers=headers)).status_code == 403


async def test_every_form_of_every_page_has_a_token(site: Site) -> None:
    await site.sign_in(site.operator)
    for path in ("/sign-in", "/", *PAGES, "/streams", "/settings/keys", "/devices/acme/boiler"):
        text = (await site.get(path)).text
        assert text.count('method="post"') == text.count('name="form_token"'), path


async def test_no_answer_lets_anything_inline_or_foreign_run(site: Site) -> None:
    await site.sign_in(site.operator)
    for path in ("/", *PAGES, "/streams", "/settings/keys", "/devices/acme/boiler", "/nothing", "/static/nothing.js"):
        answer = await site.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "<style" not in answer.text
        assert ' style="' not in answer.text
        assert "http://" not in answer.text.replace(ORIGIN, "").replace("http://127.0.0.1", "")


async def test_guessing_a_password_ends_after_a_few_tries_for_the_right_one_too(site: Site) -> None:
    await site.get("/sign-in")
    for _ in range(ATTEMPTS_BURST):
        assert (await site.post("/sign-in", {"account": "ada", "password": "wrong"})).status_code == 401
    refused = await site.post("/sign-in", {"account": "ada", "password": PASSWORD})
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert (await site.post("/sign-in", {"account": "tim", "password": PASSWORD})).status_code == 303


async def test_signing_out_ends_the_session_for_whoever_kept_the_cookie(site: Site) -> None:
    await site.sign_in(site.operator)
    kept = site.client.cookies["pulse"]
    assert (await site.post("/sign-out", {})).status_code == 303
    thief = site.another()
    thief.client.cookies.set("pulse", kept)
    assert (await thief.get("/devices")).status_code == 303


async def test_a_revoked_key_and_an_ended_account_sign_in_no_more(site: Site) -> None:
    await AccountStore(site.pool).end("ada")
    await site.get("/sign-in")
    assert (await site.post("/sign-in", {"account": "ada", "password": PASSWORD})).status_code == 401
    keys = {key.name: key.key_id for key in await KeyStore(site.pool).keys()}
    await KeyStore(site.pool).revoke(keys["acme's"])
    assert (await site.post("/sign-in", {"key": site.acme})).status_code == 401


@pytest.mark.parametrize("typed", ["9" * 5000, "²", "-1"])
async def test_a_field_of_which_no_number_is_made_is_no_bug(site: Site, typed: str) -> None:
    """A page that meets a bug ends the role, for everybody."""
    await site.sign_in(site.operator)
    await site.get("/settings/keys")
    assert (await site.post("/settings/keys", {"action": "create", "name": "k", "days": typed})).status_code == 200
    assert (await site.post("/settings/keys", {"action": "revoke", "key_id": typed})).status_code in (404, 422)
    assert (await site.post("/routes/dry-run", {"tenant_id": "acme", "messages": typed})).status_code == 200


async def test_another_password_ends_the_sessions_of_the_old_one(site: Site) -> None:
    await site.get("/sign-in")
    await site.post("/sign-in", {"account": "ada", "password": PASSWORD})
    await AccountStore(site.pool).set_password("ada", "$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaA")
    async with transaction(site.pool) as connection:
        assert await connection.fetchval("SELECT count(*) FROM console_sessions") == 0


async def test_a_session_ends_with_its_time(database: str, nats: NatsServer) -> None:
    async with console(database, nats, ui_session_s_max=3600, ui_session_idle_s_max=600) as site:
        await site.sign_in(site.operator)
        async with transaction(site.pool) as connection:
            ends_in = await connection.fetchval("SELECT expires_at - now() FROM console_sessions")
            assert timedelta(minutes=59) < ends_in <= timedelta(hours=1)


@pytest.mark.parametrize(("idle_minutes", "lasts"), [(9, True), (11, False)])
async def test_a_session_that_nobody_uses_ends_for_good_before_its_time(
    site: Site, idle_minutes: int, lasts: bool
) -> None:
    await site.sign_in(site.operator)
    cookie = site.client.cookies["pulse"]
    async with transaction(site.pool) as connection:
        await connection.execute(
            "UPDATE console_sessions SET used_at = now() - make_interval(mins => $1)", idle_minutes
        )
    for _ in range(2):
        # Of a process that has not seen it before.
        sign_in = SignIn(
            keys=KeyStore(site.pool),
            accounts=AccountStore(site.pool),
            sessions=SessionStore(site.pool),
            passwords=Argon2Passwords(),
            life=SessionLife(life_s=3600, idle_s=600),
        )
        assert (await sign_in.who(cookie) is not None) is lasts


@pytest.mark.parametrize("path", OPERATORS_ALONE)
async def test_a_tenants_key_sees_nothing_of_the_installation(site: Site, path: str) -> None:
    await site.sign_in(site.acme)
    assert (await site.get(path)).status_code == 403


async def test_a_tenants_key_sees_its_tenant_alone(site: Site) -> None:
    await site.sign_in(site.acme)
    home = await site.get("/")
    assert home.headers["location"] == "/devices"
    devices = (await site.get("/devices")).text
    assert "/devices/acme/boiler" in devices
    assert "/devices/other/" not in devices
    assert "/devices/other/" not in (await site.get("/devices?tenant=other")).text
    assert (await site.get("/devices/other/boiler")).status_code == 403
    assert (await site.get("/devices/other/boiler/series?metric=t")).status_code == 403
    assert (await site.get("/events?topic=tail&stream=TELEMETRY&tenant=other")).status_code == 403
    assert (await site.get("/events?topic=device&tenant=other&device=boiler")).status_code == 403
    assert (await site.get("/settings/log?tenant=other")).status_code == 403
    added = await site.post("/devices/add", {"tenant_id": "other", "device_id": "mine"})
    assert added.status_code == 403
    assert (await site.post("/settings/tenants", {"action": "create", "tenant_id": "mine"})).status_code == 403


async def test_no_page_and_no_form_of_another_tenant_is_a_tenants(site: Site) -> None:
    await site.sign_in(site.acme)
    of_other = [path for path in addresses("GET", tenant="other") if "/other/" in path]
    topics = ("tail&stream=TELEMETRY", "device&device=boiler", "route&route=hook")
    for path in [*of_other, *(f"/events?topic={topic}&tenant=other" for topic in topics)]:
        answer = await site.get(path)
        assert answer.status_code == 403, path
    before = await changes(site)
    for path in addresses("POST", tenant="other"):
        if "/other/" in path:
            assert (await site.post(path, {**FIELDS, "tenant_id": "other"})).status_code in REFUSED, path
    assert await changes(site) == before


async def test_a_dead_letter_of_another_tenant_is_not_there(site: Site) -> None:
    mine, theirs = [await dead_letter(site, tenant, at) for at, tenant in enumerate(("acme", "other"), 1)]
    await site.sign_in(site.acme)
    assert (await site.get(f"/dead-letters/{mine}")).status_code == 200
    assert (await site.get(f"/dead-letters/{theirs}")).status_code == 404
    listed = (await site.get("/dead-letters?tenant=other")).text
    assert f'/dead-letters/{theirs}"' not in listed
    assert (await site.post(f"/dead-letters/{theirs}", {"action": "replay"})).status_code in {403, 404}


async def dead_letter(site: Site, tenant: str, at: int) -> int:
    """One whose subject, error and body are hostile; its id."""
    async with transaction(site.pool) as connection:
        found = await connection.fetchval(
            """
            INSERT INTO dead_letters (stream, position, subject, tenant_id, device_id, reason, error, headers, body,
                                      attempts, published_at)
            VALUES ('TELEMETRY', $1, $2, $3, 'boiler', 'invalid_payload', $4, $5, $5, 1, now()) RETURNING id
            """,
            at, f"telemetry.{tenant}", tenant, HOSTILE, HOSTILE.encode(),
        )  # fmt: skip
    return int(found)


async def test_a_hostile_dead_letter_and_hostile_words_in_an_address_are_text(site: Site) -> None:
    letter = await dead_letter(site, "acme", 1)
    await site.sign_in(site.operator)
    words = urlencode({"text": HOSTILE, "done": HOSTILE, "since": HOSTILE, "range": HOSTILE[:8], "next": HOSTILE})
    for path in (f"/dead-letters/{letter}", "/dead-letters", f"/streams/TELEMETRY?{words}", *pages()):
        separator = "&" if "?" in path else "?"
        for asked in (path, f"{path}{separator}{words}"):
            answer = await site.get(asked)
            if answer.headers["content-type"].startswith("text/html"):
                assert "<img" not in answer.text.replace('<img src="/static', ""), asked
                assert 'onerror=alert(1)>"' not in answer.text, asked


async def test_what_is_answered_as_json_is_not_taken_for_a_page(site: Site) -> None:
    await site.sign_in(site.operator)
    answer = await site.get(f"/devices/acme/boiler/series?{urlencode({'metric': HOSTILE})}")
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_a_key_that_reads_changes_nothing(site: Site) -> None:
    await site.sign_in(site.acme_reader)
    assert "Add a device" not in (await site.get("/devices")).text
    assert (await site.post("/devices/add", {"tenant_id": "acme", "device_id": "new"})).status_code == 403
    change = await site.post("/devices/acme/boiler/change", {"action": "disable"})
    assert change.status_code == 403
    before = await changes(site)
    for path in addresses("POST"):
        if path not in HARMLESS:
            assert (await site.post(path, {**FIELDS, "tenant_id": "acme"})).status_code in REFUSED, path
    assert await changes(site) == before


async def changes(site: Site) -> int:
    """How many there have been."""
    async with transaction(site.pool) as connection:
        return int(await connection.fetchval("SELECT count(*) FROM audit_log"))


async def test_who_signed_in_and_out_stands_in_the_audit_log(site: Site) -> None:
    await site.sign_in(site.operator)
    await site.post("/sign-out", {})
    await site.sign_in(site.operator)
    log = (await site.get("/settings/log")).text
    assert log.count("session.begin") == 2
    assert log.count("session.end") == 1
    assert site.operator not in log


@pytest.mark.parametrize(
    "target", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "/\t/evil.example"]
)
async def test_signing_in_leads_nowhere_else(site: Site, target: str) -> None:
    await site.get("/sign-in")
    answer = await site.post("/sign-in", {"key": site.operator, "next": target})
    assert answer.headers["location"] == "/"


async def test_a_form_beyond_its_bound_is_refused(site: Site) -> None:
    await site.sign_in(site.operator)
    answer = await site.post("/settings/tenants", {"name": "x" * 300_000})
    assert answer.status_code == 413


async def test_what_a_device_says_is_text_on_a_page(site: Site) -> None:
    await site.sign_in(site.operator)
    name = "<img src=x onerror=alert(1)>\"'"
    await site.post("/devices/acme/boiler/change", {"action": "rename", "name": name})
    assert "<img src=x" not in (await site.get("/devices/acme/boiler")).text
    assert "&lt;img src=x" in (await site.get("/devices")).text
