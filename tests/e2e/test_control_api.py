"""The control API and `pulse key` under `pulse up`, over real HTTP."""

from __future__ import annotations

import csv
import io
import json
import os
import pwd
import stat
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from pulse_up import Instance, wait_for


@pytest.fixture
def http(running: Instance) -> Iterator[httpx.Client]:
    """A client with the operator's key that `pulse up` made."""
    headers = {"Authorization": f"Bearer {running.operator_key}"}
    with httpx.Client(base_url=f"{running.ui_url}/api/v1", headers=headers, timeout=60, trust_env=False) as client:
        yield client


def test_pulse_up_says_where_the_control_api_is_and_keeps_its_key_private(running: Instance) -> None:
    assert f"{running.ui_url}/api/v1" in running.output
    path = running.data_dir / "operator-key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert running.operator_key not in running.output
    logs = (running.data_dir / "log").glob("*.log")
    assert not [log.name for log in logs if running.operator_key in log.read_text("utf-8", "replace")]


def test_a_reading_that_was_sent_is_found_by_its_tenants_key(running: Instance, http: httpx.Client) -> None:
    made = json.loads(running.pulse("key", "add", "demo's", "--tenant", "demo", "--json", check=True).stdout)
    mine = {"Authorization": f"Bearer {made['secret']}"}
    path = "/tenants/demo/devices/demo-1"
    status, _ = running.send({"control_api": 21.5})
    assert status == 202

    def stored() -> bool:
        reading = http.get(f"{path}/latest", headers=mine).raise_for_status().json()["reading"]
        return reading is not None and reading["metrics"] == {"control_api": 21.5}

    wait_for(stored, "the reading is the latest one")
    answer = http.get(f"{path}/telemetry", params={"metrics": "control_api", "format": "csv"}, headers=mine)
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["control_api"] for row in rows] == ["21.5"]
    assert answer.headers["transfer-encoding"] == "chunked"
    assert http.get("/audit", headers=mine).status_code == 403
    assert http.get("/audit").json()["ok"] is True
    assert http.get("/streams").json()["as_declared"] is True

    listed = running.pulse("key", "list", check=True).stdout
    assert "demo's" in listed
    assert made["secret"] not in listed
    running.pulse("key", "revoke", str(made["key"]["key_id"]), check=True)
    assert http.get(f"{path}/latest", headers=mine).status_code == 401
    user = pwd.getpwuid(os.getuid()).pw_name
    log = http.get("/audit-log").json()["changes"]
    assert [(change["actor"], change["action"]) for change in log[:2]] == [
        (user, "key.revoke"),
        (user, "key.create"),
    ]


def test_a_device_made_here_speaks_at_the_gateway_and_is_silenced_within_a_second(
    running: Instance, http: httpx.Client
) -> None:
    token = http.post("/tenants/demo/devices", json={"device_id": "kettle"}).raise_for_status().json()["token"]

    def says() -> int:
        return httpx.post(
            f"{running.gateway_url}/ingest/v1/tenant/demo/device/kettle/telemetry",
            json={"metrics": {"t": 1}},
            headers={"Authorization": f"Bearer {token}"},
            trust_env=False,
        ).status_code

    wait_for(lambda: says() == 202, "the gateway lets the new device in")
    assert http.post("/tenants/demo/devices/kettle/disable").json()["projected"] is True
    wait_for(lambda: says() in {401, 403}, "the gateway refuses the disabled device")


@pytest.fixture
def device(running: Instance, http: httpx.Client) -> Iterator[httpx.Client]:
    """A client of the gateway as a device of the test's own, `shadowed`, made through the control API."""
    made = http.post("/tenants/demo/devices", json={"device_id": "shadowed"})
    if made.status_code == 409:
        made = http.post("/tenants/demo/devices/shadowed/rotate", json={"overlap_s": 0})
    headers = {"Authorization": f"Bearer {made.raise_for_status().json()['token']}"}
    with httpx.Client(base_url=running.gateway_url, headers=headers, timeout=40, trust_env=False) as client:
        yield client


DEVICE, INGEST = "/device/v1/tenant/demo/device/shadowed", "/ingest/v1/tenant/demo/device/shadowed"


def test_what_is_desired_here_is_heard_by_a_device_over_http_and_its_report_is_seen_here(
    http: httpx.Client, device: httpx.Client
) -> None:
    path = "/tenants/demo/devices/shadowed/shadow"
    made = http.patch(path, json={"desired": {"power": "on", "light": {"red": 1}}})
    assert (made.status_code, made.headers["etag"]) == (200, '"1"')

    def heard() -> bool:
        return device.get(f"{DEVICE}/shadow").status_code == 200

    wait_for(heard, "the gateway lets the new device in, and the shadow role answers")
    document = device.get(f"{DEVICE}/shadow").json()
    assert document["state"]["delta"] == {"power": "on", "light": {"red": 1}}
    body = {"state": {"reported": document["state"]["delta"]}, "version": document["version"]}
    assert device.post(f"{INGEST}/shadow", json=body).status_code == 202
    wait_for(lambda: http.get(path).json()["version"] == 2, "the report is taken in")
    shown = http.get(path).json()
    assert (shown["state"]["reported"], shown["state"]["delta"]) == ({"power": "on", "light": {"red": 1}}, {})
    assert [each["who"] for each in http.get(f"{path}/changes").json()["changes"]] == ["device", "pulse up"]
    late = http.patch(path, json={"desired": {"power": "off"}}, headers={"If-Match": '"1"'})
    assert (late.status_code, late.json()["version"]) == (409, 2)


def test_a_command_that_is_waited_for_reaches_a_device_that_polls_and_its_answer_comes_back(
    running: Instance, device: httpx.Client
) -> None:
    arguments = running.command("command", "send", "demo", "shadowed", "reboot", '{"delay_s":5}', "--wait", "--json")
    with subprocess.Popen(
        arguments, cwd=running.folder, env=dict(running.environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as sending:
        heard: list[dict[str, object]] = []

        def told() -> bool:
            answer = device.get(f"{DEVICE}/commands", params={"wait": 5})
            heard.extend(answer.json()["commands"] if answer.status_code == 200 else [])
            return bool(heard)

        wait_for(told, "the device hears its command")
        assert (heard[0]["name"], heard[0]["payload"]) == ("reboot", {"delay_s": 5})
        for state in ("acknowledged", "succeeded"):
            body = {"commandId": heard[0]["commandId"], "state": state}
            assert device.post(f"{INGEST}/commands-ack", json=body).status_code == 202
        out, err = sending.communicate(timeout=60)
    assert sending.returncode == 0, err.decode()
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["command_id"] for line in lines} == {heard[0]["commandId"]}
    assert (lines[0]["state"], lines[-1]["state"], lines[-1]["who"]) == ("queued", "succeeded", "device")


def test_a_body_over_its_bound_is_refused_before_it_is_read_whole(running: Instance, http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 1024

    answer = http.post("/tenants", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["limit"] == "ui_body_bytes_max"


def test_what_a_key_command_cannot_do_is_one_line(running: Instance) -> None:
    for arguments, exit_code, said in (
        (("key", "add", "x"), 2, "--tenant TENANT_ID, or --operator"),
        (("key", "add", "x", "--operator", "--tenant", "demo"), 2, "--tenant TENANT_ID, or --operator"),
        (("key", "add", "x", "--tenant", "nobody"), 1, "there is no tenant 'nobody'"),
        (("key", "revoke", "999999"), 1, "pulse key list"),
    ):
        done = running.pulse(*arguments)
        assert (done.returncode, said in done.stderr) == (exit_code, True), done.stderr
        assert "Traceback" not in done.stderr
