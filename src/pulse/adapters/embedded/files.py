"""Files that hold a secret or must never be seen half written."""

from __future__ import annotations

import os
from pathlib import Path

from pulse.domain.errors import ConfigurationError


def write_private(path: Path, text: str, *, owner: tuple[int, int] | None = None) -> None:
    """Write `path` with mode 0600 so that a reader sees the old text or the new, also after a crash.

    `owner` is (uid, gid), for root. Raises ConfigurationError where it cannot be written.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            os.fsync(file.fileno())
        new.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error


def sync_folder(path: Path) -> None:
    """Make the names in the folder `path` as durable as what they name."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
