"""What can be wrong with PostgreSQL while it, or PgBouncer before it, is still there; each as a block that it lasts."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg
import pytest

from chaos.load import DEVICES, TENANT
from chaos.pgbouncer import PgBouncer
from chaos.system import eventually, freeze
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.domain.errors import Outage

DISK_MB = 640
"""A cluster is 50 MB; its write-ahead log of half a minute's load is never recycled (max_wal_size is far larger)."""
END_BACKENDS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pulse'"


async def as_superuser(postgres: PostgresServer, *statements: str) -> None:
    """Run each in a transaction of its own."""
    connection = await asyncpg.connect(postgres.url_of("pulse", superuser=True))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@asynccontextmanager
async def stopped(postgres: PostgresServer) -> AsyncIterator[None]:
    await asyncio.to_thread(postgres.stop)
    yield
    await asyncio.to_thread(postgres.start)


@asynccontextmanager
async def frozen(postgres: PostgresServer) -> AsyncIterator[None]:
    """Connections stand and are taken, and nothing answers: what a dead disk or network looks like."""
    assert postgres.pid is not None
    thaw = freeze(postgres.pid)
    try:
        yield
    finally:
        thaw()


@asynccontextmanager
async def data_disk_full(postgres: PostgresServer) -> AsyncIterator[None]:
    """Not a byte for one more row; the write-ahead log goes on in the segments that it has."""
    with filled(postgres.data_dir):
        yield


@asynccontextmanager
async def log_disk_full(postgres: PostgresServer) -> AsyncIterator[None]:
    """The next segment of the write-ahead log cannot be made: PostgreSQL panics, and cannot come back by itself."""
    with filled(postgres.data_dir):
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await _use_up_log(postgres)

        async def ended() -> bool:
            return not postgres.alive

        await eventually(ended, "PostgreSQL has panicked")
        yield

    async def back() -> bool:
        """Its recovery may still find no room: the file system frees blocks when it likes."""
        await asyncio.to_thread(postgres.stop)
        try:
            await asyncio.to_thread(postgres.start)
        except Outage:
            return False
        return True

    await eventually(back, "PostgreSQL is back")


async def _use_up_log(postgres: PostgresServer) -> None:
    for _ in range(100):
        # nothing is logged, nothing is switched
        await as_superuser(postgres, "SELECT pg_logical_emit_message(true, '', 'x')", "SELECT pg_switch_wal()")


@asynccontextmanager
async def read_only(postgres: PostgresServer) -> AsyncIterator[None]:
    """As a standby after a failover: each write is 25006."""
    await as_superuser(postgres, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    yield
    await as_superuser(postgres, "SET default_transaction_read_only = off", "ALTER SYSTEM RESET ALL")
    await as_superuser(postgres, "SELECT pg_reload_conf()")


@asynccontextmanager
async def no_connection_left(postgres: PostgresServer) -> AsyncIterator[None]:
    """All of `max_connections` are somebody else's."""
    held: list[asyncpg.Connection[asyncpg.Record]] = []
    ender = await asyncpg.connect(postgres.url_of("postgres", superuser=True))
    try:
        await ender.execute("ALTER ROLE pulse CONNECTION LIMIT 0")
        await ender.execute(END_BACKENDS)
        with pytest.raises(asyncpg.TooManyConnectionsError):
            await _connect_until_refused(postgres, held)
        # What is left now is reserved for superusers.
        for _ in range(2):
            await held.pop().close()
        await ender.execute("ALTER ROLE pulse CONNECTION LIMIT -1")
        yield
    finally:
        for connection in (ender, *held):
            await connection.close()


async def _connect_until_refused(postgres: PostgresServer, held: list[asyncpg.Connection[asyncpg.Record]]) -> None:
    while len(held) < 200:
        held.append(await asyncpg.connect(postgres.url_of("postgres", superuser=True)))


@asynccontextmanager
async def role_out_of_connections(postgres: PostgresServer) -> AsyncIterator[None]:
    """PostgreSQL has room, and the role may have none of it."""
    await as_superuser(postgres, "ALTER ROLE pulse CONNECTION LIMIT 0", END_BACKENDS)
    yield
    await as_superuser(postgres, "ALTER ROLE pulse CONNECTION LIMIT -1")


@asynccontextmanager
async def deadlocked(postgres: PostgresServer) -> AsyncIterator[None]:
    """Somebody holds the last row of device_state that a batch wants, and wants the first one that it holds.

    Of the two, the worker's deadlock check is the first to strike, so its transaction is the victim.
    """
    blocker = await asyncpg.connect(postgres.url_of("pulse", superuser=True))
    other = await asyncpg.connect(postgres.url_of("pulse", superuser=True))
    await blocker.execute("SET deadlock_timeout = '1h'")
    *first, last = sorted(f"d{number}" for number in range(DEVICES))
    lock = "SELECT FROM device_state WHERE tenant_id = $1 AND device_id = ANY($2) ORDER BY device_id FOR UPDATE"

    async def somebody_waits() -> bool:
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> $1"
        return bool(await other.fetchval(waits, blocker.get_server_pid()))

    async def worker_holds_some_of_the_first() -> bool:
        """Its batch had more than the last device in it: otherwise it is let go, and the next one will."""
        try:
            async with other.transaction():
                await other.fetch(f"{lock} NOWAIT", TENANT, first)
        except asyncpg.LockNotAvailableError:
            return True
        return False

    try:
        while True:
            async with blocker.transaction():
                await blocker.fetch(lock, TENANT, [last])
                await eventually(somebody_waits, "the worker waits")
                if not await worker_holds_some_of_the_first():
                    continue
                await blocker.fetch(lock, TENANT, first, timeout=20)
                yield
                return
    finally:
        await blocker.close()
        await other.close()


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """A file that takes all that the file system has left, to its last block."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of DISK_MB in `folder`; skips, saying so, where it cannot be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m,mode=0755", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here (it takes root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@asynccontextmanager
async def bouncer_stopped(bouncer: PgBouncer) -> AsyncIterator[None]:
    await asyncio.to_thread(bouncer.process.kill)
    yield
    await asyncio.to_thread(bouncer.process.start)


@asynccontextmanager
async def postgres_stopped_behind(bouncer: PgBouncer) -> AsyncIterator[None]:
    async with stopped(bouncer.behind):
        yield


@asynccontextmanager
async def pool_taken(bouncer: PgBouncer) -> AsyncIterator[None]:
    """Every server connection is lent to somebody's long transaction: `query_wait_timeout`."""
    held = []
    try:
        for _ in range(4):
            connection = await asyncpg.connect(bouncer.url, statement_cache_size=0)
            await connection.execute("BEGIN")
            held.append(connection)
        yield
    finally:
        for connection in held:
            await connection.close()


@asynccontextmanager
async def no_client_connection_left(bouncer: PgBouncer) -> AsyncIterator[None]:
    """`no more connections allowed (max_client_conn)`."""
    await asyncio.to_thread(bouncer.process.kill)
    bouncer.change("max_client_conn = 100", "max_client_conn = 0")
    await asyncio.to_thread(bouncer.process.start)
    yield
    bouncer.change("max_client_conn = 0", "max_client_conn = 100")


@asynccontextmanager
async def login_failing(bouncer: PgBouncer) -> AsyncIterator[None]:
    """PgBouncer has another password than PostgreSQL, as between two steps of changing it."""
    bouncer.change("password=", "password=not-")
    await as_superuser(bouncer.behind, END_BACKENDS)
    yield
    bouncer.change("password=not-", "password=")
