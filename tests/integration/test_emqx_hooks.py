"""What EMQX asks, as compose/emqx/emqx.conf says it asks, and what the role `ui` answers, as compose runs it.

EMQX itself is not here. Its configuration is filled in by its own start.sh, read, and followed to the letter: the URL,
the headers and the body of each question, with the placeholders replaced as EMQX's documentation says.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import hocon
from compose_files import FOLDER, filled_in, services
from compose_server import container_environment
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.process import ManagedProcess
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.registry import RegistryBucket
from pulse.domain.identity import Device, Tenant, TokenDigest, digest, make_token
from pulse.domain.mqtt_access import DOWN, DOWN_NAMED
from pulse.domain.registry import Record, record_key
from pulse.domain.topics import FILTERS
from pulse.runtime.settings import Settings
from pulse.topology.declared import load
from repository import ROOT

EMQX = FOLDER / "emqx"
TOKEN = make_token(secrets.token_bytes(32))
USER = "acme/t-1"
OWN = "tenant/acme/device/t-1/"
RECORDS: Sequence[Record] = [
    Tenant("acme", enabled=True),
    Device("acme", "t-1", True, (TokenDigest(digest(TOKEN)),)),
    Device("acme", "off", False, (TokenDigest(digest(TOKEN)),)),
]
PASSWORDS = {name: f"p{secrets.token_hex(16)}" for name in ("MQTT_HOOK_PASSWORD", "MQTT_BRIDGE_PASSWORD")}


def started_by_its_script(folder: Path, *, certificate: bool = True) -> subprocess.CompletedProcess[str]:
    """Run start.sh with the folders of the container below `folder`, and `echo` in place of EMQX."""
    (folder / "etc" / "certs").mkdir(parents=True)
    (folder / "opt").mkdir()
    (folder / "etc" / "emqx.conf").write_text((EMQX / "emqx.conf").read_text("utf-8"), "utf-8")
    if certificate:
        (folder / "etc" / "certs" / "server.key").write_text("", "utf-8")
    text = (EMQX / "start.sh").read_text("utf-8")
    places = {
        "/etc/pulse": f"{folder}/etc",
        "/opt/emqx/etc": f"{folder}/opt",
        "/usr/bin/docker-entrypoint.sh": "/bin/echo started",
    }
    for there, here in places.items():
        assert there in text
        text = text.replace(there, here)
    environment = {"PATH": os.environ["PATH"], **PASSWORDS}
    return subprocess.run(["sh", "-c", text], env=environment, capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """emqx.conf as EMQX gets it."""
    folder = tmp_path_factory.mktemp("emqx")
    done = started_by_its_script(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("started ")
    path = folder / "opt" / "emqx.conf"
    assert path.stat().st_mode & 0o777 == 0o600
    return hocon.parse(path.read_text("utf-8"))


def test_without_a_certificate_it_says_so_and_does_not_start(tmp_path: Path) -> None:
    done = started_by_its_script(tmp_path, certificate=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "make-certs.sh" in done.stderr


def test_devices_come_by_tls_with_our_own_certificates(conf: dict[str, Any]) -> None:
    """Those that are in the image have a key that everybody knows."""
    tls = conf["listeners"]["ssl"]["default"]
    assert tls["bind"].endswith(":8883")
    assert {tls["ssl_options"][key].rpartition("/")[0] for key in ("certfile", "keyfile", "cacertfile")} == {
        "/etc/pulse/certs"
    }
    assert tls["ssl_options"]["verify"] == "verify_peer"
    assert [name for name in ("ws", "wss") if conf["listeners"][name]["default"]["enable"]] == []
    assert conf["dashboard"]["listeners"]["http"]["bind"] == 0


def test_nobody_comes_in_and_nothing_is_allowed_but_by_our_word(conf: dict[str, Any]) -> None:
    assert [each["enable"] for each in conf["authentication"]] == [True]
    authorization = conf["authorization"]
    assert (authorization["no_match"], authorization["deny_action"]) == ("deny", "disconnect")
    assert [(each["type"], each["enable"]) for each in authorization["sources"]] == [("http", True)]


def test_the_broker_s_version_knows_rules_in_the_answer() -> None:
    """Without them, a device would be thrown off while `ui` is away."""
    version = services()["mqtt"]["image"].removeprefix("emqx/emqx:")
    assert tuple(map(int, version.split(".")))[:2] >= (5, 8)


def test_no_device_can_fill_the_broker_with_names_of_its_own_choice(conf: dict[str, Any]) -> None:
    """Named shadows are let in here, so that nothing may be retained, and a session has only so many filters."""
    assert conf["mqtt"]["retain_available"] is False
    needed = max(len(DOWN + DOWN_NAMED), len(FILTERS))
    assert needed <= conf["mqtt"]["max_subscriptions"] <= 100


def test_the_broker_keeps_more_than_the_bridge_takes_at_once(conf: dict[str, Any]) -> None:
    assert conf["mqtt"]["max_inflight"] >= Settings().mqtt_receive_max
    assert conf["mqtt"]["max_mqueue_len"] >= 100_000


@dataclass(frozen=True, kw_only=True)
class Ui:
    """The role `ui`, with the settings of its compose service; PostgreSQL is away."""

    port: int

    def ask(self, question: Mapping[str, Any], client: Mapping[str, str]) -> Any:
        """Put one question as EMQX does; the answer, or the status where it is not 200."""
        assert question["method"] == "post"
        url = question["url"].replace("http://ui:8081/", f"http://127.0.0.1:{self.port}/")
        assert url != question["url"]
        body = {name: self._filled(text, client) for name, text in question["body"].items()}
        request = urllib.request.Request(  # noqa: S310 - our own http URL
            url, data=json.dumps(body).encode(), headers=question["headers"], method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                assert answer.headers["Content-Type"] == "application/json"
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    @staticmethod
    def _filled(template: str, client: Mapping[str, str]) -> str:
        assert template.startswith("${")
        assert template.endswith("}")
        return client.get(template[2:-1], "")


async def project(server: NatsServer) -> None:
    async with connection(server.url, name="test") as client:
        provisioner = Provisioner(client)
        await provisioner.apply(load(), await provisioner.plan(load()))
        by_key = {record_key(record): record for record in RECORDS}

        async def loader(keys: Sequence[str]) -> Mapping[str, Record]:
            return {key: by_key[key] for key in keys}

        await RegistryBucket(client).project(list(by_key), loader)


@pytest.fixture
async def ui(nats: NatsServer, scratch: Path) -> Any:
    """It runs, and knows the devices."""
    await project(nats)
    port = ports.free_port()
    told = services()["ui"]["environment"]
    mqtt = {name: value for name, value in told.items() if name.startswith("PULSE_MQTT_")}
    assert len(mqtt) == 3
    environment = container_environment(
        scratch,
        **filled_in(mqtt, PASSWORDS),
        NATS_URL=nats.url,
        DATABASE_URL=f"postgresql://pulse@127.0.0.1:{ports.free_port()}/pulse",
        PULSE_UI_PORT=str(port),
        PULSE_HEALTH_PORT=str(ports.free_port()),
        PYTHONPATH=str(ROOT / "src"),
    )
    process = ManagedProcess(
        "ui",
        [sys.executable, "-m", "pulse", "serve", "ui"],
        log_path=scratch / "ui.log",
        ready=lambda: _says(port, '"registry":{"ok":true'),
        environment=environment,
        working_directory=scratch,
    )
    try:
        process.start()
        yield Ui(port=port)
    finally:
        process.kill()


def _says(port: int, text: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return text in answer.read().decode().replace(" ", "")
    except urllib.error.HTTPError as error:
        with error:
            return text in error.read().decode().replace(" ", "")
    except OSError:
        return False


def connecting(**more: str) -> dict[str, str]:
    return {"username": USER, "password": TOKEN, "clientid": USER, **more}


def test_emqx_is_answered_while_postgresql_is_away(ui: Ui, conf: dict[str, Any]) -> None:
    """Every question of its configuration: a device of ours, our bridge, and nobody else."""
    [authentication] = conf["authentication"]
    [authorization] = conf["authorization"]["sources"]
    own = services()["bridge"]["environment"]
    bridge = {"username": own["PULSE_MQTT_USERNAME"], "password": PASSWORDS["MQTT_BRIDGE_PASSWORD"]}

    found = ui.ask(authentication, connecting())
    assert found["result"] == "allow"
    assert {"permission": "allow", "action": "publish", "topic": OWN + "telemetry"} in found["acl"]
    routes = {"permission": "allow", "action": "subscribe", "topic": "tenant/acme/route/#"}
    assert all(rule["topic"].startswith(OWN) or rule == routes for rule in found["acl"])
    assert ui.ask(authentication, connecting(cert_common_name=USER))["result"] == "allow"
    assert ui.ask(authentication, {**bridge, "clientid": own["PULSE_MQTT_CLIENT_ID"]})["result"] == "allow"
    for refused in (
        {},
        connecting(password="wrong"),
        connecting(username="acme/off"),
        connecting(clientid=own["PULSE_MQTT_CLIENT_ID"]),
        connecting(cert_common_name="acme/t-2"),
        {**bridge, "password": "wrong"},
    ):
        assert ui.ask(authentication, refused) == {"result": "deny"}, refused

    def may(username: str, action: str, topic: str) -> bool:
        return bool(
            ui.ask(authorization, {"username": username, "action": action, "topic": topic})["result"] == "allow"
        )

    assert may(USER, "publish", OWN + "telemetry")
    assert may(USER, "subscribe", OWN + "commands")
    assert may(USER, "subscribe", "tenant/acme/route/alerts/+")
    for action, topic in (
        ("publish", "tenant/acme/device/t-2/telemetry"),
        ("publish", OWN + "commands"),
        ("subscribe", OWN + "#"),
        ("subscribe", "tenant/beta/route/#"),
        ("publish", "tenant/acme/route/alerts"),
        ("subscribe", "#"),
        ("subscribe", "$share/pulse/tenant/#"),
    ):
        assert not may(USER, action, topic), topic
        assert not may("acme/off", action, topic)
    for each in FILTERS:
        assert may(bridge["username"], "subscribe", each)
        assert may(bridge["username"], "subscribe", f"$share/{Settings().mqtt_share_group}/{each}")
    assert not may(bridge["username"], "publish", OWN + "telemetry")


def test_nobody_else_is_answered(ui: Ui, conf: dict[str, Any]) -> None:
    [question] = conf["authentication"]
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert ui.ask({**question, "headers": {"content-type": "application/json", **headers}}, connecting()) == 401


def test_the_questions_are_no_part_of_the_api_that_is_published(ui: Ui) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{ui.port}/api/v1/openapi.json", timeout=60) as answer:
        paths = json.load(answer)["paths"]
    assert paths
    assert not [path for path in paths if "internal" in path or "mqtt" in path]


@pytest.mark.parametrize("text", ["a = {", "a = [1", "} a", "a", "a = x y", "a = 1, a = 2", '"open'])
def test_what_is_no_hocon_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        hocon.parse(text)
