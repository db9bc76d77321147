"""Fixtures for everyone: a real PostgreSQL (one a session, a fresh database a test) and a fresh nats-server a test.

    database                   the URL of a fresh, empty database as role `pulse`; dropped after the test
    nats                       a fresh nats-server with a store of its own; `nats.url`, `nats.kill()`, `nats.restart()`
    nats_server_factory        makes more of them
    timescale_server           the same with TimescaleDB, where the machine has it
    postgres_server            the session's PostgreSQL: leave it running
    postgres_server_factory    makes PostgreSQL servers that a test may kill
    free_port                  a port on loopback that nobody listens on

All of them end with pytest, also when it is killed: the kernel tells each child of its parent's death.
"""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import asyncpg
import hypothesis
import pytest

from data_dir import DATA_DIR
from not_run import pytest_terminal_summary  # noqa: F401 - a hook: pytest finds it here
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from storage import add_extension, timescale

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs us in the background has it ignored, and so would the commands that a test ends by Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

NatsServerFactory = Callable[..., NatsServer]
PostgresServerFactory = Callable[..., PostgresServer]

PASSWORD = secrets.token_urlsafe(16)
SUPERUSER_PASSWORD = secrets.token_urlsafe(16)

_database_number = itertools.count(1)

# Nobody listens yet on a port that was just found free, so the processes of one run look for theirs apart.
_worker, _workers = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
ports.UNCLAIMED_PORTS = range(15_000 + 16 * int(_worker[2:]), 32_000, 16 * int(_workers))

# How long an example takes depends on what else the machine does; pytest's own timeout bounds a test.
hypothesis.settings.register_profile(
    "pulse", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("pulse")


@pytest.fixture
def free_port() -> int:
    """A port on loopback that nobody listens on."""
    return ports.free_port()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that is gone after the test; unlike tmp_path, which keeps the stores of three sessions."""
    with tempfile.TemporaryDirectory(prefix="pulse test ", dir=DATA_DIR, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[Path]:
    """A stopped cluster; copying it takes a tenth of what making one does. Its passwords are the two above."""
    with tempfile.TemporaryDirectory(prefix="pulse postgres ", dir=DATA_DIR, ignore_cleanup_errors=True) as folder:
        server = PostgresServer(
            Path(folder), port=ports.free_port(), password=PASSWORD, superuser_password=SUPERUSER_PASSWORD
        )
        server.start()
        server.stop()
        # Within the folder: what a killed server leaves in /dev/shm nobody would sweep.
        with (Path(folder) / "postgresql.auto.conf").open("a", encoding="utf-8") as settings:
            settings.write("dynamic_shared_memory_type = mmap\n")
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres_server(postgres_template: Path) -> Iterator[PostgresServer]:
    """One PostgreSQL for the session; use `database`, and `postgres_server_factory` for one that you may kill."""
    with tempfile.TemporaryDirectory(prefix="pulse postgres ", dir=DATA_DIR, ignore_cleanup_errors=True) as folder:
        _copy_cluster(postgres_template, Path(folder))
        server = PostgresServer(
            Path(folder), port=ports.free_port(), password=PASSWORD, superuser_password=SUPERUSER_PASSWORD
        )
        server.start()
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="session")
def timescale_server() -> Iterator[PostgresServer]:
    """One PostgreSQL with TimescaleDB for the session; skips where the machine has none."""
    with (
        tempfile.TemporaryDirectory(prefix="pulse postgres ", dir=DATA_DIR, ignore_cleanup_errors=True) as folder,
        timescale(Path(folder), password=PASSWORD, superuser_password=SUPERUSER_PASSWORD) as server,
    ):
        yield server


@pytest.fixture
async def database(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of a fresh, empty database that role `pulse` owns; dropped after the test, whoever is still connected.

    With the parameter "timescale" (`storage.ON_BOTH`) it is on a server with TimescaleDB, and has the extension.
    """
    kind = getattr(request, "param", "native")
    server: PostgresServer = request.getfixturevalue("timescale_server" if kind == "timescale" else "postgres_server")
    name = f"test_{next(_database_number)}"
    administrator = server.url_of("postgres", superuser=True)
    connection = await asyncpg.connect(administrator)
    try:
        await connection.execute(f"CREATE DATABASE {name} OWNER pulse")
    finally:
        await connection.close()
    if kind == "timescale":
        await add_extension(server.url_of(name, superuser=True))
    yield server.url_of(name)
    connection = await asyncpg.connect(administrator)
    try:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


@pytest.fixture
def postgres_server_factory(scratch: Path, postgres_template: Path) -> Iterator[PostgresServerFactory]:
    """Call it for a server of the test's own, then `start()` it; it ends with the test.

    Takes options of PostgresServer. Without a folder it gets a new one with a cluster in it; a given one is used as is.
    """
    with ExitStack() as servers:

        def make(folder: Path | None = None, **options: object) -> PostgresServer:
            if folder is None:
                folder = Path(tempfile.mkdtemp(dir=scratch))
                _copy_cluster(postgres_template, folder)
            given = {
                "port": ports.free_port(),
                "password": PASSWORD,
                "superuser_password": SUPERUSER_PASSWORD,
            }
            server = PostgresServer(folder, **(given | options))  # type: ignore[arg-type]
            servers.callback(server.kill)
            return server

        yield make


@pytest.fixture
def nats_server_factory(scratch: Path) -> Iterator[NatsServerFactory]:
    """Call it with a folder (default: a new one) and options of NatsServer; `start()` it; it ends with the test."""
    with ExitStack() as servers:

        def make(folder: Path | None = None, **options: object) -> NatsServer:
            given = {
                "port": ports.free_port(),
                "monitor_port": ports.free_port(),
                "password": secrets.token_urlsafe(16),
            }
            server = NatsServer(folder or Path(tempfile.mkdtemp(dir=scratch)), **(given | options))  # type: ignore[arg-type]
            servers.callback(server.kill)
            return server

        yield make


@pytest.fixture
def nats(nats_server_factory: NatsServerFactory) -> NatsServer:
    """A fresh nats-server with an empty store; it starts faster than streams can be wiped, and may be killed."""
    server = nats_server_factory()
    server.start()
    return server


def _copy_cluster(template: Path, folder: Path) -> None:
    # `cp -a` keeps the owner, who is not us where we are root.
    subprocess.run(["cp", "-a", f"{template}/data", f"{template}/passwords.sha256", str(folder)], check=True)
