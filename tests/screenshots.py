"""Pictures of the console for README.md and docs/: `python tests/screenshots.py [FOLDER]`, by default docs/images.

A `pulse up` of its own in a temporary folder, on free ports, is given a day of readings of some simulated devices, then
a fleet that sends now, and routes to a server of our own, some of which fail. Needs Chromium (`chromium`), and takes
about two minutes.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import nats
from playwright.sync_api import Page, expect, sync_playwright

import pulse_up
from pulse.domain.simulation import Fleet
from pulse_up import Instance, wait_for
from repository import ROOT

TENANT, THERMOSTAT, METER = "acme", "thermostat-00001", "meter-00002"
DEVICES, RATE = 40, 120
DAY_S, EVERY_S, BATCH = 86_400, 120, 240
REFUSED = 3
WATCHED_S = 45
"""How long the fleet has sent before the first picture: so much of the sparklines is filled."""
WIDTH, HOME_HEIGHT = 1360, 940
PICTURES = (
    ("devices", "/devices?tenant=acme", 760),
    ("device", f"/devices/{TENANT}/{THERMOSTAT}", 1420),
    ("meter", f"/devices/{TENANT}/{METER}", 760),
    ("live", f"/live?stream=TELEMETRY&tenant={TENANT}", 520),
    ("streams", "/streams", 760),
    ("stream", "/streams/TELEMETRY", 760),
    ("routes", "/routes", 520),
    ("route", f"/routes/{TENANT}/billing", 860),
    ("route-edit", f"/routes/{TENANT}/too-warm/edit", 1060),
    ("dead-letters", "/dead-letters", 620),
    ("dead-letter", f"/dead-letters?tenant={TENANT}&route=tickets", 1240),
    ("settings", "/settings", 620),
    ("audit-log", "/settings/log", 760),
)
"""Name, path, height."""


def main() -> None:
    """Make all pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with running() as instance:
        take(instance, folder)


@contextmanager
def running() -> Iterator[Instance]:
    """An instance that has all that there is to see."""
    with tempfile.TemporaryDirectory() as place, destinations() as url:
        instance = pulse_up.prepare(Path(place), settings={"webhook_networks_allowed": "127.0.0.0/8"})
        try:
            instance.start()
            with fleet(instance):
                prepare(instance, url)
                time.sleep(WATCHED_S)
                yield instance
        finally:
            instance.end()


class Destination(BaseHTTPRequestHandler):
    """By its path: takes everything, is down, or takes everything but the first few."""

    protocol_version = "HTTP/1.1"
    refused = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, said = 200, "taken"
        if self.path == "/billing":
            status, said = 503, "down for an upgrade, back at noon"
        elif self.path == "/tickets" and Destination.refused < REFUSED:
            Destination.refused += 1
            status, said = 422, "unknown field: text"
        body = json.dumps({"said": said}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def destinations() -> Iterator[str]:
    """Where routes go."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Destination)
    thread = Thread(target=server.serve_forever, name="destinations")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def fleet(instance: Instance) -> Iterator[None]:
    """Devices that send until the end, and do what they are told."""
    arguments = instance.command(
        "simulate", "--tenant", TENANT, "--devices", str(DEVICES), "--rate", str(RATE), "--duration", "3600",
        "--protocol", "mqtt", "--commands", "--json",
    )  # fmt: skip
    with subprocess.Popen(
        arguments, cwd=instance.folder, env=dict(instance.environment), stdout=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            time.sleep(1)
            process.send_signal(signal.SIGINT)


def prepare(instance: Instance, url: str) -> None:
    """A day of readings, names, a shadow, commands, routes to `url`, and messages that nobody can read."""
    headers = {"Authorization": f"Bearer {instance.operator_key}"}
    path = f"/tenants/{TENANT}/devices"
    with httpx.Client(base_url=f"{instance.ui_url}/api/v1", headers=headers, timeout=30, trust_env=False) as api:
        wait_for(lambda: api.get(f"{path}/{METER}/latest").status_code == 200, "the fleet sends")
        for device_id, name in ((THERMOSTAT, "Boiler room"), (METER, "Main distribution")):
            api.patch(f"{path}/{device_id}", json={"name": name}).raise_for_status()
            token = api.post(f"{path}/{device_id}/rotate", json={"overlap_s": 3600}).raise_for_status().json()["token"]
            backlog(instance, device_id, token)
        said = {"mode": "eco", "target": 20.5, "schedule": {"day": 21, "night": 17}}
        api.patch(f"{path}/{THERMOSTAT}/shadow", json={"desired": said}).raise_for_status()
        for command, payload in (("identify", {"blink_s": 10}), ("set-schedule", {"night": 17}), ("reboot", {})):
            api.post(f"{path}/{THERMOSTAT}/commands", json={"name": command, "payload": payload}).raise_for_status()
        for route in routes(url):
            api.post(f"/tenants/{TENANT}/routes", json=route).raise_for_status()
    asyncio.run(publish(instance, ('{"metrics":{"temperature":"21,5"', '{"metrics":{}}', '{"readings":[21.5,21.7]}')))


def routes(url: str) -> list[dict[str, object]]:
    """One that is well, one whose destination is down, one that refused some, one over MQTT, and one that is off."""
    named = ("too-warm", "Too warm"), ("billing", "Meters to billing"), ("tickets", "A ticket for each alarm")
    warm: dict[str, object] = {"devices": {"prefix": "thermostat-"}, "expression": "metrics.temperature > 19.0"}
    matches: tuple[dict[str, object], ...] = (warm, {"devices": {"ids": [METER]}}, {"devices": {"ids": [THERMOSTAT]}})
    template = '{"text": "${device.id} is at ${metrics.temperature} °C", "at": "${ts}"}'
    webhooks: list[dict[str, object]] = [
        {
            "route_id": route_id,
            "name": name,
            "match": match,
            "template": None if route_id == "billing" else template,
            "rate": {"per_s": 0.3, "burst": 3} if route_id == "billing" else None,
            "destination": {"kind": "webhook", "url": f"{url}/{route_id}", "headers": {"Authorization": "a secret"}},
        }
        for (route_id, name), match in zip(named, matches, strict=True)
    ]
    display = {"kind": "mqtt", "topic": "displays/${device.id}"}
    crm = {"kind": "webhook", "url": "https://crm.example.com/inbound"}
    return [
        *webhooks,
        {"route_id": "displays", "match": {"devices": {"ids": [THERMOSTAT]}}, "destination": display},
        {"route_id": "crm", "name": "To the CRM", "enabled": False, "destination": crm},
    ]


def backlog(instance: Instance, device_id: str, token: str) -> None:
    """A day of readings of `device_id`, as a device sends them that was offline."""
    simulated = Fleet(size=DEVICES, seed=1)
    number = simulated.device_ids().index(device_id)
    now_s = int(time.time())
    moments = range(now_s - DAY_S, now_s - EVERY_S, EVERY_S)
    for start in range(0, len(moments), BATCH):
        rows = [
            {"payload": json.loads(simulated.telemetry(number, seq=at_s, ts_ms=at_s * 1000))}
            for at_s in moments[start : start + BATCH]
        ]

        def accepted(rows: list[dict[str, object]] = rows) -> bool:
            answer = httpx.post(
                f"{instance.gateway_url}/ingest/v1/batch",
                json={"tenant_id": TENANT, "device_id": device_id, "messages": rows},
                headers={"Authorization": f"Bearer {token}"},
                timeout=30,
                trust_env=False,
            )
            return answer.status_code == 202

        wait_for(accepted, f"the gateway accepts the backlog of {device_id}")


async def publish(instance: Instance, bodies: Sequence[str]) -> None:
    """Messages past the gateway, straight into the stream, as nobody should send them."""
    client = await nats.connect(instance.nats_url)
    for body in bodies:
        await client.jetstream().publish(f"telemetry.{TENANT}", body.encode())
    await client.close()


def take(instance: Instance, folder: Path) -> None:
    """All pictures: each page by day, the home page by night too."""
    program = shutil.which("chromium")
    assert program is not None, "chromium is not installed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            context = browser.new_context(color_scheme=scheme, viewport={"width": WIDTH, "height": HOME_HEIGHT})
            page = context.new_page()
            page.goto(instance.pulse("account", "link", check=True).stdout.strip())
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url(f"{instance.ui_url}/")
            expect(page.locator("[data-live-state]")).to_contain_text("live", timeout=30_000)
            page.wait_for_timeout(12_000)
            save(page, folder / f"home{'' if scheme == 'light' else '-dark'}.png")
            if scheme == "light":
                for name, path, height in PICTURES:
                    page.set_viewport_size({"width": WIDTH, "height": height})
                    page.goto(instance.ui_url + path)
                    act(page, name)
                    page.wait_for_timeout(6000 if name in ("live", "device", "meter") else 1000)
                    save(page, folder / f"{name}.png")
            context.close()
        browser.close()


def act(page: Page, name: str) -> None:
    """What somebody does on that page before there is something to see."""
    if name in ("device", "meter"):
        page.get_by_role("button", name="24h").click()
    if name == "route-edit":
        page.get_by_label("Condition").fill("metrics.temperature > 19.0 && device.id != 'thermostat-00003'")
        expect(page.locator("#expression-said")).to_have_text("It reads.")
        page.get_by_role("button", name="Try it").click()
        expect(page.locator("#dry-run")).to_contain_text("would be sent")
    if name == "dead-letter":
        page.locator("td.number a").first.click()
        page.get_by_text("Mend and replay").click()


def save(page: Page, path: Path) -> None:
    """What the window shows, as a PNG."""
    page.screenshot(path=path, animations="disabled")
    sys.stdout.write(f"{path.name}: {path.stat().st_size // 1024} KB\n")


if __name__ == "__main__":
    main()
