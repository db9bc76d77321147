"""Schema migrations: plain SQL files `migrations/NNNN_name.sql`, applied in order, each in a transaction of its own.

The lock, the check and the file share that transaction, so two runners take turns, a crash leaves a file wholly
applied or not at all, and PgBouncer may stand between. Therefore a file holds no statement that refuses to run in a
transaction (CREATE INDEX CONCURRENTLY). An applied file is never edited: its checksum is kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

import asyncpg
import msgspec

from pulse.adapters.postgres.errors import mapped
from pulse.adapters.postgres.pool import Connection
from pulse.domain.errors import ConfigurationError

FOLDER = files("pulse.adapters.postgres") / "migrations"
FILE_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
LOCK_KEY = 0x50554C5345
"""Of pg_advisory_xact_lock: "PULSE" in ASCII."""
LOCK_TIMEOUT_S = 60

CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    sha256     text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
TABLE_EXISTS = "SELECT to_regclass('schema_migrations') IS NOT NULL"
READ_APPLIED = "SELECT number, name, sha256 FROM schema_migrations ORDER BY number"
RECORD = "INSERT INTO schema_migrations (number, name, sha256) VALUES ($1, $2, $3)"


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """One file; `sha256` is of its bytes, in hexadecimal."""

    number: int
    name: str
    sha256: str
    sql: str


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """One row of schema_migrations."""

    number: int
    name: str
    sha256: str


def available() -> list[Migration]:
    """The migrations of this version of Pulse, in order."""
    return parse({file.name: file.read_bytes() for file in FOLDER.iterdir() if file.name.endswith(".sql")})


def parse(contents: Mapping[str, bytes]) -> list[Migration]:
    """The migrations in `contents` (file name to bytes), in order.

    Raises ConfigurationError where a name is not NNNN_name.sql, or the numbers are not 1, 2, 3, …, each once.
    """
    migrations = []
    for file_name, content in sorted(contents.items()):
        match = FILE_NAME.fullmatch(file_name)
        if match is None:
            raise ConfigurationError(f"migration {file_name} is not named NNNN_name.sql")
        sha256 = hashlib.sha256(content).hexdigest()
        migrations.append(Migration(number=int(match[1]), name=match[2], sha256=sha256, sql=content.decode()))
    for expected, migration in enumerate(migrations, start=1):
        if migration.number != expected:
            raise ConfigurationError(
                f"migration {expected:04} is missing or there twice: next is {migration.number:04}_{migration.name}"
            )
    return migrations


def plan(migrations: Sequence[Migration], applied: Sequence[Applied]) -> list[Migration]:
    """What is left to apply.

    Raises ConfigurationError where what was applied is not a beginning of `migrations`: a file was changed after it
    had been applied, the database is newer than this Pulse, or a number was left out.
    """
    for position, done in enumerate(applied):
        if done.number > len(migrations):
            raise ConfigurationError(
                f"the database is newer than this Pulse: it has migration {done.number:04}_{done.name}",
                hint="run the version of Pulse that made it, or a later one",
            )
        if done.number != position + 1:
            raise ConfigurationError(
                f"the database has migration {done.number:04}_{done.name}, but {position + 1:04} was never applied",
                hint="schema_migrations was changed by hand; restore the missing row or the database",
            )
        file = migrations[position]
        if file.sha256 != done.sha256:
            raise ConfigurationError(
                f"migration {done.number:04}_{done.name} was applied from another file than the present "
                f"{file.number:04}_{file.name}.sql",
                hint="an applied migration is never edited; put the change into a new one",
            )
    return list(migrations[len(applied) :])


async def pending(connection: Connection, migrations: Sequence[Migration]) -> list[Migration]:
    """What is left to apply; writes nothing. Raises as `plan` does, and Outage."""
    with mapped():
        async with connection.transaction():
            applied = await _read_applied(connection) if await connection.fetchval(TABLE_EXISTS) else []
    return plan(migrations, applied)


async def migrate(
    connection: Connection,
    migrations: Sequence[Migration],
    *,
    on_start: Callable[[Migration], None] | None = None,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> list[Migration]:
    """Apply what is left, in order, and return it; `on_start` is told of each before it runs.

    Raises as `plan` does; Outage where PostgreSQL goes away or another runner holds the lock for `lock_timeout_s`
    (what was applied before stays applied, run it again); ConfigurationError where the role may not make tables, or
    where a migration says what an administrator has to do first.
    """
    done: list[Migration] = []
    try:
        with mapped():
            while (migration := await _apply_next(connection, migrations, on_start, lock_timeout_s)) is not None:
                done.append(migration)
    except asyncpg.RaiseError as error:
        # A migration's own word, by RAISE EXCEPTION … USING HINT.
        raise ConfigurationError(str(error.args[0]), hint=error.hint or "") from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise ConfigurationError(
            f"the role in DATABASE_URL may not change the schema: {error}",
            hint="migrate as the owner of the database",
        ) from error
    return done


async def _apply_next(
    connection: Connection,
    migrations: Sequence[Migration],
    on_start: Callable[[Migration], None] | None,
    lock_timeout_s: float,
) -> Migration | None:
    async with connection.transaction():
        await connection.execute("SELECT set_config('lock_timeout', $1, true)", f"{lock_timeout_s * 1000:.0f}ms")
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_KEY)
        await connection.execute(CREATE_TABLE)
        left = plan(migrations, await _read_applied(connection))
        if not left:
            return None
        migration = left[0]
        if on_start is not None:
            on_start(migration)
        await connection.execute(migration.sql)
        await connection.execute(RECORD, migration.number, migration.name, migration.sha256)
        return migration


async def _read_applied(connection: Connection) -> list[Applied]:
    rows = await connection.fetch(READ_APPLIED)
    return [Applied(number=row["number"], name=row["name"], sha256=row["sha256"]) for row in rows]
