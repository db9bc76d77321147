"""The `pulse` command in processes of its own on a database that a test has, with the tenant acme and its devices."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool, transaction
from pulse.domain.identity import NewDevice
from pulse.domain.presence import PRESENCE_AFTER

PROCESS_S_MAX = 120


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command; it needs PostgreSQL alone."""

    pool: Pool
    folder: Path
    environment: dict[str, str]

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Begin to run it."""
        return subprocess.Popen(
            [sys.executable, "-m", "pulse", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    async def __call__(self, *arguments: str, exit_code: int = 0, stdin: bytes = b"") -> str:
        """Run it to its end; returns stdout, or stderr where it is to fail, which is one line of ours."""
        with self.start(*arguments) as process:
            return await ended(process, exit_code=exit_code, stdin=stdin)

    async def json(self, *arguments: str, stdin: bytes = b"") -> Any:
        """What it prints with --json."""
        return json.loads(await self(*arguments, "--json", stdin=stdin))

    async def logged(self) -> list[tuple[str, str, Any]]:
        """The log of changes: action, target, details."""
        async with transaction(self.pool) as database:
            rows = await database.fetch("SELECT action, target, details, key_id FROM audit_log ORDER BY id")
        assert all(row["key_id"] is None for row in rows)
        return [(row["action"], row["target"], json.loads(row["details"])) for row in rows]


async def ended(process: subprocess.Popen[bytes], *, exit_code: int = 0, stdin: bytes = b"") -> str:
    """What it has said when it has ended: stdout, or stderr where it was to fail."""
    out, err = await asyncio.to_thread(process.communicate, stdin, PROCESS_S_MAX)
    assert process.returncode == exit_code, f"exit code {process.returncode}\n{out.decode()}\n{err.decode()}"
    assert b"Traceback" not in err
    if exit_code == 1:
        assert err.count(b"\n") == 1, err.decode()
    return (err if exit_code else out).decode()


@asynccontextmanager
async def command(database: str, folder: Path, *device_ids: str) -> AsyncIterator[Command]:
    """Migrated, with tenant acme and these devices."""
    async with open_connection(database, timeout_s=10, application_name="test") as migrating:
        await migrate(migrating, available())
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PULSE_")}
    environment = inherited | {"DATABASE_URL": database, "COLUMNS": "160"}
    async with open_pool(database, size_max=2, timeout_s=10, application_name="test") as pool:
        await add_devices(pool, device_ids)
        yield Command(pool=pool, folder=folder, environment=environment)


async def add_devices(pool: Pool, device_ids: Sequence[str]) -> None:
    """Make tenant acme with these."""
    store = IdentityStore(pool, presence_after=PRESENCE_AFTER)
    await store.add_tenant("acme")
    await store.add_devices("acme", [NewDevice(device_id=device_id) for device_id in device_ids])
