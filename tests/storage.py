"""The same storage tests on PostgreSQL alone and on PostgreSQL with TimescaleDB.

    pytestmark = ON_BOTH        in a module whose tests use `database`, or a fixture that does

TimescaleDB is looked for in PULSE_TEST_TIMESCALE_BIN (a folder with `postgres` and `initdb`), and where Debian puts
PostgreSQL; `.ci/run` builds it. Where there is none, these tests are skipped, and the last line of the run says so.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from pulse.adapters.embedded import ports
from pulse.adapters.embedded.postgres_server import PostgresServer

ON_BOTH = pytest.mark.parametrize("database", ["native", "timescale"], indirect=True)

VARIABLE = "PULSE_TEST_TIMESCALE_BIN"
DEBIAN = Path("/usr/lib/postgresql")
NOT_HERE = "TimescaleDB is not installed"
CONFIGURATION = """
shared_preload_libraries = 'timescaledb'
timescaledb.telemetry_level = 'off'
timescaledb.max_background_workers = 0
"""


def find_timescale() -> Path | None:
    """The folder with the programs of a PostgreSQL that has TimescaleDB, the newest first."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    versions = sorted(DEBIAN.glob("*/bin/pg_config"), key=lambda path: int(path.parts[-3]), reverse=True)
    return next((program.parent for program in versions if _has_timescale(program)), None)


@contextmanager
def timescale(folder: Path, *, password: str, superuser_password: str) -> Iterator[PostgresServer]:
    """A running server in `folder` whose databases can have the extension; skips the test where there can be none."""
    programs = find_timescale()
    if programs is None:
        pytest.skip(NOT_HERE)
    folder.chmod(
        0o711
    )  # the initdb of PostgreSQL before 16 looks at its folder from above, as the user that it runs as
    server = PostgresServer(
        folder,
        port=ports.free_port(),
        password=password,
        superuser_password=superuser_password,
        pg_bin=str(programs),
    )
    server.start()
    try:
        with (server.cluster_path / "postgresql.auto.conf").open("a", encoding="ascii") as configuration:
            configuration.write(CONFIGURATION)
        server.restart()
        yield server
    finally:
        server.kill()


async def add_extension(url: str) -> None:
    """Put TimescaleDB into this database; `url` is an administrator's."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CREATE EXTENSION timescaledb")
    finally:
        await connection.close()


def _has_timescale(pg_config: Path) -> bool:
    found = subprocess.run([str(pg_config), "--sharedir"], capture_output=True, text=True, check=True, timeout=10)
    return (Path(found.stdout.strip()) / "extension" / "timescaledb.control").exists()
