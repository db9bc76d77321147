"""The data folder of the embedded PostgreSQL: made at once or not at all, found again, refused where it is not ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

from pulse.adapters.embedded.files import sync_folder, write_private
from pulse.adapters.embedded.leftovers import processes_in
from pulse.adapters.embedded.postgres_binaries import Binaries, run_program
from pulse.adapters.embedded.process import RunAs, wait_until
from pulse.domain.access import TENANT_ROLE
from pulse.domain.errors import ConfigurationError

CONFIGURATION_TEMPLATE = Path(__file__).with_name("postgresql.conf")
ACCESS = "host all all 127.0.0.1/32 scram-sha-256\n"
ROLE = DATABASE = "pulse"
SUPERUSER = "postgres"
MAKE_TENANT_ROLE = (
    f"DO $$ BEGIN IF to_regrole('{TENANT_ROLE}') IS NULL THEN CREATE ROLE {TENANT_ROLE} NOLOGIN; END IF; END $$",
    f"GRANT {TENANT_ROLE} TO {ROLE}",
)
"""Made here, so that the role of Pulse needs no right to make roles."""
BUILTIN_LOCALES_SINCE = 17
PROGRAM_S_MAX = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Passwords:
    """Of the role that Pulse works as, and of the superuser."""

    role: str
    superuser: str

    def digest(self) -> str:
        """Of all roles that a cluster has to have: one made before there was another gets it at its next start."""
        return hashlib.sha256(f"{self.role}\n{self.superuser}\n{TENANT_ROLE}".encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A PostgreSQL data folder (PGDATA) at `folder/data`."""

    folder: Path
    binaries: Binaries
    run_as: RunAs | None

    @property
    def path(self) -> Path:
        return self.folder / "data"

    def data_argument(self, path: Path) -> str:
        """What `-D` gets; the program runs with `path` as its working directory.

        As another user, PostgreSQL often may not pass the folders above (`/root` is 0700), but it is in its data
        folder already when it drops to that user. This name leads there without passing them; their modes stay.
        """
        return "/proc/self/cwd" if self.run_as is not None and sys.platform == "linux" else str(path)

    def prepare(self, *, port: int, passwords: Passwords) -> None:
        """Make the cluster where there is none, and bring its configuration and passwords to what they should be.

        No server may be running on it. Raises ConfigurationError where it is of another major version, is no cluster
        at all, or cannot be made.
        """
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()
        if not self.path.exists():
            self._make(passwords)
        self._refuse_other_versions()
        text = Template(CONFIGURATION_TEMPLATE.read_text(encoding="utf-8")).substitute(port=port)
        write_private(self.path / "postgresql.conf", text, owner=self._owner)
        write_private(self.path / "pg_hba.conf", ACCESS, owner=self._owner)
        if self._passwords_file.read_text("ascii") != passwords.digest() if self._passwords_file.exists() else True:
            self._single_user(
                self.path,
                f"ALTER ROLE {SUPERUSER} PASSWORD {_literal(passwords.superuser)}",
                f"ALTER ROLE {ROLE} PASSWORD {_literal(passwords.role)}",
                *MAKE_TENANT_ROLE,
            )
            write_private(self._passwords_file, passwords.digest())

    @property
    def _owner(self) -> tuple[int, int] | None:
        return (self.run_as.uid, self.run_as.gid) if self.run_as else None

    @property
    def _passwords_file(self) -> Path:
        """The digest of the passwords in the cluster, so that a lost secrets file costs a start and not the data."""
        return self.folder / "passwords.sha256"

    def _make(self, passwords: Passwords) -> None:
        """initdb, role and database under another name, then the right name: a kill leaves nothing half made."""
        half = self.folder / "data.new"
        if half.exists():
            # The programs of a killed run end by themselves, at the end of their input; until then they write.
            wait_until(lambda: not processes_in(half, program="postgres"), limit_s=PROGRAM_S_MAX)
            shutil.rmtree(half)
        half.mkdir(mode=0o700)
        if self._owner is not None:
            os.chown(half, *self._owner)
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        self._run(
            half,
            "initdb",
            "-D",
            self.data_argument(half),
            f"--username={SUPERUSER}",
            "--encoding=UTF8",
            "--locale=C",
            *(locale if self.binaries.major >= BUILTIN_LOCALES_SINCE else []),
            "--data-checksums",
            "--auth=reject",
            "--no-instructions",
        )
        self._single_user(
            half,
            f"ALTER ROLE {SUPERUSER} PASSWORD {_literal(passwords.superuser)}",
            f"CREATE ROLE {ROLE} LOGIN PASSWORD {_literal(passwords.role)}",
            *MAKE_TENANT_ROLE,
            f"CREATE DATABASE {DATABASE} OWNER {ROLE}",
        )
        half.rename(self.path)
        write_private(self._passwords_file, passwords.digest())
        sync_folder(self.folder)

    def _refuse_other_versions(self) -> None:
        try:
            found = (self.path / "PG_VERSION").read_text("ascii").strip()
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{self.path} is no PostgreSQL data folder", hint="move it away, or choose another --data-dir"
            ) from error
        if found != str(self.binaries.major):
            raise ConfigurationError(
                f"{self.path} was made by PostgreSQL {found}, and these programs are PostgreSQL {self.binaries.major}",
                hint=f"set pg_bin to the programs of PostgreSQL {found}, or dump with those into a new --data-dir",
            )

    def _single_user(self, path: Path, *statements: str) -> None:
        """Run statements with no server and no network; one line each."""
        data = self.data_argument(path)
        text = "\n".join(statements) + "\n"
        self._run(path, "postgres", "--single", "-D", data, "-c", "exit_on_error=on", SUPERUSER, standard_input=text)

    def _run(self, path: Path, program: str, *arguments: str, standard_input: str = "") -> None:
        try:
            result = run_program(
                [self.binaries.program(program), *arguments],
                folder=path,
                run_as=self.run_as,
                limit_s=PROGRAM_S_MAX,
                standard_input=standard_input,
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigurationError(
                f"{program} did not end within {PROGRAM_S_MAX:g} s", hint=f"folder {path}"
            ) from error
        if result.returncode != 0:
            words = result.stderr.strip().splitlines()
            raise ConfigurationError(
                f"{program} failed in {path}", hint=words[-1] if words else f"exit code {result.returncode}"
            )


def _literal(password: str) -> str:
    if not password.isprintable():
        raise ConfigurationError("a password for PostgreSQL must be one printable line")
    return "'" + password.replace("'", "''") + "'"
