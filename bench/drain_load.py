"""Messages for `bench/drain.py`: put together beforehand, so that sending them costs next to nothing.

    drain_load.py PER_S SECONDS     publishes at that rate (0: as fast as four batches in flight go) and prints JSON

A block is one atomic batch of 1000 envelopes as it stands on the wire, with room for its time and its id: each time it
is sent, those are filled in by one `bytes.replace`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import sys
import time
from typing import Any

import uvloop

from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.publication import Publication, batch_frames
from pulse.domain.envelope import wrap
from pulse.domain.subjects import MessageType

BLOCK = 1000
BLOCKS = 20
IN_FLIGHT = 4
TENANTS, DEVICES = 10, 2000
TS = 1_111_111_111_111
"""Stands for the time; no digit of it occurs in a row anywhere else in a block."""
NAME = b"NAMENAMENAME"
FLAT_OUT_PER_S = 100_000
"""How many messages stand for a second where no rate is given; ten tenants times 100,000 is what the stream holds."""


def body(number: int, chance: random.Random) -> tuple[str, bytes]:
    """Subject and envelope of one reading of one device; about 250 bytes."""
    device = number % DEVICES
    tenant = f"tenant-{device % TENANTS}"
    payload = (
        f'{{"metrics":{{"temperature":{chance.uniform(-20, 40):.2f},"humidity":{chance.uniform(0, 100):.1f},'
        f'"battery_v":{chance.uniform(3, 4):.3f},"door":"closed","motion":{"true" if number % 3 else "false"},'
        f'"rssi":{chance.randrange(-90, -30)}}},"seq":{number}}}'
    )
    envelope = wrap(
        tenant_id=tenant,
        device_id=f"device-{device:05}",
        message_type=MessageType.TELEMETRY,
        received_ms=TS,
        source="mqtt",
        payload=payload.encode(),
    )
    return f"telemetry.{tenant}", envelope


def blocks(inbox: str) -> list[bytes]:
    """`BLOCKS` different blocks, all answered on `inbox`."""
    chance = random.Random(1)
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    made = []
    for block in range(BLOCKS):
        messages = []
        for number in range(block * BLOCK, (block + 1) * BLOCK):
            subject, envelope = body(number, chance)
            messages.append(Publication(subject.encode(), envelope, b"%b-%d" % (NAME, number), 0.0, future))
        made.append(b"".join(batch_frames(messages, NAME, inbox.encode())))
    return made


async def publish(client: PulseClient, *, count: int, per_s: float = 0.0) -> dict[str, float]:
    """Publish `count` messages (whole blocks), `per_s` of them a second, or as fast as they are acknowledged."""
    inbox = client.new_inbox()
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def on_reply(reply: Any) -> None:
        assert b'"error"' not in reply.data, reply.data
        slots.release()

    subscription = await client.subscribe(inbox, cb=on_reply)
    prepared = blocks(inbox)
    start, late_s = time.perf_counter(), 0.0
    total = count // BLOCK
    for number in range(total):
        if per_s:
            due = start + number * BLOCK / per_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            late_s = max(late_s, time.perf_counter() - due)
        await slots.acquire()
        now = b"%d" % (time.time_ns() // 1_000_000)
        block = prepared[number % BLOCKS].replace(b"%d" % TS, now).replace(NAME, secrets.token_hex(6).encode())
        await client._send_command(block)
        await client._flush_pending()
    for _ in range(IN_FLIGHT):
        await slots.acquire()
    elapsed = time.perf_counter() - start
    await subscription.unsubscribe()
    return {"per_s": total * BLOCK / elapsed, "late_s": late_s, "seconds": elapsed, "count": total * BLOCK}


async def main(per_s: float, seconds: float) -> None:
    async with connection(os.environ["NATS_URL"], name="bench load") as client:
        print(json.dumps(await publish(client, count=int((per_s or FLAT_OUT_PER_S) * seconds), per_s=per_s)))


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1]), float(sys.argv[2])))
