"""The services of `compose/` without containers: their own files, commands and environment, on free ports of loopback.

What is changed is where things are: the names of hosts and the ports, the addresses that are listened on, and the
folders of a container. Everything else is what stands in the files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from compose_files import FOLDER, filled_in, services
from compose_server import HOST, ComposeNats, Finished, container_environment, program, run
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.postgres_binaries import environment as postgres_environment
from pulse.adapters.embedded.postgres_binaries import find_binaries
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.embedded.process import ManagedProcess, RunAs
from repository import ROOT

READY_S_MAX = 60.0
NOBODY = RunAs(uid=65534, gid=65534, name="nobody")


@dataclass(kw_only=True)
class Stack:
    """The services of docker-compose.yml; each is started by its command, with its environment, by its name."""

    folder: Path
    passwords: dict[str, str]
    places: dict[str, str] = field(default_factory=dict)
    """Where `host:port` of the containers is here."""
    running: dict[str, ManagedProcess] = field(default_factory=dict)
    ended: dict[str, Finished] = field(default_factory=dict)
    ports: dict[str, dict[str, int]] = field(default_factory=dict)
    monitor_port: int = 0
    """Of nats-server."""
    cleanup: ExitStack = field(default_factory=ExitStack)

    def environment(self, name: str) -> dict[str, str]:
        """Of a service of ours, with everything found where it is here."""
        told = filled_in(services()[name]["environment"], self.passwords)
        assert isinstance(told, dict)
        given = {f"PULSE_{key.upper()}_PORT": str(port) for key, port in self.ports.get(name, {}).items()}
        here = {key: self._here(value) for key, value in told.items()}
        return container_environment(self.folder, **{**here, **given, "PYTHONPATH": str(ROOT / "src")})

    def _here(self, value: str) -> str:
        for there, here in self.places.items():
            value = value.replace(f"@{there}", f"@{here}")
        return HOST if value == "0.0.0.0" else value  # noqa: S104 - it is what we replace

    def command(self, name: str, *arguments: str) -> list[str]:
        """The Dockerfile's entry point and the service's command, or `arguments` in its place."""
        found = re.findall(r"^ENTRYPOINT (\[.*\])$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
        python, *entry = json.loads(found[0])
        assert python == "python"
        return [sys.executable, *entry, *(arguments or services()[name]["command"])]

    def run_once(self, name: str, *arguments: str) -> Finished:
        """A service that ends, or another command in its place."""
        done = run(self.command(name, *arguments), self.environment(name), folder=self.folder)
        self.ended[name] = done
        return done

    def start(self, name: str) -> None:
        """A role; returns when its own health check says that it is healthy."""
        self.ports[name] = {"health": ports.free_port(), "gateway": ports.free_port(), "ui": ports.free_port()}
        process = ManagedProcess(
            name,
            self.command(name),
            log_path=self.folder / f"{name}.log",
            ready=lambda: self.is_healthy(name),
            ready_s_max=READY_S_MAX,
            environment=self.environment(name),
            working_directory=self.folder,
        )
        self.cleanup.callback(process.kill)
        process.start()
        self.running[name] = process

    def is_healthy(self, name: str) -> bool:
        """What the service's health check says."""
        kind, python, *arguments = services()[name]["healthcheck"]["test"]
        assert (kind, python) == ("CMD", "python")
        here = [each.replace(":9100/", f":{self.ports[name]['health']}/") for each in arguments]
        assert here != arguments
        return run([sys.executable, *here], container_environment(self.folder), folder=self.folder).code == 0

    def log_of(self, name: str) -> str:
        """All that it has said."""
        return (self.folder / f"{name}.log").read_text("utf-8")


def start_servers(stack: Stack) -> None:
    """nats, postgres and pgbouncer, with the files that their containers mount."""
    nats = ComposeNats(_subfolder(stack, "nats"), passwords=stack.passwords)
    stack.cleanup.callback(nats.process.kill)
    nats.process.start()
    stack.running["nats"] = nats.process
    stack.monitor_port = nats.monitor_port
    stack.places["iot-nats:4222"] = f"{HOST}:{nats.port}"
    _start_postgres(stack)
    _start_pgbouncer(stack)


def _start_postgres(stack: Stack) -> None:
    """A cluster as the image makes it: a superuser, an empty database of his, then our init.sql by psql."""
    superuser_password = stack.passwords["POSTGRES_PASSWORD"]
    server = PostgresServer(
        _subfolder(stack, "postgres"), port=ports.free_port(), password="unused", superuser_password=superuser_password
    )
    stack.cleanup.callback(server.kill)
    server.start()
    assert server.process is not None
    stack.running["postgres"] = server.process
    stack.places["postgres:5432"] = f"{HOST}:{server.port}"
    psql = find_binaries("", run_as=None).program("psql")
    environment = filled_in(services()["postgres"]["environment"], stack.passwords)
    administrator = server.url_of("postgres", superuser=True)
    statements = ["DROP DATABASE pulse", "DROP ROLE pulse", "DROP ROLE pulse_tenant"]
    statements.append(f"CREATE DATABASE {environment['POSTGRES_DB']}")
    options = ["-v", "ON_ERROR_STOP=1", "--no-password", "--no-psqlrc"]
    given = {**postgres_environment(), **environment}
    commands = [part for statement in statements for part in ("-c", statement)]
    done = run([psql, *options, administrator, *commands], given, folder=stack.folder)
    assert done.code == 0, done.errors
    database = server.url_of(environment["POSTGRES_DB"], superuser=True)
    stack.ended["init.sql"] = run(
        [psql, *options, database, "-f", str(FOLDER / "postgres" / "init.sql")], given, folder=stack.folder
    )
    assert stack.ended["init.sql"].code == 0, stack.ended["init.sql"].errors


def _start_pgbouncer(stack: Stack) -> None:
    pgbouncer = program("pgbouncer", install="apt install pgbouncer")
    # In a folder that another user may enter: it refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="pulse-pgbouncer-"))
    stack.cleanup.callback(shutil.rmtree, folder)
    run_as = NOBODY if os.geteuid() == 0 else None
    if run_as is not None:
        os.chown(folder, run_as.uid, run_as.gid)
    port = ports.free_port()
    host, _, postgres_port = stack.places["postgres:5432"].partition(":")
    _moved(
        FOLDER / "pgbouncer" / "pgbouncer.ini",
        folder / "pgbouncer.ini",
        {
            "host=postgres port=5432": f"host={host} port={postgres_port}",
            "listen_addr = 0.0.0.0": f"listen_addr = {HOST}",
            "listen_port = 5432": f"listen_port = {port}",
            "/tmp/userlist.txt": str(folder / "userlist.txt"),  # noqa: S108 - it is what we replace
        },
    )
    _moved(
        FOLDER / "pgbouncer" / "start.sh",
        folder / "start.sh",
        {
            "/tmp/userlist.txt": str(folder / "userlist.txt"),  # noqa: S108 - as above
            "/etc/pgbouncer/pgbouncer.ini": str(folder / "pgbouncer.ini"),
        },
    )
    service = services()["pgbouncer"]
    assert service["entrypoint"] == ["/bin/sh", "/scripts/start.sh"]
    told = filled_in(service["environment"], stack.passwords)
    check = [each.replace("5432", str(port)) for each in service["healthcheck"]["test"][1:]]
    check[0] = find_binaries("", run_as=None).program(check[0])
    process = ManagedProcess(
        "pgbouncer",
        ["/bin/sh", str(folder / "start.sh")],
        log_path=stack.folder / "pgbouncer.log",
        ready=lambda: run(check, postgres_environment(), folder=stack.folder).code == 0,
        environment=container_environment(folder, pgbouncer, **told),
        working_directory=folder,
        run_as=run_as,
    )
    stack.cleanup.callback(process.kill)
    process.start()
    stack.running["pgbouncer"] = process
    stack.places["pgbouncer:5432"] = f"{HOST}:{port}"


def _moved(source: Path, target: Path, places: Mapping[str, str]) -> None:
    """Copy a file, with each of `places` found in it once and replaced."""
    text = source.read_text("utf-8")
    for there, here in places.items():
        assert text.count(there) == 1, (source, there)
        text = text.replace(there, here)
    target.write_text(text, "utf-8")
    target.chmod(0o644)


def _subfolder(stack: Stack, name: str) -> Path:
    folder = stack.folder / name
    folder.mkdir()
    return folder
