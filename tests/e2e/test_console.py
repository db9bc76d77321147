"""The console in a real Chromium, over the real command: what somebody does who has just started it.

Everything that a page says on its console, and every request that leaves the origin, fails the test.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

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
PAGES = (
    "/", "/devices", "/devices/add", "/devices/import", "/devices/demo/demo-1", "/live", "/streams",
    "/streams/TELEMETRY", "/dead-letters", "/settings", "/settings/keys", "/settings/log",
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


def test_purging_asks_first(watched: Watched, running: Instance) -> None:
    page = watched.page
    running.send({"n": 1})
    make_a_dead_letter(running)
    watched.open("/dead-letters")
    page.wait_for_function("() => fetch(location.href).then((a) => a.text()).then((t) => t.includes('Purge'))")
    watched.open("/dead-letters")
    page.get_by_role("button", name="Purge …").click()
    expect(page.get_by_role("heading", name=re.compile("Purge 1 dead letter"))).to_be_visible()
    page.get_by_role("link", name="Keep them").click()
    expect(page.get_by_role("cell", name="invalid_envelope")).to_be_visible()
    page.get_by_role("button", name="Purge …").click()
    page.get_by_role("button", name="Purge 1").click()
    expect(page.get_by_role("heading", name="No dead letters")).to_be_visible()


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
    watched = Watched(browser, running)
    watched.page.set_viewport_size({"width": 360, "height": 740})
    wide = []
    for path in PAGES:
        watched.open(path)
        if watched.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            wide.append(path)
    watched.context.close()
    assert wide == []


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


def make_a_dead_letter(running: Instance) -> None:
    """A message that is no envelope, straight into the stream."""

    async def publish() -> None:
        client = await nats.connect(running.nats_url)
        await client.jetstream().publish("telemetry.demo", b'{"test":1}')
        await client.close()

    # Playwright has a loop of its own in this thread.
    with ThreadPoolExecutor() as threads:
        threads.submit(asyncio.run, publish()).result(30)
