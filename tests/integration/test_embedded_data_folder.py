from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from pulse.adapters.embedded.data_folder import DataFolder
from pulse.adapters.embedded.leftovers import processes_in
from pulse.adapters.embedded.nats_server import NatsServer, find_binary
from pulse.adapters.embedded.ports import free_port
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.embedded.process import wait_until
from pulse.domain.errors import ConfigurationError
from pulse.runtime.layers import load

LIMIT_S = 30.0

UP = """
import sys, time
from pathlib import Path
from pulse.adapters.embedded.data_folder import DataFolder
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.embedded.supervisor import Supervisor

ports = [int(port) for port in sys.argv[2:]]
with DataFolder(Path(sys.argv[1])) as folder, Supervisor(stop_s_max=10) as supervisor:
    secrets = folder.secrets()
    supervisor.start(
        NatsServer(folder.nats, port=ports[0], monitor_port=ports[1], password=secrets.nats_password),
        PostgresServer(
            folder.postgres,
            port=ports[2],
            password=secrets.postgresql_password,
            superuser_password=secrets.postgresql_superuser_password,
        ),
    )
    print("up", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def up() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Call it with a folder: a process that runs both servers in it until its standard input ends."""
    parents: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        parent = subprocess.Popen(
            # Ports of this process of the run: what it looked for itself could be another one's, not yet listened on.
            [sys.executable, "-c", UP, str(folder), *(str(free_port()) for _ in range(3))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        parents.append(parent)
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        return parent

    yield start
    for parent in parents:
        with parent:
            parent.kill()


def servers_in(folder: Path) -> int:
    return len(processes_in(folder / "nats", program="nats-server")) + len(
        processes_in(folder / "postgres" / "data", program="postgres")
    )


def test_everything_in_it_is_private(scratch: Path) -> None:
    with DataFolder(scratch / "made here") as folder:
        folder.secrets()
        folder.write_instance({"nats_url": "nats://a", "database_url": "postgresql://b", "gateway_port": 8080})
        modes = {path.name: path.stat().st_mode & 0o777 for path in (folder.path, *folder.path.iterdir())}
    assert modes == {
        "made here": 0o700,
        "nats": 0o700,
        "postgres": 0o700,
        "log": 0o700,
        "lock": 0o600,
        "secrets.toml": 0o600,
        "instance.toml": 0o600,
    }


def test_a_second_one_is_refused_with_the_pid_of_the_first(scratch: Path) -> None:
    with DataFolder(scratch), pytest.raises(ConfigurationError, match=f"pid {os.getpid()}"), DataFolder(scratch):
        pass


def test_the_lock_ends_with_its_holder_and_the_pid_that_is_left_in_it_means_nothing(scratch: Path) -> None:
    (scratch / "lock").write_text(f"{os.getppid()}\n")
    with DataFolder(scratch):
        assert (scratch / "lock").read_text() == f"{os.getpid()}\n"
    with DataFolder(scratch):
        pass


def test_a_parent_that_is_killed_leaves_no_server_and_the_next_finds_the_folder(
    scratch: Path, up: Callable[[Path], subprocess.Popen[str]]
) -> None:
    first = up(scratch)
    assert servers_in(scratch) > 1
    secrets = (scratch / "secrets.toml").read_text()
    with pytest.raises(ConfigurationError, match=f"pid {first.pid}"), DataFolder(scratch):
        pass
    first.kill()
    first.wait()
    second = up(scratch)
    assert (scratch / "secrets.toml").read_text() == secrets
    assert second.stdin is not None
    second.stdin.close()
    assert second.wait(LIMIT_S) == 0
    assert servers_in(scratch) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_parent_that_is_killed_takes_its_servers_with_it(
    scratch: Path, up: Callable[[Path], subprocess.Popen[str]]
) -> None:
    parent = up(scratch)
    parent.kill()
    assert wait_until(lambda: servers_in(scratch) == 0, limit_s=LIMIT_S)


def test_servers_of_a_killed_run_are_stopped_and_those_of_others_are_not(
    scratch: Path, nats: NatsServer, postgres_server: PostgresServer
) -> None:
    """As where the system has no death signal: the servers outlive their parent."""
    folder = scratch / "folder"
    (folder / "nats").mkdir(parents=True)
    leftover = subprocess.Popen(
        [find_binary(), "-a", "127.0.0.1", "-p", str(free_port())],
        cwd=folder / "nats",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    postgres = PostgresServer(folder / "postgres", port=free_port(), password="p", superuser_password="s")
    try:
        postgres.start()
        assert wait_until(lambda: servers_in(folder) > 1, limit_s=LIMIT_S)
        with DataFolder(folder):
            assert not postgres.alive
            assert leftover.wait(LIMIT_S) is not None
            assert servers_in(folder) == 0
        assert nats.alive
        assert postgres_server.alive
        assert "database system is shut down" in (folder / "postgres" / "postgresql.log").read_text()
    finally:
        leftover.kill()
        leftover.wait()
        postgres.kill()


def test_the_secrets_are_made_once(scratch: Path) -> None:
    with DataFolder(scratch) as folder:
        first = folder.secrets()
    with DataFolder(scratch) as folder:
        assert folder.secrets() == first
    values = {getattr(first, each.name) for each in fields(first)}
    assert len(values) == len(fields(first)) == 7
    assert min(len(value) for value in values) == 32
    assert not any(value in repr(first) for value in values)


def test_a_folder_of_an_older_version_gets_the_secrets_that_it_lacks_and_keeps_the_others(scratch: Path) -> None:
    (scratch / "secrets.toml").write_text('nats_password = "n"\npostgresql_password = "p"\n')
    with DataFolder(scratch) as folder:
        first = folder.secrets()
    assert (first.nats_password, first.postgresql_password) == ("n", "p")
    assert len(first.mqtt_issuer_secret) == 32
    assert (scratch / "secrets.toml").stat().st_mode & 0o777 == 0o600
    with DataFolder(scratch) as folder:
        assert folder.secrets() == first


def test_a_damaged_secrets_file_is_told_and_not_replaced(scratch: Path) -> None:
    (scratch / "secrets.toml").write_text("nats_password = ")
    with DataFolder(scratch) as folder, pytest.raises(ConfigurationError, match="remove it"):
        folder.secrets()
    assert (scratch / "secrets.toml").read_text() == "nats_password = "


def test_other_commands_find_the_system_while_it_is_up(scratch: Path) -> None:
    with DataFolder(scratch) as folder:
        folder.write_instance({"nats_url": "nats://u:p@127.0.0.1:1", "database_url": "postgresql://u:p@127.0.0.1:2/d"})
        settings = load(environment={}, flags={"data_dir": str(scratch)})
        assert settings.nats_url == "nats://u:p@127.0.0.1:1"
        assert settings.database_url == "postgresql://u:p@127.0.0.1:2/d"
    assert not (scratch / "instance.toml").exists()


def test_where_a_killed_run_said_that_it_is_up_is_removed(scratch: Path) -> None:
    (scratch / "instance.toml").write_text('nats_url = "nats://127.0.0.1:1"\n')
    with DataFolder(scratch):
        assert not (scratch / "instance.toml").exists()


def test_what_is_no_folder_is_told(scratch: Path) -> None:
    (scratch / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--data-dir"), DataFolder(scratch / "file"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may open a folder of another user")
def test_a_folder_of_another_user_is_told(scratch: Path) -> None:
    (scratch / "lock").write_text("")
    os.chown(scratch / "lock", 65534, 65534)
    with pytest.raises(ConfigurationError, match="belongs to"), DataFolder(scratch):
        pass
