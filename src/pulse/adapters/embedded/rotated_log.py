"""A log file of bounded size with a bounded number of older generations."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self


class RotatedLog:
    """Appends bytes to `path`; at `bytes_max` it becomes `path.1`, that one `path.2`, up to `generations`.

    At most `bytes_max * (generations + 1)` bytes on disk. Not for several threads. Every method may raise OSError.
    """

    def __init__(self, path: Path, *, bytes_max: int, generations: int) -> None:
        self.path = path
        self._bytes_max = bytes_max
        self._generations = generations
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, output: bytes) -> None:
        """Append all of `output`, over as many generations as it needs."""
        rest = memoryview(output)
        while rest:
            room = self._bytes_max - self._size
            if room <= 0:
                self._rotate()
                continue
            written = os.write(self._file, rest[:room])
            self._size += written
            rest = rest[written:]

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> int:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(file).st_size
        return file

    def _rotate(self) -> None:
        self.close()
        for number in range(self._generations, 0, -1):
            older = self._generation(number - 1)
            if older.exists():
                older.replace(self._generation(number))
        if not self._generations:
            self.path.unlink(missing_ok=True)
        self._file = self._open()

    def _generation(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path
