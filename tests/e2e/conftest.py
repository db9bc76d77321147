"""Fixtures of the end-to-end tests: the real command in a real process.

running    one `pulse up` for the session, to be left up: `running.pulse("audit")`, `running.send({"n": 1})`,
           `running.gateway_url`, `.nats_url`, `.database_url`, `.token`, `.environment`, `.folder`, `.data_dir`;
           `running.command("tail")` is a command line for a Popen with `cwd=running.folder`
instance   one of the test's own, not started yet, to be killed at will
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_dir import DATA_DIR
from pulse_up import Instance, prepare, started


@pytest.fixture(scope="session")
def running() -> Iterator[Instance]:
    """A running instance that all tests of the session share; a test counts only what it sent itself."""
    with (
        tempfile.TemporaryDirectory(prefix="pulse up ", dir=DATA_DIR, ignore_cleanup_errors=True) as folder,
        started(Path(folder)) as up,
    ):
        yield up


@pytest.fixture
def instance(scratch: Path) -> Iterator[Instance]:
    """An instance that is not started; whatever becomes of it, nothing is left after the test."""
    mine = prepare(scratch)
    try:
        yield mine
    finally:
        mine.end()
