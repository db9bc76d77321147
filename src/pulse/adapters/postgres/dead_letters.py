"""The table `dead_letters`, and burying for the rescue role."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import msgspec

from pulse.adapters.postgres.ledger import record_epoch
from pulse.adapters.postgres.pool import Connection, Database, Pool, Scoped, transaction
from pulse.adapters.postgres.settling import Entry, claim, refused, write_dead_letters
from pulse.domain.dead_letter import Filter, Letter, Summary
from pulse.domain.ledger import PositionSet, sequence_of
from pulse.domain.settlement import DeadLetter

SUMMARY = """
    id, stream, position, subject, tenant_id, device_id, reason, error, octet_length(body) AS body_bytes, attempts,
    published_at, died_at, replays, replayed_at, replayed_sequence, replay_of, route_id, in_stream
"""
# Planned anew each time, with the arguments known: what is null costs nothing.
MATCHES = """
    ($1::bigint IS NULL OR id = $1) AND ($2::text IS NULL OR stream = $2) AND ($3::text IS NULL OR reason = $3)
    AND ($4::text IS NULL OR tenant_id = $4) AND ($5::text IS NULL OR device_id = $5)
    AND ($6::timestamptz IS NULL OR died_at >= $6) AND ($7::timestamptz IS NULL OR died_at < $7)
    AND ($8::boolean IS NULL OR (replays > 0) = $8) AND ($9::text IS NULL OR route_id = $9)
"""
SELECT_PAGE = f"""
    SELECT {SUMMARY} FROM dead_letters WHERE {MATCHES} AND ($10::bigint IS NULL OR id < $10) ORDER BY id DESC LIMIT $11
"""  # noqa: S608 - constants
SELECT_LETTER = f"SELECT {SUMMARY}, headers, body FROM dead_letters WHERE id = $1"  # noqa: S608 - constants
SELECT_CHILDREN = "SELECT id FROM dead_letters WHERE replay_of = $1 ORDER BY id LIMIT 100"
SELECT_LETTERS = f"""
    SELECT {SUMMARY}, headers, body FROM dead_letters
    WHERE {MATCHES} AND id > $10 AND id <= $11 ORDER BY id LIMIT $12
"""  # noqa: S608 - constants
COUNT_MATCHING = f"""
    SELECT count(*), count(*) FILTER (WHERE replays > 0), coalesce(max(id), 0) FROM dead_letters WHERE {MATCHES}
"""  # noqa: S608 - constants
COUNT_BY_REASON = "SELECT reason, replays > 0, count(*) FROM dead_letters GROUP BY 1, 2"
# In one order, so that two who record at once wait for one another in one direction only.
LOCK_LETTERS = "SELECT FROM dead_letters WHERE id = ANY($1::bigint[]) ORDER BY id FOR UPDATE"
RECORD_REPLAYS = """
    UPDATE dead_letters AS letter
    SET replays = letter.replays + 1, replayed_at = now(), replayed_sequence = made.sequence
    FROM unnest($1::bigint[], $2::int[], $3::bigint[]) AS made (id, replays, sequence)
    WHERE letter.id = made.id AND letter.replays = made.replays
"""
DELETE_MATCHING = f"""
    DELETE FROM dead_letters WHERE id IN (
        SELECT id FROM dead_letters WHERE {MATCHES} AND id <= $10 ORDER BY id LIMIT $11 FOR UPDATE
    )
"""  # noqa: S608 - constants
IS_SETTLED = "SELECT EXISTS (SELECT FROM ledger WHERE positions @> $1::bigint)"
IS_DEAD = "SELECT EXISTS (SELECT FROM ledger WHERE positions @> $1::bigint AND dead @> $1::bigint)"
CHECK_TABLES = "SELECT FROM ledger, dead_letters, stream_epochs LIMIT 0"


class DeadLetterStore:
    """Reads and tends the table; satisfies `services.dead_letters.Store`. Every call raises Outage.

    The record of `database` is entered into audit_log with the first change, and once, however many pages there are.
    """

    def __init__(self, database: Database) -> None:
        scoped = database if isinstance(database, Scoped) else Scoped(pool=database)
        self._database = replace(scoped, record=None)
        self._record = scoped.record

    async def page(self, wanted: Filter, *, before: int | None, limit: int) -> list[Summary]:
        """Those that match, newest first, below the id `before`."""
        async with transaction(self._database) as connection:
            rows = await connection.fetch(SELECT_PAGE, *msgspec.structs.astuple(wanted), before, limit)
        return [_summary(row) for row in rows]

    async def letter(self, letter_id: int) -> Letter | None:
        """One of them whole."""
        async with transaction(self._database) as connection:
            row = await connection.fetchrow(SELECT_LETTER, letter_id)
            children = await connection.fetch(SELECT_CHILDREN, letter_id)
        return _letter(row, tuple(child["id"] for child in children)) if row else None

    async def letters(self, wanted: Filter, *, after: int, last: int, limit: int) -> list[Letter]:
        """Those that match, whole, oldest first, above the id `after` and up to `last`."""
        async with transaction(self._database) as connection:
            rows = await connection.fetch(SELECT_LETTERS, *msgspec.structs.astuple(wanted), after, last, limit)
        return [_letter(row, ()) for row in rows]

    async def count(self, wanted: Filter) -> tuple[int, int, int]:
        """How many match, how many of these were replayed, and the highest id, 0 where none matches."""
        async with transaction(self._database) as connection:
            count, replayed, last = (
                await connection.fetchrow(COUNT_MATCHING, *msgspec.structs.astuple(wanted)) or (0,) * 3
            )
        return count, replayed, last

    async def count_by_reason(self) -> dict[tuple[str, bool], int]:
        """How many there are of each reason, apart by whether they were replayed."""
        async with transaction(self._database) as connection:
            return {(reason, replayed): count for reason, replayed, count in await connection.fetch(COUNT_BY_REASON)}

    async def record_replays(self, replays: Sequence[tuple[int, int, int]]) -> None:
        """Of each (id, how often it was replayed before, sequence of the new message); nothing that is recorded."""
        async with self._change() as connection:
            await connection.execute(LOCK_LETTERS, [letter_id for letter_id, _, _ in replays])
            await connection.execute(RECORD_REPLAYS, *zip(*replays, strict=True))

    async def delete(self, wanted: Filter, *, last: int, limit: int) -> int:
        """Delete at most `limit` of those that match, up to the id `last`; returns how many."""
        async with self._change() as connection:
            status = await connection.execute(DELETE_MATCHING, *msgspec.structs.astuple(wanted), last, limit)
        return int(status.removeprefix("DELETE "))

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[Connection]:
        """A transaction that also writes the record, until one of them has."""
        async with transaction(replace(self._database, record=self._record)) as connection:
            yield connection
        self._record = None


class RescueStore:
    """Buries messages of any stream, one at a time; satisfies `services.rescue.Store`. Every call raises Outage."""

    def __init__(self, pool: Pool, *, probe: Callable[[str], None]) -> None:
        self._pool = pool
        self._probe = probe

    async def check(self) -> None:
        """Returns where it could settle something now."""
        async with transaction(self._pool) as connection:
            await connection.execute(CHECK_TABLES)

    async def epoch(self, stream: str, created_ns: int) -> int:
        """The number of the making of `stream` at `created_ns`; a new one is recorded."""
        return await record_epoch(self._pool, stream, created_ns)

    async def is_settled(self, at: int) -> bool:
        """Whether the position is settled."""
        async with transaction(self._pool) as connection:
            return bool(await connection.fetchval(IS_SETTLED, at))

    async def is_dead(self, at: int) -> bool:
        """Whether the position is settled as a dead letter."""
        async with transaction(self._pool) as connection:
            return bool(await connection.fetchval(IS_DEAD, at))

    async def bury(self, stream: str, letter: DeadLetter) -> bool:
        """Settle the message as this dead letter; False where it was settled before.

        Raises Refusal where the database cannot take it; then nothing is written.
        """
        at = PositionSet.of([letter.position])
        with refused():
            async with transaction(self._pool) as connection:
                already = await claim(connection, Entry(at, at).without)
                if not already:
                    await write_dead_letters(connection, stream, [letter])
                self._probe("rescue.before_commit")
        return not already


def _summary(row: asyncpg.Record) -> Summary:
    return _summary_of(dict(row))


def _summary_of(values: dict[str, Any]) -> Summary:
    position, in_stream = values.pop("position"), values.pop("in_stream")
    return Summary(sequence=sequence_of(position) if in_stream else None, **values)


def _letter(row: asyncpg.Record, died_again_as: tuple[int, ...]) -> Letter:
    values = dict(row)
    headers, body = values.pop("headers"), values.pop("body")
    return Letter(
        summary=_summary_of(values),
        headers=headers,
        body=body,
        died_again_as=died_again_as,
    )
