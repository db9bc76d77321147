"""Fixtures of the end-to-end tests: the real command in a real process.

running    one `pulse up` for the session, to be left up: `running.pulse("audit")`, `running.send({"n": 1})`,
           `running.gateway_url`, `.nats_url`, `.database_url`, `.token`, `.environment`, `.folder`, `.data_dir`;
           `running.command("tail")` is a command line for a Popen with `cwd=running.folder`
instance   one of the test's own, not started yet, to be killed at will
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_dir import DATA_DIR
from pulse_up import Instance, prepare

SETTINGS = {
    "webhook_networks_allowed": "127.0.0.0/8", "route_retry_s_min": "0.2", "route_retry_s_max": "1",
    "route_circuit_s_min": "0.5", "route_circuit_s_max": "2",
}  # fmt: skip
"""Of `running`: webhooks may go to a server of a test's, and what fails is tried again soon."""


@pytest.fixture(scope="session")
def running() -> Iterator[Instance]:
    """A running instance that all tests of the session share; a test counts only what it sent itself."""
    with (
        tempfile.TemporaryDirectory(prefix="pulse up ", dir=DATA_DIR, ignore_cleanup_errors=True) as folder,
        ending(prepare(Path(folder), settings=SETTINGS)) as up,
    ):
        up.start()
        yield up


@pytest.fixture
def instance(scratch: Path) -> Iterator[Instance]:
    """An instance that is not started; whatever becomes of it, nothing is left after the test."""
    with ending(prepare(scratch)) as mine:
        yield mine


@contextmanager
def ending(made: Instance) -> Iterator[Instance]:
    """Whatever becomes of it, nothing of it is left."""
    try:
        yield made
    finally:
        made.end()
