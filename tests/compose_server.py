"""nats-server as compose runs it, and the programs that work on it: its own files, on free ports of loopback."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from compose_files import INIT_STREAMS, NATS_CONF, TOPOLOGY, nats_users
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import find_binary
from pulse.adapters.embedded.process import ManagedProcess

HOST = "127.0.0.1"
COMMAND_S_MAX = 60.0
NATS_CLI = "github.com/nats-io/natscli/nats@v0.5.1"


def program(name: str, *, install: str) -> str:
    """The path of a program, also of one that `go install` made; skips the test, saying so, where there is none."""
    go_bin = os.environ.get("GOBIN") or str(Path.home() / "go" / "bin")
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), go_bin, "/usr/sbin"]))
    if found is None:
        pytest.skip(f"{name} is not installed ({install})")
    return found


def nats_cli() -> str:
    """The real `nats` command."""
    return program("nats", install=f"go install {NATS_CLI}")


def container_environment(folder: Path, *programs: str, **variables: str) -> dict[str, str]:
    """What a process in a container sees of ours: nothing but a PATH and a home of its own."""
    path = [*(str(Path(each).parent) for each in programs), "/usr/bin", "/bin"]
    return {"PATH": os.pathsep.join(path), "HOME": str(folder), **variables}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a process ended, and what it said."""

    code: int
    output: str
    errors: str


def run(arguments: list[str], environment: Mapping[str, str], *, folder: Path) -> Finished:
    """Run to the end."""
    done = subprocess.run(
        arguments, env=environment, cwd=folder, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False
    )
    return Finished(code=done.returncode, output=done.stdout, errors=done.stderr)


class ComposeNats:
    """nats-server with `compose/nats/nats.conf`: its accounts, its limits, random passwords."""

    def __init__(self, folder: Path, *, passwords: Mapping[str, str] | None = None, text: str = "") -> None:
        text = text or NATS_CONF.read_text("utf-8")
        self.passwords = dict(passwords or {name: made_password() for name in nats_users(text).values()})
        self._variable = nats_users(text)
        self.port = ports.free_port()
        self.monitor_port = ports.free_port()
        self.folder = folder
        conf = folder / "nats.conf"
        assert text.count("/data/jetstream") == 1
        conf.write_text(text.replace("/data/jetstream", json.dumps(str(folder / "jetstream"))), "utf-8")
        listen = ["-a", HOST, "-p", str(self.port), "-m", str(self.monitor_port)]
        self.process = ManagedProcess(
            "nats",
            [find_binary(), "-c", str(conf), *listen],
            log_path=folder / "nats.log",
            ready=self._ready,
            environment=container_environment(folder, **self.passwords),
            working_directory=folder,
        )

    def url(self, user: str, *, password: str | None = None) -> str:
        """Where `user` connects."""
        secret = self.passwords[self._variable[user]] if password is None else password
        return f"nats://{user}:{secret}@{HOST}:{self.port}"

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.monitor_port, timeout=1)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()


@contextmanager
def compose_nats(folder: Path, *, text: str = "") -> Iterator[ComposeNats]:
    """A running one, of another configuration where `text` is one; it ends with the block."""
    server = ComposeNats(folder, text=text)
    server.process.start()
    try:
        yield server
    finally:
        server.process.kill()


def init_streams(url: str, folder: Path, *, shell: list[str] | None = None, **variables: str) -> Finished:
    """Run `init-streams.sh` as the container does: `sh`, the real CLI, a URL; skips where the CLI is not there."""
    given = {"NATS_URL": url, "TOPOLOGY_DIR": str(TOPOLOGY), "NATS_WAIT_S": "20", **variables}
    environment = container_environment(folder, nats_cli(), **given)
    return run([*(shell or ["/bin/sh"]), str(INIT_STREAMS)], environment, folder=folder)


def made_password() -> str:
    """As `make-env.sh` makes them."""
    return f"p{secrets.token_hex(16)}"
