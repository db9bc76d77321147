"""Where the servers of the tests keep their data: in memory where there is enough of it, else in the temp folder.

A kill -9 is survived by the one as by the other; that an fsync reaches a disk, no test here could show.
"""

from __future__ import annotations

import shutil
from pathlib import Path

MEMORY = Path("/dev/shm")  # noqa: S108 - a file system, below which each test has a folder of its own
MEMORY_BYTES_MIN = 4 * 1024**3
DATA_DIR = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES_MIN else None
