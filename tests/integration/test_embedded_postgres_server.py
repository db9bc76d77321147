from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil  # type: ignore[import-untyped]
import pytest

from pulse.adapters.embedded import postgres_binaries, postgres_server
from pulse.adapters.embedded.leftovers import processes_in
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.embedded.process import ManagedProcess, wait_until
from pulse.adapters.embedded.supervisor import Backoff, Supervisor
from pulse.domain.errors import ConfigurationError

LIMIT_S = 30.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="what root does so that PostgreSQL does not run as root")

PARENT = """
import sys, time
from pathlib import Path
from pulse.adapters.embedded.postgres_server import PostgresServer
rename = Path.rename
Path.rename = lambda path, to: time.sleep(600) if path.name == "data.new" else rename(path, to)
PostgresServer(Path(sys.argv[1]), port=int(sys.argv[2]), password="p", superuser_password="s").start()
"""


@pytest.fixture
def own(postgres_server_factory: Callable[..., PostgresServer]) -> PostgresServer:
    """A server of this test's own, started."""
    server = postgres_server_factory()
    server.start()
    return server


async def execute(url: str, statement: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


async def test_rows_outlive_a_stop_a_kill_and_a_restart(own: PostgresServer) -> None:
    await execute(own.url, "CREATE TABLE kept (at text)")
    await execute(own.url, "INSERT INTO kept VALUES ('stop')")
    own.stop()
    assert not own.alive
    own.start()
    await execute(own.url, "INSERT INTO kept VALUES ('kill')")
    own.kill()
    assert not own.alive
    own.start()
    await execute(own.url, "INSERT INTO kept VALUES ('restart')")
    own.restart()
    assert [row["at"] for row in await execute(own.url, "SELECT at FROM kept")] == ["stop", "kill", "restart"]


async def test_a_supervised_server_that_is_killed_comes_back_with_its_rows(
    postgres_server_factory: Callable[..., PostgresServer],
) -> None:
    server = postgres_server_factory()
    with Supervisor(stop_s_max=LIMIT_S, backoff=Backoff(delay_s_min=0.01)) as supervisor:
        supervisor.start(server)
        await execute(server.url, "CREATE TABLE kept AS SELECT 1 AS one")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert wait_until(lambda: supervisor.restarts()["postgresql"] == 1, limit_s=LIMIT_S)
        assert len(await execute(server.url, "SELECT * FROM kept")) == 1
    assert not processes_in(server.cluster_path, program="postgres")


async def test_the_role_owns_its_database_and_nothing_else(own: PostgresServer) -> None:
    [role] = await execute(
        own.url,
        "SELECT rolsuper, rolcreatedb, rolcreaterole, has_database_privilege('pulse', 'CREATE') AS creates, "
        "current_database() AS database FROM pg_roles WHERE rolname = current_user",
    )
    assert dict(role) == {
        "rolsuper": False,
        "rolcreatedb": False,
        "rolcreaterole": False,
        "creates": True,
        "database": "pulse",
    }


async def test_what_makes_a_commit_durable_is_on(own: PostgresServer) -> None:
    names = ("fsync", "synchronous_commit", "full_page_writes", "data_checksums", "server_encoding", "TimeZone")
    values = [(await execute(own.url, f"SHOW {name}"))[0][0] for name in names]
    assert values == ["on", "on", "on", "on", "UTF8", "UTC"]
    [locale] = await execute(own.url, "SELECT datlocprovider, datlocale FROM pg_database WHERE datname = 'pulse'")
    assert tuple(locale) == (b"b", "C.UTF-8")


async def test_only_loopback_is_listened_on_and_only_with_a_password(own: PostgresServer) -> None:
    listening = [
        connection.laddr
        for connection in psutil.Process(own.pid).net_connections(kind="all")
        if connection.status == psutil.CONN_LISTEN or connection.family.name == "AF_UNIX"
    ]
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", own.port)]
    for user in ("pulse", "postgres"):
        with pytest.raises(asyncpg.InvalidPasswordError):
            await execute(f"postgresql://{user}:wrong@127.0.0.1:{own.port}/pulse", "SELECT 1")


async def test_a_new_password_is_taken_over_with_the_data(
    own: PostgresServer, postgres_server_factory: Callable[..., PostgresServer]
) -> None:
    """Whoever lost the secrets file has not lost the data."""
    await execute(own.url, "CREATE TABLE kept AS SELECT 1 AS one")
    own.stop()
    second = postgres_server_factory(own.data_dir, password="it's new", superuser_password='"\\$')
    second.start()
    assert len(await execute(second.url, "SELECT * FROM kept")) == 1
    assert await execute(second.url_of("postgres", superuser=True), "SELECT 1")


async def test_the_operators_own_settings_are_kept(own: PostgresServer) -> None:
    await execute(own.url_of("postgres", superuser=True), "ALTER SYSTEM SET work_mem = '33MB'")
    own.restart()
    assert (await execute(own.url, "SHOW work_mem"))[0][0] == "33MB"


async def test_the_probe_for_readiness_leaves_no_complaint_in_the_log(own: PostgresServer) -> None:
    await execute(own.url, "SELECT 1")
    own.stop()
    log = (own.data_dir / "postgresql.log").read_text()
    assert "ready to accept connections" in log
    assert not [word for word in ("could not receive", "FATAL", "ERROR") if word in log]


def test_a_run_that_was_killed_while_it_made_the_cluster_is_repaired(
    scratch: Path, free_port: int, postgres_server_factory: Callable[..., PostgresServer]
) -> None:
    folder = scratch / "postgres"
    # The parent stops before the last step: where the machine pauses in between, it would have been through.
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(free_port)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert wait_until((folder / "data.new" / "PG_VERSION").exists, limit_s=LIMIT_S)
        parent.kill()
    assert not (folder / "data").exists()
    server = postgres_server_factory(folder)
    server.start()
    assert server.alive
    assert not (folder / "data.new").exists()


def test_a_pid_file_whose_pid_is_somebody_elses_now_is_stale(own: PostgresServer, scratch: Path) -> None:
    """Somebody of the same user: PostgreSQL itself would take him for the server and refuse to start."""
    own.kill()
    user = postgres_binaries.user_instead_of_root(own.cluster_path)
    stranger = ManagedProcess("stranger", ["/bin/sleep", "600"], log_path=scratch / "stranger.log", run_as=user)
    stranger.start()
    try:
        assert wait_until(lambda: psutil.Process(stranger.pid).name() == "sleep", limit_s=LIMIT_S)
        pid_file = own.cluster_path / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        own.start()
        assert own.alive
        assert stranger.alive
    finally:
        stranger.kill()


def test_a_folder_that_is_being_served_is_refused(
    own: PostgresServer, postgres_server_factory: Callable[..., PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_server, "BACKENDS_GONE_S_MAX", 0.1)
    second = postgres_server_factory(own.data_dir)
    with pytest.raises(ConfigurationError, match=f"pid {own.pid}"):
        second.start()
    assert own.alive


def test_a_folder_of_another_version_says_what_to_do(own: PostgresServer) -> None:
    own.stop()
    (own.cluster_path / "PG_VERSION").write_text("15\n")
    with pytest.raises(ConfigurationError, match=r"PostgreSQL 15.*pg_bin"):
        own.start()


def test_a_folder_that_is_no_cluster_is_left_alone(
    scratch: Path, postgres_server_factory: Callable[..., PostgresServer]
) -> None:
    (scratch / "data").mkdir()
    (scratch / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="no PostgreSQL data folder"):
        postgres_server_factory(scratch).start()
    assert (scratch / "data" / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_is_used(scratch: Path, postgres_server_factory: Callable[..., PostgresServer]) -> None:
    (scratch / "data").mkdir()
    server = postgres_server_factory(scratch)
    server.start()
    assert server.alive


def test_a_wrong_pg_bin_is_told(scratch: Path, postgres_server_factory: Callable[..., PostgresServer]) -> None:
    with pytest.raises(ConfigurationError, match=r"setting pg_bin"):
        postgres_server_factory(pg_bin=str(scratch)).start()


def test_a_given_pg_bin_is_used(postgres_server_factory: Callable[..., PostgresServer]) -> None:
    folder = postgres_binaries.find_binaries("", run_as=postgres_binaries.user_instead_of_root(Path("/none"))).folder
    server = postgres_server_factory(pg_bin=str(folder))
    server.start()
    assert Path(psutil.Process(server.pid).exe()).parent == folder.resolve()


@needs_root
def test_root_is_left_behind_and_no_folder_above_is_opened(own: PostgresServer, scratch: Path) -> None:
    assert psutil.Process(own.pid).uids().real != 0
    assert own.cluster_path.stat().st_uid == psutil.Process(own.pid).uids().real
    assert [path.stat().st_mode & 0o777 for path in (scratch, own.data_dir)] == [0o700, 0o700]
    assert own.data_dir.stat().st_uid == 0


@pytest.fixture
def private_package(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package below a folder that only root may enter."""
    package = postgres_binaries._package_folder()
    for folder in postgres_binaries.FOLDERS_OF_PACKAGE:
        shutil.copytree(package / folder, scratch / "site" / folder, symlinks=True)
    monkeypatch.setattr(postgres_binaries, "_package_folder", lambda: scratch / "site")
    return scratch / "site"


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The places for the copy, in the order of preference; everybody may enter them."""
    with tempfile.TemporaryDirectory(prefix="pulse-test-") as folder:
        Path(folder).chmod(0o755)
        first, second = Path(folder) / "first", Path(folder) / "second"
        second.mkdir()
        monkeypatch.setattr(postgres_binaries, "CACHE_FOLDER", first)
        monkeypatch.setattr(tempfile, "tempdir", str(second))
        yield first, second


@needs_root
def test_programs_in_a_private_folder_are_copied_once(
    private_package: Path, caches: tuple[Path, Path], postgres_server_factory: Callable[..., PostgresServer]
) -> None:
    server = postgres_server_factory()
    server.start()
    [copy] = caches[0].iterdir()
    assert Path(psutil.Process(server.pid).exe()).is_relative_to(copy)
    made = copy.stat().st_ino
    server.restart()
    assert [path.stat().st_ino for path in caches[0].iterdir()] == [made]
    assert private_package.parent.stat().st_mode & 0o777 == 0o700


@needs_root
def test_a_copy_that_others_could_have_made_is_not_run(private_package: Path, caches: tuple[Path, Path]) -> None:
    run_as = postgres_binaries.user_instead_of_root(Path("/none"))
    assert postgres_binaries.find_binaries("", run_as=run_as).folder.is_relative_to(caches[0])
    [copy] = caches[0].iterdir()
    os.chown(copy, 65534, 65534)
    assert postgres_binaries.find_binaries("", run_as=run_as).folder.is_relative_to(caches[1])
