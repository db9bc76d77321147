"""A load of shadow updates, and its oracle.

Each update that was answered 202 has made one version of its device's shadow, the device was told of it once, and each
attribute is what the last of them, in the order of the stream, has said.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import msgspec

from chaos.load import TENANT, Load
from chaos.system import System, eventually
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.streams import stream_state
from pulse.domain.shadow_merge import NOWHERE, merged


def patch_of(update: str) -> dict[str, Any]:
    """What an update says: attributes that many others set as well, one of them nested, some deleted."""
    number = int(update.rpartition("-")[2])
    said: dict[str, Any] = {f"k{number % 5}": None if number % 7 == 0 else update}
    if number % 3 == 0:
        said["nested"] = {f"n{number % 4}": number} if number % 5 else number
    return said


def body_of(update: str) -> bytes:
    """The body of the request."""
    return msgspec.json.encode({"state": {"reported": patch_of(update)}, "clientToken": update})


async def applied_exactly(system: System, *loads: Load) -> None:
    """The oracle."""
    sequences = {update: seq for each in loads for update, seq in each.acknowledged.items()}
    device_of = {update: device_id for each in loads for update, device_id in each.device_of.items()}
    await system.drained(accepted=len(sequences))
    updates: dict[str, list[str]] = defaultdict(list)
    for update in sorted(sequences, key=lambda each: sequences[each]):
        updates[device_of[update]].append(update)
    rows = await system.fetch("SELECT device_id, version, reported FROM shadows WHERE tenant_id = $1", TENANT)
    assert {row["device_id"]: row["version"] for row in rows} == {
        device_id: len(of_device) for device_id, of_device in updates.items()
    }
    for row in rows:
        place = NOWHERE
        for at, update in enumerate(updates[row["device_id"]], start=1):
            place = merged(place, patch_of(update), at=at, at_ms=0)
        assert msgspec.json.decode(row["reported"]) == place[0], row["device_id"]
    await _told_exactly(system, updates)
    (final,) = await system.audit()
    assert (final.stored, final.dead, final.in_flight, final.expired) == (len(sequences), 0, 0, 0), final
    assert await system.fetch("SELECT FROM dead_letters") == []
    assert await system.fetch("SELECT FROM rollup_pending") == []


async def _told_exactly(system: System, updates: dict[str, list[str]]) -> None:
    """Each device was told of each of its updates once; all that was to be said has gone to JetStream."""

    async def posted() -> bool:
        return not await system.fetch("SELECT FROM outbox LIMIT 1")

    await eventually(posted, "the outbox is empty")
    told: dict[str, Counter[str]] = defaultdict(Counter)
    versions: dict[str, list[int]] = defaultdict(list)
    async with connection(system.nats.url, name="test") as client:
        for subject, answer in await _down(client):
            _, _, device_id, topic = subject.split(".", 3)
            assert topic == "shadow.update.accepted", (subject, answer)
            told[device_id][answer["clientToken"]] += 1
            versions[device_id].append(answer["version"])
    assert told == {device_id: Counter(of_device) for device_id, of_device in updates.items()}
    for device_id, of_device in updates.items():
        assert sorted(versions[device_id]) == list(range(1, len(of_device) + 1)), device_id


async def _down(client: PulseClient) -> list[tuple[str, dict[str, Any]]]:
    """All that stands in DOWN, in order."""
    state = await stream_state(client, "DOWN")
    messages = [
        await client.jetstream().get_msg("DOWN", sequence) for sequence in range(state.first_seq, state.last_seq + 1)
    ]
    return [(message.subject or "", msgspec.json.decode(message.data or b"")) for message in messages]
