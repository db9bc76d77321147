"""The data folder of `pulse up`: one owner at a time, its secrets, and how other commands find the system."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import secrets
import signal
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from pulse.adapters.embedded.files import write_private
from pulse.adapters.embedded.leftovers import stop_leftovers
from pulse.domain.errors import ConfigurationError

INSTANCE_FILE = "instance.toml"
SECRETS_FILE = "secrets.toml"
LOCK_FILE = "lock"
SECRET_BYTES = 24
LEFTOVERS_S_MAX = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """The passwords of the embedded servers, what the key is made of that lets devices in, and what secrets of webhooks
    are sealed with; made once a folder.
    """

    nats_password: str
    mqtt_bridge_password: str
    mqtt_access_password: str
    mqtt_issuer_secret: str
    postgresql_password: str
    postgresql_superuser_password: str
    sealing_key: str

    def __repr__(self) -> str:
        return "Secrets(********)"


class DataFolder:
    """A context: inside it, the folder is ours, and no server of an earlier run works in it.

    nats/   postgresql's postgres/   log/     what the servers keep
    lock                                      held while `pulse up` runs; says its pid
    secrets.toml                              0600, made once
    instance.toml                             0600, there while the system is up
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.nats = self.path / "nats"
        self.postgres = self.path / "postgres"
        self.log = self.path / "log"
        self._lock = -1

    def __enter__(self) -> Self:
        """Lock the folder, making it where it is not there, and stop the servers that a killed run left in it.

        Raises ConfigurationError where another `pulse up` has it (with its pid), or it belongs to another user or
        cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._acquire()
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._prepare()
        except OSError as error:
            self._release()
            raise self._unusable(error) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove `instance.toml` and give the folder back; the servers must have been stopped."""
        self.remove_instance()
        self._release()

    def secrets(self) -> Secrets:
        """The secrets; made at the first call in a new folder, and those that an older version did not know.

        Raises ConfigurationError for a damaged file. Without the file, new ones are made and the servers take them.
        """
        path = self.path / SECRETS_FILE
        try:
            found = tomllib.loads(path.read_text("utf-8")) if path.exists() else {}
        except OSError as error:
            raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{path} is damaged", hint="remove it: new passwords are made, the data stay"
            ) from error
        names = [field.name for field in fields(Secrets)]
        values = {name: str(found.get(name) or secrets.token_urlsafe(SECRET_BYTES)) for name in names}
        if not values.keys() <= found.keys():
            _write_toml(path, values)
        return Secrets(**values)

    def write_instance(self, settings: Mapping[str, str | int]) -> None:
        """Tell the other commands where the running system is: these settings, by name."""
        _write_toml(self.path / INSTANCE_FILE, settings)

    def remove_instance(self) -> None:
        """The system is not up, or not any more."""
        (self.path / INSTANCE_FILE).unlink(missing_ok=True)

    def _prepare(self) -> None:
        # A data folder that was there before us keeps its mode: what is private in it is so by itself.
        for folder in (self.nats, self.postgres, self.log):
            folder.mkdir(exist_ok=True, mode=0o700)
        self.remove_instance()
        stop_leftovers(self.nats, program="nats-server", stop_signal=signal.SIGTERM, limit_s=LEFTOVERS_S_MAX)
        stop_leftovers(self.postgres / "data", program="postgres", stop_signal=signal.SIGINT, limit_s=LEFTOVERS_S_MAX)

    def _unusable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"cannot use the data folder {self.path}: {error.strerror}", hint="choose another with --data-dir"
        )

    def _acquire(self) -> None:
        lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._refuse_other_users(os.fstat(lock).st_uid)
            # Held by the open file, not by a name or pid: the kernel drops it with the process, come what may.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(lock, 32, 0).decode("ascii", errors="replace").strip()
            os.close(lock)
            raise ConfigurationError(
                f"another `pulse up` runs in {self.path}" + (f" (pid {pid})" if pid else ""),
                hint="stop it, or choose another folder with --data-dir",
            ) from error
        except BaseException:
            os.close(lock)
            raise
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)
        self._lock = lock

    def _refuse_other_users(self, owner: int) -> None:
        """Files of two users in one folder would lock out the first at its next start."""
        if owner == os.geteuid():
            return
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = f"uid {owner}"
        raise ConfigurationError(
            f"the data folder {self.path} belongs to a `pulse up` of user {name}",
            hint=f"run as {name}, or choose another folder with --data-dir",
        )

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _write_toml(path: Path, values: Mapping[str, str | int]) -> None:
    # A JSON string is a TOML basic string, and so is a JSON integer a TOML one.
    write_private(
        path, "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
    )
