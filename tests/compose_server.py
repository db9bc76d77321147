"""nats-server as compose runs it, and the programs that work on it: its own files, on free ports of loopback."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from compose_files import INIT_STREAMS, LAYERS, NATS_CONF, TOPOLOGY, filled_in, nats_users, services
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import find_binary
from pulse.adapters.embedded.process import ManagedProcess

HOST = "127.0.0.1"
COMMAND_S_MAX = 150.0
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
        conf = _nats_conf(folder, text)
        self.process = _nats_server(
            "nats", conf, folder, port=self.port, monitor_port=self.monitor_port, environment=self.passwords
        )

    def url(self, user: str, *, password: str | None = None) -> str:
        """Where `user` connects."""
        secret = self.passwords[self._variable[user]] if password is None else password
        return f"nats://{user}:{secret}@{HOST}:{self.port}"


class ComposeNode:
    """One server of `docker-compose.cluster.yml`, with the configuration, command and environment that stand there."""

    def __init__(self, folder: Path, *, service: str, passwords: Mapping[str, str], routes: Mapping[str, int]) -> None:
        """`routes` is the port that each host of the file has here for the others."""
        told = services(*LAYERS["cluster"])[service]
        environment: dict[str, str] = filled_in(told["environment"], passwords)
        self.name = environment["NATS_SERVER_NAME"]
        self.port = ports.free_port()
        self.monitor_port = ports.free_port()
        self.route_port = routes[self.name]
        for host, port in routes.items():
            environment = {key: value.replace(f"@{host}:6222", f"@{HOST}:{port}") for key, value in environment.items()}
        _nats_conf(folder, NATS_CONF.read_text("utf-8"))
        option, path = told["command"]
        assert option == "-c"
        mounted = {mount.split(":")[1]: mount.split(":")[0] for mount in told["volumes"]}
        text = (NATS_CONF.parent.parent / mounted[path]).read_text("utf-8")
        assert text.count("0.0.0.0:6222") == 1
        conf = folder / Path(path).name
        conf.write_text(text.replace("0.0.0.0:6222", f"{HOST}:{self.route_port}"), "utf-8")
        self.process = _nats_server(
            self.name, conf, folder, port=self.port, monitor_port=self.monitor_port, environment=environment
        )


class ComposeCluster:
    """The three servers of `docker-compose.cluster.yml`."""

    def __init__(self, folder: Path, *, passwords: Mapping[str, str]) -> None:
        told = services(*LAYERS["cluster"])
        names = {name: each["environment"]["NATS_SERVER_NAME"] for name, each in told.items() if _is_nats(each)}
        routes = {server: ports.free_port() for server in names.values()}
        self.nodes: dict[str, ComposeNode] = {}
        for service, server in names.items():
            (folder / server).mkdir()
            self.nodes[server] = ComposeNode(folder / server, service=service, passwords=passwords, routes=routes)

    def start(self) -> None:
        """All at once: none is healthy before it has met another one."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda node: node.process.start(), self.nodes.values()))

    def kill(self) -> None:
        """kill -9."""
        for node in self.nodes.values():
            node.process.kill()


def _is_nats(service: Mapping[str, object]) -> bool:
    return str(service.get("image", "")).startswith("nats:")


def _nats_conf(folder: Path, text: str) -> Path:
    """nats.conf with its data in `folder`."""
    assert text.count("/data/jetstream") == 1
    conf = folder / "nats.conf"
    conf.write_text(text.replace("/data/jetstream", json.dumps(str(folder / "jetstream"))), "utf-8")
    return conf


def _nats_server(
    name: str, conf: Path, folder: Path, *, port: int, monitor_port: int, environment: Mapping[str, str]
) -> ManagedProcess:
    """Healthy when its own health check would say so."""

    def is_healthy() -> bool:
        connection = http.client.HTTPConnection(HOST, monitor_port, timeout=1)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()

    return ManagedProcess(
        name,
        [find_binary(), "-c", str(conf), "-a", HOST, "-p", str(port), "-m", str(monitor_port)],
        log_path=folder / "nats.log",
        ready=is_healthy,
        environment=container_environment(folder, **environment),
        working_directory=folder,
    )


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
