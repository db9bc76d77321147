"""The lines of ordered routes: who routes puts jobs in, delivery workers take lines and write down what came of them.

A line is taken by moving on when it is due, so nobody has to find out that a worker is dead: its lines are due again
`lease_s` after it last said that it is there. Who locks several lines locks them in the order of their keys.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

import asyncpg

from pulse.adapters.postgres.pool import Connection, Pool, transaction
from pulse.domain.errors import StreamFull
from pulse.domain.ledger import SEQUENCE_BITS, epoch_of
from pulse.domain.line import InLine, Line, LineKey, Turned
from pulse.domain.receipt import Receipt

SYSTEM = "postgresql"
LOOK_S = 1.0
"""How old the count of a route's jobs may be that says whether there is room for more."""
STEPS_MAX = 16
"""Jobs of one line that are taken at once, to be sent one after the other."""

INSERT_JOBS = f"""
    WITH told AS MATERIALIZED (
        SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bytea[], $6::int[], $7::bigint[])
            AS told (tenant_id, route_id, device_id, position, body, attempts, since_ms)
        ORDER BY tenant_id, route_id, device_id, position
    ), made AS (
        INSERT INTO ordered_jobs (tenant_id, route_id, device_id, position, body, attempts, since_ms)
        SELECT * FROM told
        ON CONFLICT DO NOTHING
        RETURNING tenant_id, route_id, device_id, position
    ), lines AS (
        INSERT INTO ordered_lines AS line (tenant_id, route_id, device_id, epoch, jobs)
        SELECT tenant_id, route_id, device_id, (position >> {SEQUENCE_BITS})::int AS epoch, count(*)
        FROM made GROUP BY tenant_id, route_id, device_id, epoch ORDER BY tenant_id, route_id, device_id, epoch
        ON CONFLICT (tenant_id, route_id, device_id, epoch) DO UPDATE SET jobs = line.jobs + excluded.jobs
    )
    SELECT tenant_id, route_id, position FROM made
"""  # noqa: S608 - a constant
SELECT_STANDING = """
    SELECT tenant_id, route_id, position FROM ordered_jobs
    JOIN unnest($1::text[], $2::text[], $3::text[], $4::bigint[]) AS told (tenant_id, route_id, device_id, position)
        USING (tenant_id, route_id, device_id, position)
"""
COUNT_JOBS = """
    SELECT asked.tenant_id, asked.route_id, coalesce(sum(line.jobs), 0)::bigint AS jobs
    FROM unnest($1::text[], $2::text[]) AS asked (tenant_id, route_id)
    LEFT JOIN ordered_lines AS line USING (tenant_id, route_id)
    GROUP BY asked.tenant_id, asked.route_id
"""
SELECT_DUE_EPOCHS = """
    SELECT DISTINCT line.epoch, stream, created_ns FROM ordered_lines AS line LEFT JOIN stream_epochs USING (epoch)
    WHERE due_at <= now()
"""
TAKE_LINES = f"""
    WITH routed AS MATERIALIZED (
        SELECT * FROM unnest($1::int[], $2::bigint[]) AS routed (epoch, upto)
    ), due AS MATERIALIZED (
        SELECT line.tenant_id, line.route_id, line.device_id, line.epoch, routed.upto
        FROM ordered_lines AS line JOIN routed USING (epoch)
        WHERE line.due_at <= now() AND EXISTS (
            SELECT FROM ordered_jobs AS job
            WHERE job.tenant_id = line.tenant_id AND job.route_id = line.route_id AND job.device_id = line.device_id
                AND job.position BETWEEN line.epoch::bigint << {SEQUENCE_BITS} AND routed.upto
        )
        ORDER BY line.due_at LIMIT $3 FOR UPDATE OF line SKIP LOCKED
    ), taken AS (
        UPDATE ordered_lines AS line SET claim = line.claim + 1, due_at = now() + make_interval(secs => $4)
        FROM due
        WHERE (line.tenant_id, line.route_id, line.device_id, line.epoch)
            = (due.tenant_id, due.route_id, due.device_id, due.epoch)
        RETURNING due.*, line.claim
    )
    SELECT taken.tenant_id, taken.route_id, taken.device_id, taken.claim,
        job.position, job.body, job.attempts, job.since_ms
    FROM taken CROSS JOIN LATERAL (
        SELECT position, body, attempts, since_ms FROM ordered_jobs AS job
        WHERE job.tenant_id = taken.tenant_id AND job.route_id = taken.route_id AND job.device_id = taken.device_id
            AND job.position BETWEEN taken.epoch::bigint << {SEQUENCE_BITS} AND taken.upto
        ORDER BY position LIMIT $5
    ) AS job
    ORDER BY taken.tenant_id, taken.route_id, taken.device_id, taken.epoch, job.position
"""  # noqa: S608 - constants
KEEP_LINES = """
    WITH told AS MATERIALIZED (
        SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::bigint[])
            AS told (tenant_id, route_id, device_id, epoch, claim)
    ), kept AS MATERIALIZED (
        SELECT tenant_id, route_id, device_id, epoch
        FROM ordered_lines AS line JOIN told USING (tenant_id, route_id, device_id, epoch, claim)
        ORDER BY tenant_id, route_id, device_id, epoch FOR UPDATE OF line
    )
    UPDATE ordered_lines AS line SET due_at = now() + make_interval(secs => $6)
    FROM kept
    WHERE (line.tenant_id, line.route_id, line.device_id, line.epoch)
        = (kept.tenant_id, kept.route_id, kept.device_id, kept.epoch)
"""
LOCK_LINES = """
    SELECT FROM ordered_lines JOIN unnest($1::text[], $2::text[], $3::text[], $4::int[])
        AS told (tenant_id, route_id, device_id, epoch) USING (tenant_id, route_id, device_id, epoch)
    ORDER BY tenant_id, route_id, device_id, epoch FOR UPDATE OF ordered_lines
"""
DELETE_JOBS = """
    DELETE FROM ordered_jobs AS job
    USING unnest($1::text[], $2::text[], $3::text[], $4::bigint[])
        AS gone (tenant_id, route_id, device_id, position)
    WHERE (job.tenant_id, job.route_id, job.device_id, job.position)
        = (gone.tenant_id, gone.route_id, gone.device_id, gone.position)
    RETURNING job.tenant_id, job.route_id, job.device_id, job.position
"""
UPDATE_HEADS = """
    UPDATE ordered_jobs AS job SET attempts = greatest(job.attempts, told.attempts)
    FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::int[])
        AS told (tenant_id, route_id, device_id, position, attempts)
    WHERE (job.tenant_id, job.route_id, job.device_id, job.position)
        = (told.tenant_id, told.route_id, told.device_id, told.position)
"""
UPDATE_LINES = """
    UPDATE ordered_lines AS line
    SET jobs = line.jobs - told.gone,
        due_at = CASE
            WHEN line.claim = told.claim THEN greatest(now(), to_timestamp(told.due_s)) ELSE line.due_at
        END
    FROM unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::bigint[], $6::int[], $7::float8[])
        AS told (tenant_id, route_id, device_id, epoch, claim, gone, due_s)
    WHERE (line.tenant_id, line.route_id, line.device_id, line.epoch)
        = (told.tenant_id, told.route_id, told.device_id, told.epoch)
"""
DELETE_LINES = """
    DELETE FROM ordered_lines AS line
    USING unnest($1::text[], $2::text[], $3::text[], $4::int[]) AS told (tenant_id, route_id, device_id, epoch)
    WHERE (line.tenant_id, line.route_id, line.device_id, line.epoch)
        = (told.tenant_id, told.route_id, told.device_id, told.epoch) AND line.jobs = 0
"""


class OrderedJobs:
    """Satisfies `services.route_jobs.Lines`: `jobs_max` is for each route. Raises Outage."""

    def __init__(self, pool: Pool, *, jobs_max: int) -> None:
        self._pool = pool
        self._jobs_max = jobs_max
        self._level: dict[tuple[str, str], int] = {}
        self._looked_at = 0.0

    async def add(self, jobs: Sequence[InLine]) -> list[Receipt | StreamFull]:
        """Put jobs in, in one transaction; returns of each that it stands there, or that its route has no room."""
        async with transaction(self._pool) as connection:
            await self._look(connection, {(job.tenant_id, job.route_id) for job in jobs})
            taken = [self._has_room(job) for job in jobs]
            columns = zip(*[_columns(job) for job, has_room in zip(jobs, taken, strict=True) if has_room], strict=True)
            new = set(map(tuple, await connection.fetch(INSERT_JOBS, *columns) if any(taken) else []))
            # One that was refused may stand there since its message came the first time.
            left = [_columns(job)[:4] for job, has_room in zip(jobs, taken, strict=True) if not has_room]
            old = set(map(tuple, await connection.fetch(SELECT_STANDING, *zip(*left, strict=True)) if left else []))
        names = [(job.tenant_id, job.route_id, job.position) for job in jobs]
        return [
            Receipt("ordered_jobs", 0, duplicate=name not in new)
            if has_room or name in old
            else StreamFull(SYSTEM, f"{self._jobs_max} jobs wait for this route already")
            for name, has_room in zip(names, taken, strict=True)
        ]

    async def _look(self, connection: Connection, routes: set[tuple[str, str]]) -> None:
        now = time.monotonic()
        if now - self._looked_at > LOOK_S:
            self._looked_at = now
            self._level.clear()
        while unknown := routes - self._level.keys():
            rows = await connection.fetch(COUNT_JOBS, *zip(*unknown, strict=True))
            self._level |= {(row["tenant_id"], row["route_id"]): row["jobs"] for row in rows}

    def _has_room(self, job: InLine) -> bool:
        level = self._level[job.tenant_id, job.route_id]
        if level >= self._jobs_max:
            return False
        self._level[job.tenant_id, job.route_id] = level + 1
        return True


class OrderedLines:
    """Satisfies `services.ordered_delivery.LineStore`. Every call raises Outage."""

    def __init__(self, pool: Pool, *, lease_s: float) -> None:
        self._pool = pool
        self._lease_s = lease_s

    async def due_epochs(self) -> dict[int, tuple[str, int] | None]:
        """The epochs of lines that are due; of each its stream, and when that was made, None where nobody knows."""
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(SELECT_DUE_EPOCHS)
        return {row["epoch"]: None if row["stream"] is None else (row["stream"], row["created_ns"]) for row in rows}

    async def take(self, upto: Mapping[int, int], *, limit: int) -> list[Line]:
        """Take lines of these epochs that are due, with jobs up to these positions, for `lease_s`."""
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(TAKE_LINES, list(upto), list(upto.values()), limit, self._lease_s, STEPS_MAX)
        lines = []
        for key, of_line in groupby(rows, key=_line_of):
            jobs = list(of_line)
            lines.append(Line(key, jobs[0]["claim"], [_job_of(key, row) for row in jobs]))
        return lines

    async def keep(self, claims: Mapping[LineKey, int]) -> None:
        """Have these for another `lease_s`, those of them that were not taken by others since."""
        async with transaction(self._pool) as connection:
            keys = list(claims)
            await connection.execute(KEEP_LINES, *zip(*keys, strict=True), list(claims.values()), self._lease_s)

    async def settle(self, turns: Sequence[Turned]) -> None:
        """Write down what became of lines, and let go of them."""
        keys = [turned.key for turned in turns]
        lines = list(zip(*keys, strict=True))
        gone = [(*turned.key[:3], at) for turned in turns for at in turned.gone]
        heads = [(*turned.key[:3], turned.head, turned.attempts) for turned in turns if turned.head is not None]
        async with transaction(self._pool) as connection:
            await connection.execute(LOCK_LINES, *lines)
            counts: Counter[LineKey] = Counter()
            if gone:
                rows = await connection.fetch(DELETE_JOBS, *zip(*gone, strict=True))
                counts.update(map(_line_of, rows))
            if heads:
                await connection.execute(UPDATE_HEADS, *zip(*heads, strict=True))
            await connection.execute(
                UPDATE_LINES,
                *lines,
                [turned.claim for turned in turns],
                [counts[key] for key in keys],
                [turned.due_s for turned in turns],
            )
            await connection.execute(DELETE_LINES, *lines)


def _columns(job: InLine) -> tuple[object, ...]:
    return (job.tenant_id, job.route_id, job.device_id, job.position, job.body, job.attempts, job.since_ms)


def _line_of(row: asyncpg.Record) -> LineKey:
    return LineKey(row["tenant_id"], row["route_id"], row["device_id"], epoch_of(row["position"]))


def _job_of(key: LineKey, row: asyncpg.Record) -> InLine:
    return InLine(
        tenant_id=key.tenant_id,
        route_id=key.route_id,
        device_id=key.device_id,
        position=row["position"],
        body=row["body"],
        since_ms=row["since_ms"],
        attempts=row["attempts"],
    )
