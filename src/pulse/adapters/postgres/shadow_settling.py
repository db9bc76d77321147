"""Settling messages of SHADOW: ledger, shadows, what devices hear, and dead letters in one transaction.

The ledger goes first: what another worker has settled is left out before a shadow is locked, so that no update is ever
applied twice, and two workers with the same messages wait for one another at the ledger, not half-way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pulse.adapters.postgres.last_heard import note_heard
from pulse.adapters.postgres.ledger import record_epoch
from pulse.adapters.postgres.outbox import put_into_outbox
from pulse.adapters.postgres.pool import Pool, transaction
from pulse.adapters.postgres.settling import Entry, claim, refused, write_dead_letters
from pulse.adapters.postgres.shadows import count_names, forget_deleted, lock_shadows, write_shadows
from pulse.domain.ledger import PositionSet
from pulse.domain.settlement import DeadLetter
from pulse.domain.shadow import ShadowBounds, Update
from pulse.domain.shadow_requests import Answers, Request, answer, is_made

if TYPE_CHECKING:
    from pulse.adapters.postgres.pool import Connection

CHECK_TABLES = "SELECT FROM ledger, dead_letters, stream_epochs, shadows, shadow_changes, outbox, device_state LIMIT 0"
NOTHING = Answers({}, (), (), 0)


class ShadowSettlements:
    """Answers what stands in one stream; satisfies `services.shadow.Store`. Every call raises Outage."""

    def __init__(
        self,
        pool: Pool,
        *,
        stream: str,
        bounds: ShadowBounds,
        names_max: int,
        probe: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._pool = pool
        self._stream = stream
        self._bounds = bounds
        self._names_max = names_max
        self._probe = probe

    async def check(self) -> None:
        """Returns where it could settle something now."""
        async with transaction(self._pool) as connection:
            await connection.execute(CHECK_TABLES)

    async def epoch(self, created_ns: int) -> int:
        """The number of the making of the stream at `created_ns`, recorded where it is new."""
        return await record_epoch(self._pool, self._stream, created_ns)

    async def settle(self, requests: Sequence[Request], dead: Sequence[DeadLetter]) -> tuple[Answers, PositionSet]:
        """Answer `requests`, which are in the order of the stream, and bury `dead`, in one transaction.

        Returns the answers, and the positions that others had settled, which are left out. Raises Refusal
        REFUSED_BY_DATABASE where PostgreSQL can never take some row of it; then nothing is written.
        """
        buried = PositionSet.of(letter.position for letter in dead)
        entry = Entry(buried | PositionSet.of(request.position for request in requests), buried)
        with refused():
            async with transaction(self._pool) as connection:
                already = await claim(connection, entry.without)
                self._probe("shadow.ledger_written")
                left = [each for each in requests if each.position not in already]
                answers = await self._answer(connection, left)
                letters = [letter for letter in dead if letter.position not in already]
                await write_dead_letters(connection, self._stream, letters)
                await note_heard(connection, ((each.key.device, each.at_ms) for each in left))
                self._probe("shadow.before_commit")
        return answers, already

    async def _answer(self, connection: Connection, requests: Sequence[Request]) -> Answers:
        if not requests:
            return NOTHING
        shadows = await lock_shadows(connection, (request.key for request in requests))
        made = {
            each.key.device
            for each in requests
            if isinstance(each.asks, Update) and is_made(each.key, shadows[each.key])
        }
        names = await count_names(connection, made) if made else {}
        answers = answer(requests, shadows, names, bounds=self._bounds, names_max=self._names_max)
        await write_shadows(connection, answers.shadows, answers.changes)
        self._probe("shadow.written")
        await put_into_outbox(connection, answers.said)
        if made:
            await forget_deleted(connection, made, self._names_max)
        return answers
