"""One bad message never delays or discards another (P4): each is a dead letter with its reason, its neighbours rows."""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest

from chaos.load import TENANT, load
from chaos.system import SEEDS, System, declared
from pulse.adapters.nats.connection import connection
from pulse.domain.errors import Reason

pytestmark = [pytest.mark.chaos, pytest.mark.parametrize("seed", SEEDS)]

COPIES = 5


def envelope(payload: str, *, tenant_id: str = TENANT, message_type: str = "telemetry") -> bytes:
    head = {"v": 1, "tenant_id": tenant_id, "device_id": "d1", "msg_type": message_type}
    return f'{json.dumps(head)[:-1]},"ts":{time.time_ns() // 1_000_000},"source":"http","payload":{payload}}}'.encode()


POISON: list[tuple[str, bytes, Reason]] = [
    (f"telemetry.{TENANT}", b'{"test":1}', Reason.INVALID_ENVELOPE),
    (f"telemetry.{TENANT}", b"", Reason.INVALID_ENVELOPE),
    (f"telemetry.{TENANT}", b"\xff\xfe\x00\x80", Reason.INVALID_ENVELOPE),
    (f"telemetry.{TENANT}", b"[" * 50_000, Reason.INVALID_ENVELOPE),
    (f"telemetry.{TENANT}", bytes(900_000), Reason.INVALID_ENVELOPE),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"n":1}}', tenant_id="t2"), Reason.INVALID_ENVELOPE),
    (f"telemetry.{TENANT}.more", envelope('{"metrics":{"n":1}}'), Reason.INVALID_ENVELOPE),
    ("telemetry.no_such_tenant\u00e9", envelope('{"metrics":{"n":1}}'), Reason.INVALID_ENVELOPE),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"n":1}}', message_type="nonsense"), Reason.INVALID_ENVELOPE),
    (
        f"telemetry.{TENANT}",
        envelope('{"metrics":{"n":"caf\u00e9"}}').replace(b"\xc3\xa9", b"\xc3"),
        Reason.INVALID_JSON,
    ),
    (f"telemetry.{TENANT}", envelope("{}"), Reason.INVALID_PAYLOAD),
    (f"telemetry.{TENANT}", envelope('{"metrics":{}}'), Reason.INVALID_PAYLOAD),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"n":null}}'), Reason.INVALID_PAYLOAD),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"n":"a\\u0000b"}}'), Reason.INVALID_PAYLOAD),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"a\\u0000b":1}}'), Reason.INVALID_PAYLOAD),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"n":1},"site_id":"\\u0000"}'), Reason.INVALID_PAYLOAD),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"n":"\\ud800"}}'), Reason.INVALID_ENVELOPE),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"n":1e999}}'), Reason.INVALID_PAYLOAD),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"n":1},"ts":1}'), Reason.TIMESTAMP_OUT_OF_RANGE),
    (f"telemetry.{TENANT}", envelope('{"metrics":{"n":1},"seq":-1}'), Reason.INVALID_PAYLOAD),
    (f"telemetry.{TENANT}", envelope('{"ts":1}', message_type="heartbeat"), Reason.TIMESTAMP_OUT_OF_RANGE),
]


async def test_poison_among_good_readings_is_dead_and_nothing_else(system: System, gateway: str, seed: int) -> None:
    wanted = {}
    # As shipped: in a test of first attempts, no pause of the machine may make a second one.
    system.topology = declared(ack_wait_s=30.0)
    await system.apply_topology()
    async with system.role("ingest").supervised() as worker, system.audited():
        async with load(gateway, system.tokens, seed=seed) as sent, connection(system.nats.url, name="test") as client:
            stream = client.jetstream()
            poison = POISON * COPIES
            random.Random(seed).shuffle(poison)
            for subject, body, reason in poison:
                receipt = await stream.publish(subject, body, headers={"X-Origin": "poison"})
                wanted[receipt.seq] = (subject, body, reason)
                await asyncio.sleep(0.005)
        await system.stored_exactly(sent, dead=len(poison))
    assert worker.deaths == []
    letters = await system.dead_letters()
    assert len(letters) == len(poison)
    for letter in letters:
        subject, body, reason = wanted[letter["position"] & ((1 << 46) - 1)]
        assert (letter["subject"], letter["body"], letter["reason"]) == (subject, body, reason), letter["error"]
        assert b"X-Origin: poison" in letter["headers"]
        assert letter["attempts"] == 1
        assert letter["error"]
