"""NATS with TLS, as docs/operations.md says: certificates of an authority of one's own, made by openssl."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compose_files import NATS_CONF
from compose_server import HOST, ComposeNats, Finished, compose_nats, container_environment, init_streams, program, run
from pulse_up import wait_for
from repository import ROOT

HANDBOOK = (ROOT / "docs" / "operations.md").read_text("utf-8")


class Authority:
    """An authority, and a certificate of it for 127.0.0.1, as `ca.pem`, `server.pem` and `server.key` in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        self._openssl("req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=authority -keyout ca.key -out ca.pem")
        self.issue()

    def issue(self) -> None:
        """A new certificate in place of the old one."""
        (self.folder / "san").write_text(f"subjectAltName=IP:{HOST}\n", "utf-8")
        self._openssl("req -newkey rsa:2048 -nodes -subj /CN=nats -keyout server.key -out server.csr")
        self._openssl("x509 -req -in server.csr -CA ca.pem -CAkey ca.key -days 1 -extfile san -out server.pem")

    def _openssl(self, arguments: str) -> None:
        command = [program("openssl", install="apt install openssl"), *arguments.split()]
        done = run(command, container_environment(self.folder), folder=self.folder)
        assert done.code == 0, done.errors


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server(authority: Authority, scratch: Path) -> Iterator[ComposeNats]:
    """nats.conf with the block of the handbook."""
    assert "tls { cert_file: …, key_file: … }" in HANDBOOK
    files = f'cert_file: "{authority.folder / "server.pem"}", key_file: "{authority.folder / "server.key"}"'
    with compose_nats(scratch, text=f"{NATS_CONF.read_text('utf-8')}\ntls {{ {files} }}\n") as running:
        yield running


def plan(server: ComposeNats, folder: Path, url: str, **variables: str) -> Finished:
    environment = container_environment(folder, NATS_URL=url, PYTHONPATH=str(ROOT / "src"), **variables)
    return run([sys.executable, "-m", "pulse", "streams", "plan"], environment, folder=folder)


def with_tls(server: ComposeNats, user: str) -> str:
    return server.url(user).replace("nats://", "tls://")


def test_the_script_and_a_role_come_in_with_the_authority_s_certificate(
    server: ComposeNats, authority: Authority, scratch: Path
) -> None:
    done = init_streams(with_tls(server, "provisioner"), scratch, SSL_CERT_FILE=str(authority.ca))
    assert (done.code, done.errors) == (0, "")
    assert plan(server, scratch, with_tls(server, "provisioner"), SSL_CERT_FILE=str(authority.ca)).code == 0


def test_a_role_does_not_talk_to_a_server_of_an_authority_that_it_does_not_know(
    server: ComposeNats, scratch: Path
) -> None:
    done = plan(server, scratch, with_tls(server, "provisioner"))
    assert done.code != 0
    assert done.errors.splitlines()[-1].startswith("pulse: cannot ")
    assert "certificate" in done.errors.lower()


def test_a_new_certificate_is_read_on_sighup(server: ComposeNats, authority: Authority) -> None:
    before = _serial(server, authority)
    authority.issue()
    assert server.process.pid is not None
    os.kill(server.process.pid, signal.SIGHUP)
    wait_for(lambda: _serial(server, authority) != before, "the new certificate is served")


def _serial(server: ComposeNats, authority: Authority) -> str:
    """Of the certificate that is served; nats-server says a line before TLS begins."""
    context = ssl.create_default_context(cafile=str(authority.ca))
    with socket.create_connection((HOST, server.port), timeout=5) as plain:
        said = b""
        while not said.endswith(b"\r\n"):
            said += plain.recv(4096)
        with context.wrap_socket(plain, server_hostname=HOST) as secured:
            certificate = secured.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])
