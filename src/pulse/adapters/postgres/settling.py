"""What settling has in common, whatever the stream: the ledger first, dead letters, and data that cannot be taken.

The ledger row goes first. Where another transaction is settling some of the same positions, the insert waits for
its end; where it has settled them, the exclusion constraint refuses ours, we read what is settled, and write the rest.
`ON CONFLICT DO NOTHING` is what makes two that insert at the same moment wait for one another in one direction only;
a plain insert would let both wait until PostgreSQL calls it a deadlock, a second later.
Whatever else a settling transaction locks, it locks after that: who waits for the ledger holds nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from pulse.adapters.postgres.errors import Fault, classify
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.ledger import PositionSet
from pulse.domain.settlement import DeadLetter
from pulse.domain.telemetry import EPOCH

if TYPE_CHECKING:
    from pulse.adapters.postgres.pool import Connection

# What has rows of telemetry is noted for the rollups (rollups.py), with the hours that its rows touch.
INSERT_LEDGER = """
    WITH entry AS (
        INSERT INTO ledger (positions, dead, telemetry_rows)
        VALUES ($1::text::int8multirange, $2::text::int8multirange, $3)
        ON CONFLICT DO NOTHING RETURNING id, positions
    ), pending AS (
        INSERT INTO rollup_pending (positions, hours)
        SELECT positions, $4::text::int4multirange FROM entry WHERE $3::bigint > 0
    )
    SELECT id FROM entry
"""
SELECT_SETTLED = """
    SELECT coalesce(range_agg(settled.positions * batch.positions), '{}')::text
    FROM (SELECT $1::text::int8multirange AS positions) AS batch
    JOIN ledger AS settled ON settled.positions && batch.positions
"""
DEAD_LETTER_COLUMNS = (
    "stream", "position", "subject", "tenant_id", "device_id", "reason", "error", "headers", "body",
    "attempts", "published_at", "in_stream",
)  # fmt: skip
RACES_MAX = 20
"""How often another worker may settle part of the same batch in between; each time there is less left to write."""


class Entry(NamedTuple):
    """A row of the ledger: all that is settled, what of it is dead, and how many rows of telemetry, in which hours."""

    positions: PositionSet
    dead: PositionSet
    telemetry_rows: int = 0
    hours: PositionSet = PositionSet()

    def without(self, settled: PositionSet) -> Entry:
        """What is left of an entry that counts no rows once others have settled `settled`."""
        return Entry(self.positions - settled, self.dead - settled)


async def claim(connection: Connection, entry_without: Callable[[PositionSet], Entry]) -> PositionSet:
    """Enter into the ledger what nobody has settled; returns what others have.

    `entry_without` says what is to be entered once others have settled these.
    """
    already = PositionSet()
    for _ in range(RACES_MAX):
        entry = entry_without(already)
        if not entry.positions:
            return already
        positions = str(entry.positions)
        if await connection.fetchval(INSERT_LEDGER, positions, str(entry.dead), entry.telemetry_rows, str(entry.hours)):
            return already
        already = already | PositionSet.parse(await connection.fetchval(SELECT_SETTLED, positions))
    raise Outage("postgresql", f"a batch met {RACES_MAX} others that settle the same positions")


async def write_dead_letters(connection: Connection, stream: str, letters: Sequence[DeadLetter]) -> None:
    """Write `letters` of `stream`, whose positions are claimed."""
    if letters:
        await connection.copy_records_to_table(
            "dead_letters", records=[_columns(stream, letter) for letter in letters], columns=DEAD_LETTER_COLUMNS
        )


@contextmanager
def refused() -> Iterator[None]:
    """Raise Refusal REFUSED_BY_DATABASE for what PostgreSQL can never take, all else as it is."""
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if classify(error) is Fault.POISON:
            raise Refusal(Reason.REFUSED_BY_DATABASE, f"{type(error).__name__}: {error}") from error
        raise


def _columns(stream: str, letter: DeadLetter) -> tuple[object, ...]:
    message = letter.message
    return (
        stream,
        letter.position,
        _storable(message.subject),
        letter.tenant_id,
        letter.device_id,
        letter.reason.value,
        _storable(letter.error),
        message.headers,
        message.body,
        message.attempts,
        EPOCH + timedelta(microseconds=message.published_ns // 1000),
        message.sequence > 0,
    )


def _storable(text: str) -> str:
    """PostgreSQL's text has no U+0000 and no lone surrogates; both are shown by their escapes."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
