"""An embedded PostgreSQL: every commit on disk, loopback only, a role and a database for Pulse."""

from __future__ import annotations

import signal
import socket
import struct
from pathlib import Path
from urllib.parse import quote

from pulse.adapters.embedded.leftovers import processes_in
from pulse.adapters.embedded.postgres_binaries import environment, find_binaries, user_instead_of_root
from pulse.adapters.embedded.postgres_cluster import DATABASE, ROLE, SUPERUSER, Cluster, Passwords
from pulse.adapters.embedded.process import ManagedProcess, wait_until
from pulse.domain.errors import ConfigurationError

HOST = "127.0.0.1"
PROGRAM = "postgres"
PROTOCOL_3_0 = 196608
ASK_TIMEOUT_S = 1.0
ANSWER_BYTES_MAX = 4096
BACKENDS_GONE_S_MAX = 10.0
"""The backends of a killed postmaster see it at once and end by themselves, one in the middle of a write after it."""


class PostgresServer:
    """One PostgreSQL over one data folder.

    `password` is that of the role `pulse`, which owns the database `pulse`. `data_dir` holds the cluster in `data/`.
    As root, the server runs as another user (see `user_instead_of_root`).
    """

    name = "postgresql"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int,
        password: str,
        superuser_password: str,
        log_dir: Path | None = None,
        pg_bin: str = "",
        ready_s_max: float = 120.0,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self._pg_bin = pg_bin
        self._passwords = Passwords(role=password, superuser=superuser_password)
        self._log_path = (log_dir or self.data_dir).absolute() / "postgresql.log"
        self._ready_s_max = ready_s_max
        self.process: ManagedProcess | None = None

    @property
    def url(self) -> str:
        """The database of Pulse as its role, password included."""
        return self.url_of(DATABASE)

    def url_of(self, database: str, *, superuser: bool = False) -> str:
        """Any database, as the role of Pulse or as the superuser, password included.

        Says that there is no TLS: a client that tries first pays a round trip, and looks for certificates in its home.
        """
        user, password = (SUPERUSER, self._passwords.superuser) if superuser else (ROLE, self._passwords.role)
        credentials = f"{user}:{quote(password, safe='')}"
        return f"postgresql://{credentials}@{HOST}:{self.port}/{quote(database, safe='')}?sslmode=disable"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    @property
    def pid(self) -> int | None:
        """Of the postmaster."""
        return self.process.pid if self.process else None

    @property
    def cluster_path(self) -> Path:
        return self.data_dir / "data"

    def start(self) -> None:
        """Make the cluster where there is none, start, and return when it takes connections; recovery included.

        Raises ConfigurationError for what the operator has to mend, Outage where the server does not get ready.
        """
        self._clear_predecessor()
        try:
            self.process = self._prepare()
        except OSError as error:
            raise ConfigurationError(f"cannot use {self.data_dir}: {error.strerror}") from error
        self.process.start()

    def stop(self, limit_s: float = 30.0) -> None:
        """Stop within `limit_s`, by force at its end: that costs the next start a recovery and nothing else."""
        if self.process is not None:
            self.process.stop(limit_s)
            self._wait_for_backends()

    def kill(self) -> None:
        """SIGKILL to the postmaster, as a crash would end it; returns when its backends are gone too."""
        if self.process is not None:
            self.process.kill()
            self._wait_for_backends()

    def restart(self) -> None:
        """Stop where it runs, and start."""
        self.stop()
        self.start()

    def describe_exit(self) -> str:
        """How the last run ended."""
        return self.process.describe_exit() if self.process else "never started"

    def _prepare(self) -> ManagedProcess:
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.cluster_path / "postmaster.pid").unlink(missing_ok=True)
        run_as = user_instead_of_root(self.cluster_path)
        cluster = Cluster(folder=self.data_dir, binaries=find_binaries(self._pg_bin, run_as=run_as), run_as=run_as)
        cluster.prepare(port=self.port, passwords=self._passwords)
        return ManagedProcess(
            self.name,
            [cluster.binaries.program(PROGRAM), "-D", cluster.data_argument(cluster.path)],
            log_path=self._log_path,
            ready=self._ready,
            ready_s_max=self._ready_s_max,
            environment=environment(),
            working_directory=cluster.path,
            run_as=run_as,
            stop_signal=signal.SIGINT,  # fast shutdown: sessions are ended, then a checkpoint
            orphan_signal=signal.SIGQUIT,  # at once, and the next start replays the log: a checkpoint has no bound
        )

    def _wait_for_backends(self) -> bool:
        return wait_until(lambda: not processes_in(self.cluster_path, program=PROGRAM), limit_s=BACKENDS_GONE_S_MAX)

    def _clear_predecessor(self) -> None:
        """Wait for the last backends of a killed server; then its pid file is stale, whoever has that pid now."""
        if not self._wait_for_backends():
            pid = processes_in(self.cluster_path, program=PROGRAM)[0].pid
            raise ConfigurationError(
                f"PostgreSQL with pid {pid} runs on {self.cluster_path} already", hint="stop it first"
            )

    def _ready(self) -> bool:
        return self._says_ready() and self._takes_connections()

    def _says_ready(self) -> bool:
        """Whether postmaster.pid is of our child, no stranger's, and its eighth line says `ready`: out of recovery."""
        try:
            lines = (self.cluster_path / "postmaster.pid").read_text("utf-8").splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _takes_connections(self) -> bool:
        """Whether a startup packet is answered with an authentication request, as pg_isready asks it (protocol 3.0)."""
        parameters = f"user\0{ROLE}\0database\0{DATABASE}\0\0".encode()
        packet = struct.pack("!ii", 8 + len(parameters), PROTOCOL_3_0) + parameters
        try:
            with socket.create_connection((HOST, self.port), timeout=ASK_TIMEOUT_S) as connection:
                connection.sendall(packet)
                # All of the answer: closing on unread bytes is a reset, which PostgreSQL logs.
                return connection.recv(ANSWER_BYTES_MAX).startswith(b"R")
        except OSError:
            return False
