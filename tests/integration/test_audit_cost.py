"""What an audit costs at 100 million messages: it reads the ledger's few rows, and telemetry not at all."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import pytest

from dead_letter_bench import Bench, bench
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.postgres.ledger import SELECT_SETTLED, LedgerReader
from pulse.domain.ledger import SEQUENCE_BITS

MESSAGES = 100_000_000
LEDGER = """
    INSERT INTO ledger (positions, dead, telemetry_rows)
    SELECT int8multirange(int8range(low, high)), '{}', high - low
    FROM (SELECT ($1::bigint << 46) + 1 AS first) AS epoch,
    LATERAL (
        SELECT first AS low, first + 85000000 AS high
        UNION ALL
        SELECT first + 85000000 + 5000 * batch, first + 85005000 + 5000 * batch FROM generate_series(0, 2999) AS batch
    ) AS rows
"""
"""As merging leaves it: one row of all that is old, and a minute and a half of batches at 100,000 messages a second."""


@pytest.fixture
async def system(nats: NatsServer, database: str) -> AsyncIterator[Bench]:
    async with bench(nats.url, database) as made:
        yield made


async def test_of_a_hundred_million_messages_the_audit_reads_the_ledger_alone(system: Bench) -> None:
    await system.pool.execute(LEDGER, 1)
    await system.pool.execute("ANALYZE ledger")
    arguments = (1 << SEQUENCE_BITS, 2 << SEQUENCE_BITS)
    (plan,) = json.loads(await system.pool.fetchval(f"EXPLAIN (FORMAT json) {SELECT_SETTLED}", *arguments))
    assert set(relations(plan["Plan"])) == {"ledger"}
    await system.pool.execute("DROP TABLE telemetry")
    settled = await LedgerReader(system.pool).settled(1)
    assert (len(settled.positions), settled.rows) == (MESSAGES, MESSAGES)


def relations(plan: dict[str, object]) -> Iterator[str]:
    """The tables that a plan reads."""
    if "Relation Name" in plan:
        yield str(plan["Relation Name"])
    children = plan.get("Plans", [])
    assert isinstance(children, list)
    for child in children:
        yield from relations(child)
