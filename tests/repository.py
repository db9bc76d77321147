"""The files of this checkout, found without git, so that a downloaded archive is tested like a clone."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _ignored_names() -> list[str]:
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return [".git", *(line.strip("/") for line in lines)]


def files(folder: Path = ROOT) -> list[Path]:
    """Every file below `folder` that .gitignore lets in; its lines are plain names or patterns of names."""
    ignored = _ignored_names()
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if any(fnmatch(entry.name, pattern) for pattern in ignored):
            continue
        if entry.is_dir() and not entry.is_symlink():
            found += files(entry)
        else:
            found.append(entry)
    return found


def copy(destination: Path) -> None:
    """Copy the checkout to `destination`, as a fresh clone would be: no .venv, no caches, no data."""
    for source in files():
        target = destination / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
