"""The certificates of the handbook: made by its own commands, and shown to a broker that asks for them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from compose_files import FOLDER
from compose_server import HOST, program
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.process import ManagedProcess
from repository import ROOT

HANDBOOK = (ROOT / "docs" / "operations.md").read_text("utf-8")
COMMAND_S_MAX = 60.0


def openssl_blocks() -> list[str]:
    """The blocks of the section "Certificates" that a reader would paste."""
    section = HANDBOOK.partition("\n## Certificates\n")[2].partition("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def paste(text: str, *, folder: Path) -> str:
    """Run it in a shell; what it printed."""
    done = subprocess.run(
        ["sh", "-euc", text], cwd=folder, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's compose/emqx, with the certificates of one run, and a device's."""
    program("openssl", install="apt install openssl")
    made = tmp_path_factory.mktemp("certificates")
    shutil.copytree(FOLDER / "emqx", made / "compose" / "emqx", ignore=shutil.ignore_patterns("*.pem", "*.key"))
    paste("sh compose/emqx/make-certs.sh mqtt.example.com 192.0.2.7", folder=made)
    looked, device = openssl_blocks()
    shown = paste(looked, folder=made)
    assert "DNS:mqtt.example.com, IP Address:192.0.2.7" in shown
    assert "server.pem: OK" in shown
    assert "device.pem: OK" in paste(device, folder=made)
    return made


def test_keys_are_readable_by_nobody_else(folder: Path) -> None:
    emqx = folder / "compose" / "emqx"
    keys = [emqx / "ca" / "ca.key", emqx / "certs" / "server.key"]
    assert [key.stat().st_mode & 0o777 for key in keys] == [0o600, 0o600]
    assert not (emqx / "certs" / "ca.key").exists()


def test_nothing_of_it_is_ever_committed() -> None:
    for name in ("ca", "certs"):
        assert (FOLDER / "emqx" / name / ".gitignore").read_text("utf-8") == "*\n!.gitignore\n"


def test_the_name_of_a_device_is_in_its_certificate(folder: Path) -> None:
    shown = paste("openssl x509 -in device.pem -noout -subject -nameopt multiline,-esc_msb", folder=folder)
    assert re.search(r"commonName += acme/thermostat-1$", shown, re.MULTILINE)


def test_a_second_run_keeps_the_authority_and_renews_the_certificate(folder: Path) -> None:
    emqx = folder / "compose" / "emqx"
    authority, certificate = (emqx / "ca" / "ca.pem").read_bytes(), (emqx / "certs" / "server.pem").read_bytes()
    again = folder.with_name(folder.name + "-again")
    shutil.copytree(folder, again)
    paste("sh compose/emqx/make-certs.sh other.example.com", folder=again)
    renewed = again / "compose" / "emqx"
    assert (renewed / "ca" / "ca.pem").read_bytes() == (renewed / "certs" / "ca.pem").read_bytes() == authority
    assert (renewed / "certs" / "server.pem").read_bytes() != certificate


@dataclass(frozen=True, kw_only=True)
class Broker:
    """mosquitto with the certificates, which takes whom they were made for."""

    port: int
    folder: Path

    def publish(self, *options: str) -> subprocess.CompletedProcess[str]:
        """As mosquitto_pub does it, trusting the authority of the certificates where `options` do not say another."""
        command = [program("mosquitto_pub", install="apt install mosquitto-clients"), "-h", "localhost", "-V", "5"]
        told = ["-p", str(self.port), "-q", "1", "-t", "tenant/acme/device/thermostat-1/telemetry", "-m", "{}"]
        trusted = [] if "--cafile" in options else ["--cafile", "compose/emqx/certs/ca.pem"]
        return subprocess.run(
            [*command, *told, *trusted, *options],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
        )


@pytest.fixture(scope="module")
def broker(folder: Path) -> Iterator[Broker]:
    mosquitto = program("mosquitto", install="apt install mosquitto")
    port = ports.free_port()
    certs = folder / "compose" / "emqx" / "certs"
    (folder / "acl").write_text("user acme/thermostat-1\ntopic write tenant/acme/device/thermostat-1/#\n", "utf-8")
    (folder / "mosquitto.conf").write_text(
        f"user root\nlistener {port} {HOST}\nallow_anonymous true\nacl_file {folder}/acl\n"
        f"cafile {certs}/ca.pem\ncertfile {certs}/server.pem\nkeyfile {certs}/server.key\n"
        "require_certificate true\nuse_identity_as_username true\n",
        "utf-8",
    )
    process = ManagedProcess(
        "mosquitto",
        [mosquitto, "-c", str(folder / "mosquitto.conf")],
        log_path=folder / "mosquitto.log",
        ready=lambda: "running" in (folder / "mosquitto.log").read_text("utf-8"),
        working_directory=folder,
    )
    try:
        process.start()
        yield Broker(port=port, folder=folder)
    finally:
        process.kill()


OWN = ["--cert", "device.pem", "--key", "device.key"]


def test_a_broker_takes_a_device_by_its_certificate_and_is_known_by_its_own(broker: Broker) -> None:
    done = broker.publish(*OWN)
    assert (done.returncode, done.stderr) == (0, "")
    assert broker.publish().returncode != 0
    assert broker.publish(*OWN, "--cafile", "/etc/ssl/certs/ca-certificates.crt").returncode != 0


def test_a_device_of_another_name_is_another_device(broker: Broker) -> None:
    """By the same authority, and yet refused."""
    text = openssl_blocks()[1].replace("acme\\/thermostat-1", "acme\\/other").replace("device.", "other.")
    paste(text, folder=broker.folder)
    assert "Not authorized" in broker.publish("--cert", "other.pem", "--key", "other.key").stderr
