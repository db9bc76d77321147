"""The services of `compose/` without containers: their own files, commands and environment, on free ports of loopback.

What is changed is where things are: the names of hosts and the ports, the addresses that are listened on, and the
folders of a container. Everything else is what stands in the files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from compose_files import FOLDER, LAYERS, Service, filled_in, services
from compose_image import Image
from compose_server import HOST, ComposeCluster, ComposeNats, Finished, container_environment, program, run
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
    """The services of docker-compose.yml, or of several files; each is started by its command, with its environment."""

    folder: Path
    passwords: dict[str, str]
    services: dict[str, Service] = field(default_factory=services)
    places: dict[str, str] = field(default_factory=dict)
    """Where `host:port` of the containers is here."""
    running: dict[str, ManagedProcess] = field(default_factory=dict)
    ended: dict[str, Finished] = field(default_factory=dict)
    ports: dict[str, dict[str, int]] = field(default_factory=dict)
    monitor_port: int = 0
    """Of nats-server."""
    cluster: ComposeCluster | None = None
    """In place of the one server."""
    image: Image | None = None
    """What our services run in; without one they run in this checkout."""
    administrator: dict[str, str] = field(default_factory=dict)
    """How the programs of PostgreSQL connect as in its container, where nobody is asked for a password."""
    cleanup: ExitStack = field(default_factory=ExitStack)

    def environment(self, name: str, *, copy: int = 0) -> dict[str, str]:
        """Of a service of ours, with everything found where it is here."""
        told = filled_in(self.services[name]["environment"], self.passwords)
        assert isinstance(told, dict)
        label = f"{name}-{copy}" if copy else name
        given = {f"PULSE_{key.upper()}_PORT": str(port) for key, port in self.ports.get(label, {}).items()}
        here = {key: self.here(value) for key, value in told.items()}
        return container_environment(self.folder, **{**here, **given, "PYTHONPATH": str(ROOT / "src")})

    def here(self, value: str) -> str:
        """A value of an environment, with hosts and ports as they are here."""
        for there, here in self.places.items():
            value = value.replace(f"@{there}", f"@{here}").replace(f"nats://{there}", f"nats://{here}")
            value = value.replace(f"mqtt://{there}", f"mqtt://{here}")
        return HOST if value == "0.0.0.0" else value  # noqa: S104 - it is what we replace

    def command(self, name: str, *arguments: str) -> list[str]:
        """The Dockerfile's entry point and the service's command, or `arguments` in its place."""
        found = re.findall(r"^ENTRYPOINT (\[.*\])$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
        python, *entry = json.loads(found[0])
        assert python == "python"
        told = [*entry, *(arguments or self.services[name]["command"])]
        return self.image.command([python, *told]) if self.image else [sys.executable, *told]

    def run_once(self, name: str, *arguments: str) -> Finished:
        """A service that ends, or another command in its place."""
        done = run(self.command(name, *arguments), self.environment(name), folder=self.folder)
        self.ended[name] = done
        return done

    def start(self, name: str, *, copy: int = 0) -> None:
        """A role, or one more container of it; returns when its own health check says that it is healthy."""
        label = f"{name}-{copy}" if copy else name
        self.ports[label] = {"health": ports.free_port(), "gateway": ports.free_port(), "ui": ports.free_port()}
        process = ManagedProcess(
            label,
            self.command(name),
            log_path=self.folder / f"{label}.log",
            ready=lambda: self.is_healthy(name, copy=copy),
            ready_s_max=READY_S_MAX,
            environment=self.environment(name, copy=copy),
            working_directory=self.folder,
        )
        self.cleanup.callback(process.kill)
        process.start()
        self.running[label] = process

    def is_healthy(self, name: str, *, copy: int = 0) -> bool:
        """What the service's health check says."""
        kind, python, *arguments = self.services[name]["healthcheck"]["test"]
        assert (kind, python) == ("CMD", "python")
        label = f"{name}-{copy}" if copy else name
        here = [each.replace(":9100/", f":{self.ports[label]['health']}/") for each in arguments]
        assert here != arguments
        command = self.image.command([python, *here]) if self.image else [sys.executable, *here]
        return run(command, container_environment(self.folder), folder=self.folder).code == 0

    def log_of(self, name: str) -> str:
        """All that it has said."""
        return (self.folder / f"{name}.log").read_text("utf-8")


def start_servers(stack: Stack) -> None:
    """nats, postgres and pgbouncer, with the files that their containers mount; and a broker in place of EMQX."""
    start_nats(stack)
    start_database(stack)
    start_broker(stack)


def start_nats(stack: Stack) -> None:
    """The one server of docker-compose.yml."""
    nats = ComposeNats(_subfolder(stack, "nats"), passwords=stack.passwords)
    stack.cleanup.callback(nats.process.kill)
    nats.process.start()
    stack.running["nats"] = nats.process
    stack.monitor_port = nats.monitor_port
    stack.places["iot-nats:4222"] = f"{HOST}:{nats.port}"


def start_cluster(stack: Stack) -> ComposeCluster:
    """The three of docker-compose.cluster.yml, which the stack's services are from here on told of."""
    stack.services = services(*LAYERS["cluster"])
    cluster = stack.cluster = ComposeCluster(_subfolder(stack, "cluster"), passwords=stack.passwords)
    stack.cleanup.callback(cluster.kill)
    cluster.start()
    stack.places |= {f"{name}:4222": f"{HOST}:{node.port}" for name, node in cluster.nodes.items()}
    return cluster


def start_broker(stack: Stack) -> None:
    """mosquitto, which knows of the bridge alone: what emqx.conf says is in tests/integration/test_emqx_hooks.py."""
    mosquitto = program("mosquitto", install="apt install mosquitto")
    port = ports.free_port()
    told = stack.environment("bridge")
    folder = Path(tempfile.mkdtemp(prefix="pulse-mosquitto-"))
    stack.cleanup.callback(shutil.rmtree, folder)
    passwords = folder / "passwords"
    passwords.write_text(f"{told['PULSE_MQTT_USERNAME']}:{told['PULSE_MQTT_PASSWORD']}\n", "utf-8")
    hashed = run(
        [program("mosquitto_passwd", install="apt install mosquitto"), "-U", str(passwords)],
        dict(os.environ),
        folder=folder,
    )
    assert hashed.code == 0, hashed.errors
    # As root it would become another user, who may not read the file.
    user = "user root\n" if os.geteuid() == 0 else ""
    (folder / "mosquitto.conf").write_text(f"{user}listener {port} {HOST}\npassword_file {passwords}\n", "utf-8")
    process = ManagedProcess(
        "mqtt",
        [mosquitto, "-c", str(folder / "mosquitto.conf")],
        log_path=stack.folder / "mqtt.log",
        ready=lambda: _listens(port),
        working_directory=folder,
    )
    stack.cleanup.callback(process.kill)
    process.start()
    stack.running["mqtt"] = process
    stack.places["mqtt:1883"] = f"{HOST}:{port}"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def start_database(stack: Stack) -> None:
    """postgres and pgbouncer."""
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
    stack.administrator = {
        **postgres_environment(),
        "PGHOST": HOST,
        "PGPORT": str(server.port),
        "PGPASSWORD": superuser_password,
    }
    psql = find_binaries("", run_as=None).program("psql")
    environment = filled_in(stack.services["postgres"]["environment"], stack.passwords)
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
    service = stack.services["pgbouncer"]
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
    """A new one: a volume that is empty."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=stack.folder))
    folder.chmod(0o755)
    return folder
