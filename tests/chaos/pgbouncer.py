"""A real PgBouncer in transaction mode between a role and PostgreSQL, which a test may stop and starve."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from compose_server import container_environment, program
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.embedded.process import ManagedProcess, RunAs

HOST = "127.0.0.1"
NOBODY = RunAs(uid=65534, gid=65534, name="nobody")
SETTINGS = """
[databases]
* = host={host} port={postgres_port} user={user} password={password}

[pgbouncer]
listen_addr = {host}
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/userlist.txt
pool_mode = transaction
max_client_conn = 100
default_pool_size = 4
query_wait_timeout = 1
server_login_retry = 1
server_connect_timeout = 1
"""


@dataclass(kw_only=True)
class PgBouncer:
    """One that listens on `port`; `url` leads through it to the database `pulse` of the server `behind`."""

    folder: Path
    port: int
    behind: PostgresServer
    process: ManagedProcess

    @property
    def url(self) -> str:
        parts = urlsplit(self.behind.url)
        credentials, _, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{credentials}@{HOST}:{self.port}"))

    def change(self, before: str, after: str) -> None:
        """Change a piece of its settings; a running one reads them at once."""
        path = self.folder / "pgbouncer.ini"
        text = path.read_text("utf-8")
        assert text.count(before) == 1, before
        path.write_text(text.replace(before, after), "utf-8")
        if self.process.alive and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGHUP)


@contextmanager
def pgbouncer(postgres: PostgresServer, *, log_folder: Path) -> Iterator[PgBouncer]:
    """A running one in front of `postgres`; skips, saying so, where there is no PgBouncer. Ends with the block."""
    binary = program("pgbouncer", install="apt install pgbouncer")
    parts = urlsplit(postgres.url)
    port = ports.free_port()
    # In a folder that another user may enter: it refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="pulse-pgbouncer-"))
    text = SETTINGS.format(
        host=HOST, postgres_port=parts.port, port=port, folder=folder, user=parts.username, password=parts.password
    )
    (folder / "pgbouncer.ini").write_text(text, "utf-8")
    (folder / "userlist.txt").write_text(f'"{parts.username}" "{parts.password}"\n', "utf-8")
    run_as = NOBODY if os.geteuid() == 0 else None
    if run_as is not None:
        for path in (folder, *folder.iterdir()):
            os.chown(path, run_as.uid, run_as.gid)
    process = ManagedProcess(
        "pgbouncer",
        [binary, str(folder / "pgbouncer.ini")],
        log_path=log_folder / "pgbouncer.log",
        ready=lambda: _listens(port),
        environment=container_environment(folder),
        working_directory=folder,
        run_as=run_as,
    )
    made = PgBouncer(folder=folder, port=port, behind=postgres, process=process)
    process.start()
    try:
        yield made
    finally:
        process.kill()
        shutil.rmtree(folder)


def _listens(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False
