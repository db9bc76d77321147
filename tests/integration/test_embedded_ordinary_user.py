"""Both servers for a user who is not root; where the tests are run by one, every other test says the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pulse.adapters.embedded.ports import free_port

ROOT = Path(__file__).parents[2]
NOBODY = 65534
LIMIT_S = 150.0

SCRIPT = """
import os, sys
from pathlib import Path
import psutil
from pulse.adapters.embedded.data_folder import DataFolder
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer

assert os.geteuid() == 65534
ports = [int(port) for port in sys.argv[2:]]
for attempt in ("new", "found again"):
    with DataFolder(Path(sys.argv[1])) as folder:
        secrets = folder.secrets()
        nats = NatsServer(folder.nats, port=ports[0], monitor_port=ports[1], password=secrets.nats_password)
        postgres = PostgresServer(
            folder.postgres,
            port=ports[2],
            password=secrets.postgresql_password,
            superuser_password=secrets.postgresql_superuser_password,
        )
        nats.start()
        postgres.start()
        assert {psutil.Process(server.pid).uids().real for server in (nats, postgres)} == {65534}
        nats.restart()
        postgres.kill()
        postgres.start()
        nats.stop()
        postgres.stop()
print("both served", flush=True)
"""


@pytest.fixture
def environment() -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), sysconfig.get_path("purelib")]),
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture
def python(environment: dict[str, str]) -> str:
    """A Python that user `nobody` can run with what it needs."""
    probe = "import sys, psutil, structlog, pulse.domain.errors; assert sys.version_info >= (3, 11)"
    for candidate in (sys.executable, shutil.which("python3", path=os.defpath)):
        if candidate is None:
            continue
        try:
            result = run_as_nobody([candidate, "-c", probe], environment, Path("/"))
        except PermissionError:
            continue
        if result.returncode == 0:
            return candidate
    pytest.skip("there is no Python here that another user could run")


@pytest.fixture
def home_of_nobody() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pulse nobody ") as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield Path(folder)


def run_as_nobody(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd=folder,
        env=environment | {"HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_an_ordinary_user_runs_both_servers(python: str, environment: dict[str, str], home_of_nobody: Path) -> None:
    # Ports of this process of the run: what it looked for itself could be another one's, not yet listened on.
    ports = [str(free_port()) for _ in range(3)]
    result = run_as_nobody([python, "-c", SCRIPT, str(home_of_nobody / "data"), *ports], environment, home_of_nobody)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.endswith("both served\n")
