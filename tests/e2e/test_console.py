"""The console in a real Chromium, over the real command: what somebody does who has just started it.

Everything that a page says on its console, and every request that leaves the origin, fails the test.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import urlsplit

import asyncpg
import httpx
import nats
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from pulse_up import Instance, wait_for

WAIT_MS = 30_000
"""Of one condition; a machine that is busy elsewhere is waited for."""
BAD = {"error", "warning"}
HOME_BYTES_MAX = 200 * 1024
SEVERAL = re.compile(r"([2-9]|\d\d+) dead letters")
MANY = 20_000
"""Dead letters: a replay of them takes at least 40 s."""
PAGES = (
    "/", "/devices", "/devices/add", "/devices/import", "/devices/demo/demo-1", "/live", "/streams",
    "/streams/TELEMETRY", "/routes", "/routes/add", "/routes/demo/looked-at", "/routes/demo/looked-at/edit",
    "/routes/demo/looked-at/delete", "/dead-letters", "/settings", "/settings/keys", "/settings/log",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield made
        made.close()


class Watched:
    """A browser of its own, signed in by the link; what its pages complain of, and where they go."""

    def __init__(self, browser: Browser, instance: Instance, **options: str) -> None:
        self.origin = instance.ui_url
        self.complaints: list[str] = []
        self.context: BrowserContext = browser.new_context(**options)  # type: ignore[arg-type]
        self.context.set_default_timeout(WAIT_MS)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type in BAD else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url))
        link = instance.pulse("account", "link", check=True).stdout.strip()
        self.page.goto(link)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.wait_for_url(f"{self.origin}/")

    def open(self, path: str) -> None:
        """Go to a page; its stream of events never ends, so only its own loading is waited for."""
        self.page.goto(self.origin + path, wait_until="load")

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.complaints.append(f"a request left the origin: {url}")


@pytest.fixture
def watched(browser: Browser, running: Instance) -> Iterator[Watched]:
    """Signed in; whatever its pages complained of fails the test."""
    made = Watched(browser, running)
    yield made
    made.context.close()
    assert made.complaints == []


def test_pulse_up_prints_a_link_that_signs_in_once(browser: Browser, running: Instance) -> None:
    found = re.search(r"console +(http\S+/sign-in/link\?token=\S+)", running.output)
    assert found, running.output
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(found[1])
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(f"{running.ui_url}/")
    other = browser.new_context().new_page()
    other.goto(found[1])
    other.get_by_role("button", name="Sign in").click()
    expect(other.get_by_role("alert")).to_contain_text("was used before", timeout=WAIT_MS)
    context.close()
    other.context.close()


def test_a_device_is_added_speaks_and_is_seen_on_the_map_in_the_tail_and_in_the_chart(
    watched: Watched, running: Instance
) -> None:
    page = watched.page
    watched.open("/devices")
    page.get_by_role("link", name="Add a device").click()
    page.get_by_label("Tenant").select_option("demo")
    page.get_by_label("Device id").fill("kitchen")
    page.get_by_label("Name").fill("Kitchen")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("#curl")).to_contain_text("Authorization: Bearer pulse_")
    expect(page.locator("#mosquitto")).to_contain_text("-u demo/kitchen")
    token = page.locator("#token").inner_text()

    tail = watched.context.new_page()
    tail.goto(f"{watched.origin}/live?stream=TELEMETRY&tenant=demo&device=kitchen")
    expect(tail.locator("[data-live-state]")).to_have_text("waiting for messages", timeout=WAIT_MS)
    home = watched.context.new_page()
    home.goto(f"{watched.origin}/")
    before = home.locator("[data-live='audit.accepted']").inner_text()
    send(running, token, 21.5)
    expect(tail.locator("[data-tail] p")).to_contain_text("temperature 21.5", timeout=WAIT_MS)
    expect(home.locator("[data-live='audit.accepted']")).not_to_have_text(before, timeout=WAIT_MS)
    expect(home.locator("[data-verdict]")).to_have_text("nothing is missing", timeout=WAIT_MS)
    expect(home.locator("g[data-stage='TELEMETRY'] .title")).to_have_text("TELEMETRY")

    page.get_by_role("link", name="Watch it arrive").click()
    expect(page.locator("figure[data-metric=temperature] .u-over")).to_be_visible(timeout=WAIT_MS)
    expect(page.locator("figure[data-metric=temperature] .value")).to_have_text("21.5")
    send(running, token, 22.5)
    expect(page.locator("[data-tail] p").last).to_contain_text("22.5", timeout=WAIT_MS)
    expect(page.locator("figure[data-metric=temperature] .value")).to_have_text("22.5", timeout=WAIT_MS)


def test_searching_devices_changes_the_list_and_the_address(watched: Watched) -> None:
    watched.open("/devices")
    watched.page.get_by_role("searchbox").fill("no such device")
    expect(watched.page.get_by_role("heading", name="Nothing matches")).to_be_visible(timeout=WAIT_MS)
    assert "text=no%20such%20device" in watched.page.url
    watched.page.get_by_role("searchbox").fill("DEMO-1")
    expect(watched.page.get_by_role("link", name="demo/demo-1")).to_be_visible(timeout=WAIT_MS)


def test_a_shadow_is_edited_while_its_device_reports_and_both_are_seen(watched: Watched, running: Instance) -> None:
    page = watched.page
    with a_device(running, "shadowed-here") as device:
        watched.open("/devices/demo/shadowed-here")
        page.get_by_text("Say what is desired").click()
        page.get_by_label("Desired, as JSON").fill('{"mode": "eco", "target": 21}')
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_label("What it has yet to do")).to_contain_text('"target": 21', timeout=WAIT_MS)

        page.get_by_text("Change what is desired").click()
        page.get_by_label("Desired, as JSON").fill('{"mode": "night", "target": 17}')
        report = {"state": {"reported": {"mode": "eco", "target": 21}}}
        wait_for(lambda: device.post("shadow", json=report).status_code == 202, "the gateway lets the new device in")
        expect(page.get_by_label("What it reports")).to_contain_text('"mode": "eco"', timeout=WAIT_MS)
        expect(page.get_by_text("nothing is left to do")).to_be_visible()
        expect(page.get_by_label("Desired, as JSON")).to_have_value('{"mode": "night", "target": 17}')

        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("heading", name="The shadow has changed meanwhile")).to_be_visible(timeout=WAIT_MS)
        expect(page.get_by_label("What is desired now")).to_contain_text('"mode": "eco"')
        expect(page.get_by_role("textbox", name="Yours")).to_have_value('{"mode": "night", "target": 17}')
        expect(page.get_by_role("cell", name="device", exact=True)).to_be_visible()
        assert Axe().run(page).violations_count == 0
        page.get_by_role("button", name="Save mine over it").click()
        expect(page.get_by_label("What it has yet to do")).to_contain_text('"mode": "night"', timeout=WAIT_MS)
    # Chromium complains of the answer that told of the conflict.
    watched.complaints[:] = [said for said in watched.complaints if "409 (Conflict)" not in said]


def test_a_command_is_sent_and_its_states_move_on_the_open_page(watched: Watched, running: Instance) -> None:
    page = watched.page
    with a_device(running, "commanded-here") as device:
        watched.open("/devices/demo/commanded-here")
        page.get_by_label("Command", exact=True).fill("reboot")
        page.get_by_label("Payload, as JSON").fill('{"delay_s": 5}')
        page.get_by_role("button", name="Send").click()
        row = page.get_by_role("row", name="reboot")
        expect(row).to_contain_text(re.compile("queued|sent"), timeout=WAIT_MS)
        opened = page.evaluate("performance.timeOrigin")
        heard: list[dict[str, object]] = []

        def told() -> bool:
            answer = device.get(f"{running.gateway_url}/device/v1/tenant/demo/device/commanded-here/commands?wait=5")
            heard.extend(answer.json()["commands"] if answer.status_code == 200 else [])
            return bool(heard)

        wait_for(told, "the device hears its command")
        assert (heard[0]["name"], heard[0]["payload"]) == ("reboot", {"delay_s": 5})
        for said in ({"state": "acknowledged"}, {"state": "succeeded", "result": {"took_s": 4}}):
            answer = device.post("commands-ack", json={"commandId": heard[0]["commandId"], **said})
            assert answer.status_code == 202
            expect(row).to_contain_text(said["state"], timeout=WAIT_MS)  # type: ignore[arg-type]
        expect(row).to_contain_text('{"took_s":4}')
        assert page.evaluate("performance.timeOrigin") == opened
        row.get_by_role("link", name="reboot").click()
        states = page.get_by_role("region", name="States").get_by_role("row")
        expect(states.last).to_contain_text("succeeded")
        assert Axe().run(page).violations_count == 0

        watched.open("/devices/demo/commanded-here")
        page.get_by_label("Command", exact=True).fill("forget-me")
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Cancel forget-me").click()
        expect(page.get_by_role("row", name="forget-me")).to_contain_text("cancelled", timeout=WAIT_MS)


def test_a_route_is_tried_and_made_its_endpoint_breaks_and_what_died_is_mended_and_replayed(
    watched: Watched, running: Instance, endpoint: Endpoint
) -> None:
    page = watched.page
    with a_device(running, "routed-here") as device:

        def reads(temperature: float) -> bool:
            return device.post("telemetry", json={"metrics": {"temperature": temperature}}).status_code == 202

        wait_for(lambda: reads(31.5), "the gateway lets the new device in")
        watched.open("/routes/add?tenant=demo")
        page.get_by_label("Route id").fill("too-hot")
        page.get_by_label("Name").fill("Too hot")
        page.get_by_label("Devices").fill("routed-here")
        page.get_by_label("Condition").fill("metrics.temperature >")
        expect(page.locator("#expression-said .place")).to_contain_text("metrics.temperature >", timeout=WAIT_MS)
        page.get_by_label("Condition").fill("metrics.temperature > 30.0")
        expect(page.locator("#expression-said")).to_have_text("It reads.", timeout=WAIT_MS)
        page.get_by_label("Body").fill('{"device": "${device.id}", "temperature": "${metrics.temperature}"}')
        expect(page.locator("#template-said")).to_have_text("It reads.", timeout=WAIT_MS)
        page.get_by_label("URL").fill(endpoint.url)

        def tried() -> bool:
            with page.expect_response("**/routes/dry-run"):
                page.get_by_role("button", name="Try it").click()
            return "1 of the last 1 messages would be sent" in page.locator("#dry-run").inner_text()

        wait_for(tried, "the reading is stored, and the draft is tried on it")
        expect(page.get_by_label("What would be sent for routed-here")).to_contain_text('"temperature": 31.5')
        assert endpoint.bodies == []
        assert Axe().run(page).violations_count == 0
        page.get_by_role("button", name="Make the route").click()
        expect(page.get_by_role("heading", name="Too hot is made")).to_be_visible(timeout=WAIT_MS)
        expect(page.locator("#secret")).to_contain_text("whsec_")
        assert Axe().run(page).violations_count == 0
        page.get_by_role("link", name="Watch it deliver").click()
        opened = page.evaluate("performance.timeOrigin")

        def heard() -> bool:
            assert reads(32.5)
            return endpoint.asked.wait(2)

        wait_for(heard, "the workers know the route")
        attempts = page.get_by_role("region", name="The newest attempts")
        expect(attempts.get_by_role("row", name="delivered").first).to_contain_text("200", timeout=WAIT_MS)

        page.get_by_role("button", name="Send a test now").click()
        expect(page.locator("#trial")).to_contain_text(re.compile("200.*taken", re.DOTALL), timeout=WAIT_MS)
        break_it(watched, endpoint, reads)
        assert page.evaluate("performance.timeOrigin") == opened
        page.get_by_role("link", name=SEVERAL).click()
        expect(page.get_by_role("cell", name="delivery_attempts").first).to_be_visible()
        mend_it(watched, endpoint)
        delete_it(page)


def break_it(watched: Watched, endpoint: Endpoint, reads: Callable[[float], bool]) -> None:
    """The open page of the route tells of what becomes of two readings."""
    page = watched.page
    attempts = page.get_by_role("region", name="The newest attempts")
    endpoint.status = 503
    assert reads(40.5)
    assert reads(41.5)
    expect(attempts.get_by_role("row", name="dead").first).to_contain_text(
        "<b>down for an upgrade</b>", timeout=2 * WAIT_MS
    )
    expect(page.get_by_text("Nothing was delivered since")).to_be_visible(timeout=WAIT_MS)
    expect(page.get_by_role("link", name=SEVERAL)).to_be_visible(timeout=2 * WAIT_MS)
    assert Axe().run(page).violations_count == 0


def mend_it(watched: Watched, endpoint: Endpoint) -> None:
    """One letter is replayed with another body, the others as they are."""
    page = watched.page
    endpoint.status = 200
    mend(page, 40.5, 45.5)
    wait_for(lambda: endpoint.has(45.5), "what was mended is delivered")
    watched.open("/dead-letters?tenant=demo&route=too-hot&state=waiting")
    page.get_by_role("button", name="Replay").click()
    expect(page.get_by_role("status")).to_contain_text("replayed", timeout=WAIT_MS)
    wait_for(lambda: endpoint.has(41.5), "what is replayed is delivered")
    assert not endpoint.has(40.5)
    watched.open("/routes/demo/too-hot")
    expect(page.locator("[data-part=head]")).to_contain_text("delivering", timeout=WAIT_MS)


def delete_it(page: Page) -> None:
    """It asks first."""
    page.get_by_role("link", name="Delete …").click()
    page.get_by_role("link", name="Keep it").click()
    page.get_by_role("link", name="Delete …").click()
    page.get_by_role("button", name="Delete it").click()
    expect(page.get_by_role("status")).to_contain_text("route demo/too-hot is deleted")


def mend(page: Page, temperature: float, mended: float) -> None:
    """Open the listed letters until one is of that reading, and replay it with another."""
    letters = page.locator("td.number a")
    paths = [letters.nth(number).get_attribute("href") for number in range(letters.count())]
    for path in paths:
        page.goto(f"{urlsplit(page.url).scheme}://{urlsplit(page.url).netloc}{path}")
        if f'"temperature": {temperature}' in page.get_by_label("Body", exact=True).inner_text():
            page.get_by_text("Mend and replay").click()
            body = page.get_by_label("The message whole")
            body.fill(body.input_value().replace(str(temperature), str(mended)))
            assert Axe().run(page).violations_count == 0
            page.get_by_role("button", name="Replay with this body").click()
            expect(page.get_by_role("status")).to_contain_text("replayed mended as message", timeout=WAIT_MS)
            return
    pytest.fail(f"no dead letter of {temperature}")


def test_a_replay_of_many_tells_how_far_it_is_and_is_cancelled_on_the_page(watched: Watched, running: Instance) -> None:
    page = watched.page
    with a_device(running, "replayed-here"):
        bury(running, MANY, "replayed-here")
        try:
            watched.open("/dead-letters?device=replayed-here")
            page.get_by_role("button", name=f"Replay {MANY:,}").click()
            told = page.locator("#steps [data-words]")
            expect(told).to_have_text(re.compile(rf"\d of {MANY:,} replayed"), timeout=WAIT_MS)
            page.get_by_role("button", name="Cancel").click()
            expect(told).to_have_text(re.compile(r"Cancelled: .* replayed, the rest is as it was\."), timeout=WAIT_MS)
            page.get_by_role("button", name="Show what is left").click()
            left = page.get_by_role("button", name="that wait")
            expect(left).to_be_visible(timeout=WAIT_MS)
            number = int(left.inner_text().split()[1].replace(",", ""))
            assert 0 < number < MANY
        finally:
            forget_letters(running, "replayed-here")


def test_purging_asks_first(watched: Watched, running: Instance) -> None:
    page = watched.page
    make_a_dead_letter(running, "purged-here")

    def listed() -> bool:
        watched.open("/dead-letters?tenant=purged-here")
        return page.get_by_role("button", name="Purge …").is_visible()

    wait_for(listed, "the dead letter is listed")
    page.get_by_role("button", name="Purge …").click()
    expect(page.get_by_role("heading", name=re.compile("Purge 1 dead letter"))).to_be_visible()
    page.get_by_role("link", name="Keep them").click()
    expect(page.get_by_role("cell", name="invalid_payload")).to_be_visible()
    page.get_by_role("button", name="Purge …").click()
    page.get_by_role("button", name="Purge 1").click()
    expect(page.get_by_role("status")).to_contain_text("1 purged")
    watched.open("/dead-letters?tenant=purged-here")
    expect(page.get_by_role("heading", name="Nothing matches")).to_be_visible()


def test_the_home_page_is_light_and_a_hidden_tab_closes_its_stream(watched: Watched) -> None:
    watched.open("/")
    loaded = watched.page.evaluate(
        "() => performance.getEntries().filter((e) => ['navigation', 'resource'].includes(e.entryType))"
        ".filter((e) => !e.name.includes('/events')).reduce((sum, e) => sum + e.encodedBodySize, 0)"
    )
    assert 0 < loaded < HOME_BYTES_MAX
    expect(watched.page.locator("[data-live-state]")).to_contain_text("live", timeout=WAIT_MS)
    watched.page.evaluate(
        "() => { Object.defineProperty(document, 'hidden', { value: true, configurable: true });"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    assert watched.page.evaluate("source === null")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_an_accessibility_violation(browser: Browser, running: Instance, scheme: str) -> None:
    make_a_route(running, "looked-at")
    watched = Watched(browser, running, color_scheme=scheme)
    found = {}
    for path in (*PAGES, "/nothing"):
        watched.open(path)
        results = Axe().run(watched.page)
        if results.violations_count:
            found[path] = [(each["id"], each["nodes"][0]["html"]) for each in results.response["violations"]]
    watched.context.close()
    signed_out = browser.new_context(color_scheme=scheme).new_page()  # type: ignore[arg-type]
    signed_out.goto(f"{running.ui_url}/sign-in")
    if (results := Axe().run(signed_out)).violations_count:
        found["/sign-in"] = [(each["id"], each["nodes"][0]["html"]) for each in results.response["violations"]]
    signed_out.context.close()
    assert found == {}, json.dumps(found, indent=1)
    assert [said for said in watched.complaints if "404" not in said] == []


def test_no_page_is_wider_than_a_phone(browser: Browser, running: Instance) -> None:
    make_a_route(running, "looked-at")
    watched = Watched(browser, running)
    watched.page.set_viewport_size({"width": 360, "height": 740})
    wide = []
    for path in PAGES:
        watched.open(path)
        if watched.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            wide.append(path)
    watched.context.close()
    assert wide == []


class Endpoint:
    """Somebody's webhook, real: what it was sent, and what it answers from now on."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.status = 200
        self.asked = Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if outer.status == 200:
                    outer.bodies.append(body)
                outer.asked.set()
                answer = b"taken" if outer.status == 200 else b"<b>down for an upgrade</b>"
                self.send_response(outer.status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    def has(self, temperature: float) -> bool:
        return any(body["temperature"] == temperature for body in self.bodies)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """A webhook of the test's own."""
    made = Endpoint()
    thread = Thread(target=made.server.serve_forever, args=(0.05,), name="endpoint")
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def make_a_route(running: Instance, route_id: str) -> None:
    """One that takes nothing, if it is not there yet."""
    asked = {
        "route_id": route_id,
        "enabled": False,
        "match": {"expression": "metrics.temperature > 25.0"},
        "template": '{"t": "${metrics.temperature}"}',
        "destination": {"kind": "webhook", "url": "https://hooks.example.com/", "headers": {"X-Site": "north"}},
    }
    operator = {"Authorization": f"Bearer {running.operator_key}"}
    api = f"{running.ui_url}/api/v1/tenants/demo/routes"
    assert httpx.post(api, json=asked, headers=operator, trust_env=False).status_code in (201, 409)


@contextmanager
def a_device(running: Instance, device_id: str) -> Iterator[httpx.Client]:
    """A device of the test's own, as a client of the gateway."""
    api = f"{running.ui_url}/api/v1/tenants/demo/devices"
    operator = {"Authorization": f"Bearer {running.operator_key}"}
    made = httpx.post(api, json={"device_id": device_id}, headers=operator, trust_env=False)
    headers = {"Authorization": f"Bearer {made.raise_for_status().json()['token']}"}
    base_url = f"{running.gateway_url}/ingest/v1/tenant/demo/device/{device_id}"
    with httpx.Client(base_url=base_url, headers=headers, timeout=40, trust_env=False) as client:
        yield client


def send(running: Instance, token: str, temperature: float) -> None:
    """A reading of the device `kitchen`; the gateway hears of a new device within a second."""

    def accepted() -> bool:
        answer = httpx.post(
            f"{running.gateway_url}/ingest/v1/tenant/demo/device/kitchen/telemetry",
            json={"metrics": {"temperature": temperature}},
            headers={"Authorization": f"Bearer {token}"},
            trust_env=False,
        )
        return answer.status_code == 202

    wait_for(accepted, "the gateway accepts the new device's reading")


def make_a_dead_letter(running: Instance, tenant: str) -> None:
    """A message without a reading, straight into the stream."""
    envelope = {"v": 1, "tenant_id": tenant, "device_id": "d", "msg_type": "telemetry", "ts": 1, "source": "http"}
    body = json.dumps({**envelope, "payload": {}}).encode()

    async def publish() -> None:
        client = await nats.connect(running.nats_url)
        await client.jetstream().publish(f"telemetry.{tenant}", body)
        await client.close()

    run(publish())


def bury(running: Instance, count: int, device_id: str) -> None:
    """So many dead letters that a replay stores, as a worker that was wrong for a while leaves them."""
    body = f'{{"v":1,"tenant_id":"demo","device_id":"{device_id}","msg_type":"telemetry","ts":1,"source":"http",'

    async def insert() -> None:
        connection = await asyncpg.connect(running.database_url)
        await connection.execute(
            "INSERT INTO dead_letters (stream, position, subject, tenant_id, device_id, reason, error, headers, body,"
            " attempts, published_at) SELECT 'TELEMETRY', n, 'telemetry.demo', 'demo', $1, 'invalid_payload', 'wrong',"
            " '', convert_to($2 || '\"payload\":{\"metrics\":{\"n\":' || n || '}}}', 'UTF8'), 1, now()"
            " FROM generate_series(1, $3) AS n",
            device_id,
            body,
            count,
        )
        await connection.close()

    run(insert())


def forget_letters(running: Instance, device_id: str) -> None:
    async def delete() -> None:
        connection = await asyncpg.connect(running.database_url)
        await connection.execute("DELETE FROM dead_letters WHERE device_id = $1", device_id)
        await connection.close()

    run(delete())


def run(done: Coroutine[None, None, None]) -> None:
    """In a thread of its own: Playwright has a loop in this one."""
    with ThreadPoolExecutor() as threads:
        threads.submit(asyncio.run, done).result(60)
