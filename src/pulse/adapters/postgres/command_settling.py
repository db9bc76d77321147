"""Settling COMMANDS: the ledger, commands as their devices' words have moved them, what devices hear, dead letters.

Which commands there are is read before the ledger is claimed, because its row says what is dead; that a command is of
its device never changes. What is claimed is then locked, in the order of ids, and moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pulse.adapters.postgres.command_rows import CommandKey, Moved, lock_commands, write_moved
from pulse.adapters.postgres.last_heard import note_heard
from pulse.adapters.postgres.ledger import record_epoch
from pulse.adapters.postgres.outbox import put_into_outbox
from pulse.adapters.postgres.pool import Pool, transaction
from pulse.adapters.postgres.settling import Entry, claim, refused, write_dead_letters
from pulse.domain.command import Command, moved
from pulse.domain.command_rejections import contradiction
from pulse.domain.command_words import Said, Settled
from pulse.domain.downward import Downward
from pulse.domain.ledger import PositionSet
from pulse.domain.settlement import DeadLetter

if TYPE_CHECKING:
    from pulse.adapters.postgres.pool import Connection

SELECT_DEVICES = """
    SELECT tenant_id, command_id, device_id FROM commands
    WHERE (tenant_id, command_id) IN (SELECT * FROM unnest($1::text[], $2::text[]))
"""
CHECK_TABLES = "SELECT FROM ledger, commands, command_moves, outbox, dead_letters, stream_epochs, device_state LIMIT 0"


class CommandSettling:
    """Settles what is said of commands; satisfies `services.commands.Store`.

    An answer to an unknown command is a dead letter if `keeps` says so of its tenant; its device hears of it anyway.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        stream: str,
        keeps: Callable[[str], bool] = lambda _: True,
        probe: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._pool = pool
        self._stream = stream
        self._keeps = keeps
        self._probe = probe

    async def epoch(self, created_ns: int) -> int:
        """The number of the making of the stream at `created_ns`, recorded where it is new. Raises Outage."""
        return await record_epoch(self._pool, self._stream, created_ns)

    async def check(self) -> None:
        """Returns where the tables can be reached. Raises Outage, and asyncpg's own error where they are not there."""
        async with transaction(self._pool) as connection:
            await connection.execute(CHECK_TABLES)

    async def settle(self, said: Sequence[Said], dead: Sequence[DeadLetter], *, at_ms: int) -> Settled:
        """Take in what was `said`, in one transaction, all or nothing.

        Raises Outage where PostgreSQL is away, Refusal REFUSED_BY_DATABASE where it can never take some of it.
        """
        with refused():
            async with transaction(self._pool) as connection:
                known = await _devices(connection, said)
                unknown = [each for each in said if known.get((each.tenant_id, each.command_id)) != each.device_id]
                letters = [*dead, *(each.unknown() for each in unknown if self._keeps(each.tenant_id))]
                positions = PositionSet.of([each.position for each in said] + [letter.position for letter in dead])
                entry = Entry(positions, PositionSet.of(letter.position for letter in letters))
                already = await claim(connection, entry.without)
                self._probe("commands.ledger_written")
                strange = PositionSet.of(each.position for each in unknown)
                done = await _move(connection, [each for each in said if each.position not in already | strange])
                released = await write_moved(connection, done.steps, at_ms=at_ms)
                strangers = [each for each in unknown if each.position not in already]
                rejected = [each.rejected() for each in strangers if each.is_answer] + done.rejected
                await put_into_outbox(connection, rejected)
                letters = [letter for letter in letters if letter.position not in already]
                await write_dead_letters(connection, self._stream, letters)
                answered = [each for each in said if each.is_answer and each.position not in already]
                await note_heard(connection, (((each.tenant_id, each.device_id), each.word.at_ms) for each in answered))
                self._probe("commands.before_commit")
        return Settled(
            moved=Counter(state for step in done.steps for state, _ in step.steps),
            late=done.late,
            released=released,
            dead=letters,
            already=already,
            rejected=len(rejected),
            not_kept=len([each for each in strangers if each.position not in entry.dead]),
        )


class _Done(NamedTuple):
    """What words make of their commands, how many of them make nothing, and what is told of some of those."""

    steps: list[Moved]
    late: int
    rejected: list[Downward]


async def _devices(connection: Connection, said: Iterable[Said]) -> dict[CommandKey, str]:
    """Of which device each of these commands is."""
    keys = sorted({(each.tenant_id, each.command_id) for each in said})
    rows = await connection.fetch(SELECT_DEVICES, [key[0] for key in keys], [key[1] for key in keys])
    return {(row["tenant_id"], row["command_id"]): row["device_id"] for row in rows}


async def _move(connection: Connection, said: Sequence[Said]) -> _Done:
    """Say these words of their commands, one after the other."""
    before = await lock_commands(connection, [(each.tenant_id, each.command_id) for each in said]) if said else {}
    now: dict[CommandKey, Moved] = {}
    rejected: list[Downward] = []
    late = 0
    for each in sorted(said, key=lambda each: each.position):
        key = each.tenant_id, each.command_id
        command: Command | None = now[key].command if key in now else before.get(key)
        changed = command and moved(command, each.word)
        if not command or not changed:
            late += 1
            if command and (refusal := contradiction(command.state, each.word.event)):
                rejected.append(each.rejected(refusal))
            continue
        steps = [] if key not in now else list(now[key].steps)
        if changed.state is not command.state:
            steps.append((changed.state, each.word))
        now[key] = Moved(before[key], changed, steps)
    return _Done([now[key] for key in sorted(now)], late, rejected)
