"""What `pulse audit` takes at 100 million messages, by how the ledger was left: nothing of telemetry is read.

    .venv/bin/python bench/audit.py [--rounds 5]

The ledger is made by SQL on a PostgreSQL of its own; the streams are said to hold the last 100,000 messages. Measured
is the whole audit but for its questions to NATS.

    merged     one row of 85 million, and 3,000 young rows of 5,000: a minute and a half at 100,000 a second
    letters    one row; one message in 10,000 is dead, and one was never settled
    unmerged   20,000 rows of 5,000, as after a week without `maintenance` at 30 messages a second
    two        the same in fragments of 500, as two workers that take turns leave them
    holes      one row; one message in 100 was never settled: a million holes, far more than anybody has
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import click
import uvloop
from rich.console import Console
from rich.table import Table

from pulse.adapters.embedded import ports
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.postgres.ledger import LedgerReader
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool
from pulse.domain.audit import StreamReading
from pulse.services.audit import Auditor

MESSAGES = 100_000_000
TIMEOUT_S = 300.0
INSERT = "INSERT INTO ledger (positions, dead, telemetry_rows) "
LEDGERS = {
    "merged": """
        SELECT int8multirange(int8range(low, high)), '{}'::int8multirange, high - low
        FROM (SELECT (1::bigint << 46) + 1 AS first) AS epoch, LATERAL (
            SELECT first AS low, first + 85000000 AS high UNION ALL
            SELECT first + 85000000 + 5000 * n, first + 85005000 + 5000 * n FROM generate_series(0, 2999) AS n
        ) AS rows""",
    "letters": """
        SELECT range_agg(int8range(first + 10000 * n, first + 10000 * n + 9999)),
               range_agg(int8range(first + 10000 * n, first + 10000 * n + 1)), 99980000
        FROM (SELECT (1::bigint << 46) + 1 AS first) AS epoch, generate_series(0, 9999) AS n""",
    "unmerged": """
        SELECT int8multirange(int8range(first + 5000 * n, first + 5000 * n + 5000)), '{}'::int8multirange, 5000
        FROM (SELECT (1::bigint << 46) + 1 AS first) AS epoch, generate_series(0, 19999) AS n""",
    "two": """
        SELECT range_agg(int8range(low, low + 500)), '{}'::int8multirange, 5000
        FROM (SELECT (1::bigint << 46) + 1 AS first) AS epoch,
            generate_series(0, 19999) AS n, generate_series(0, 9) AS fragment,
            LATERAL (SELECT first + 10000 * (n / 2) + 500 * (n % 2) + 1000 * fragment AS low) AS at
        GROUP BY n""",
    "holes": """
        SELECT range_agg(int8range(first + 100 * n, first + 100 * n + 99)), '{}'::int8multirange, 99000000
        FROM (SELECT (1::bigint << 46) + 1 AS first) AS epoch, generate_series(0, 999999) AS n""",
}


class Streams:
    """Says what a stream would; satisfies `services.audit.StreamReader`."""

    async def read(self, stream: str) -> StreamReading:
        return StreamReading(
            created_ns=1, first_seq=MESSAGES - 100_000, last_seq=MESSAGES, deleted=(), delivered_seq=MESSAGES,
            ack_pending=0,
        )  # fmt: skip


async def measured(pool: Pool, url: str, ledger: str, rounds: int) -> tuple[int, int, list[float]]:
    """Rows and bytes of the ledger, and the seconds of each audit."""
    async with open_connection(url, timeout_s=TIMEOUT_S, application_name="bench") as database:
        await database.execute("TRUNCATE ledger")
        await database.execute(INSERT + LEDGERS[ledger])
        await database.execute("ANALYZE ledger")
        rows, size = await database.fetchrow("SELECT count(*), pg_total_relation_size('ledger') FROM ledger") or (0, 0)
    auditor = Auditor(streams=Streams(), ledger=LedgerReader(pool))
    took_s = []
    for _ in range(rounds):
        started = time.perf_counter()
        (found,) = await auditor.audit("TELEMETRY")
        took_s.append(time.perf_counter() - started)
        assert found.balanced, found
        assert found.accepted == MESSAGES, found
    return rows, size, took_s


async def run(folder: Path, rounds: int) -> Table:
    """All of them, one after the other."""
    table = Table("ledger", "rows", "size", "audit, median", "least", "most", box=None, pad_edge=False)
    server = PostgresServer(folder, port=ports.free_port(), password="bench", superuser_password="bench")  # noqa: S106
    server.start()
    try:
        async with open_connection(server.url, timeout_s=TIMEOUT_S, application_name="bench") as database:
            await migrate(database, available())
            await database.execute("INSERT INTO stream_epochs (epoch, stream, created_ns) VALUES (1, 'TELEMETRY', 1)")
        async with open_pool(server.url, size_max=1, timeout_s=TIMEOUT_S, application_name="bench") as pool:
            for ledger in LEDGERS:
                rows, size, took_s = await measured(pool, server.url, ledger, rounds)
                times = (
                    f"{seconds * 1000:.1f} ms" for seconds in (statistics.median(took_s), min(took_s), max(took_s))
                )
                table.add_row(ledger, f"{rows:,}", f"{size / 1e6:.1f} MB", *times)
    finally:
        server.kill()
    return table


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Measure, and print a table."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        table = runner.run(run(Path(folder), rounds))
    Console().print(table)


if __name__ == "__main__":
    main()
