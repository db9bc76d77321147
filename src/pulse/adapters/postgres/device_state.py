"""Device states: a word of a device that PostgreSQL knows already changes nothing, whoever says it, and when.

Rows are locked in the order of their ids, a few at a time and for one statement, so that workers that write the same
devices wait for one another in one direction, and shortly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING

import msgspec

from pulse.adapters.postgres.pool import transaction
from pulse.domain.device_state import Device, DeviceState

if TYPE_CHECKING:
    from pulse.adapters.postgres.pool import Pool

# Mostly all that is said is newer than all that is known: then a concatenation is the join, for the price of a tenth.
# Of each name there are 49 bytes or more, so what is concatenated stays below the 1024 names that are kept.
UPSERT_STATES = """
    INSERT INTO device_state AS known (tenant_id, device_id, last_seen, latest, latest_from, latest_to)
    SELECT tenant_id, device_id, 'epoch'::timestamptz + seen_us * interval '1 microsecond', latest,
           'epoch'::timestamptz + from_us * interval '1 microsecond',
           'epoch'::timestamptz + to_us * interval '1 microsecond'
    FROM unnest(
        string_to_array($1, ','), string_to_array($2, ','), string_to_array($3, ',')::bigint[],
        string_to_array($4, ',', '')::bigint[], string_to_array($5, ',', '')::bigint[],
        string_to_array($6, E'\\n')::jsonb[]
    ) AS said (tenant_id, device_id, seen_us, from_us, to_us, latest)
    ORDER BY tenant_id, device_id
    ON CONFLICT (tenant_id, device_id) DO UPDATE SET
        last_seen = greatest(known.last_seen, excluded.last_seen),
        latest = CASE
            WHEN excluded.latest = '{}' THEN known.latest
            WHEN excluded.latest_from > known.latest_to
                AND pg_column_size(known.latest) + pg_column_size(excluded.latest) < 32768
            THEN known.latest || excluded.latest
            ELSE merged_latest(known.latest, excluded.latest)
        END,
        latest_from = least(known.latest_from, excluded.latest_from),
        latest_to = greatest(known.latest_to, excluded.latest_to)
    WHERE known.last_seen < excluded.last_seen OR excluded.latest <> '{}'
"""
STATES_AT_ONCE = 1000

_encode = msgspec.json.Encoder().encode


async def write_states(pool: Pool, states: Mapping[Device, DeviceState]) -> None:
    """Take `states` into account; those that are written when an Outage is raised stay so."""
    ordered = sorted(states.items(), key=itemgetter(0))
    for start in range(0, len(ordered), STATES_AT_ONCE):
        async with transaction(pool) as connection:
            await connection.execute(UPSERT_STATES, *_columns(ordered[start : start + STATES_AT_ONCE]))


def _columns(states: Iterable[tuple[Device, DeviceState]]) -> tuple[str, ...]:
    """One text each, for an element of an array costs asyncpg 2 µs; no id has a comma, no JSON of ours a line's end."""
    tenants, devices, seen, first, last, latest = [], [], [], [], [], []
    for (tenant_id, device_id), state in states:
        times = [value.ts_us for value in state.latest.values()]
        tenants.append(tenant_id)
        devices.append(device_id)
        seen.append(str(state.seen_us))
        first.append(str(min(times)) if times else "")
        last.append(str(max(times)) if times else "")
        latest.append(_encode(state.latest).decode())
    return (*map(",".join, (tenants, devices, seen, first, last)), "\n".join(latest))
