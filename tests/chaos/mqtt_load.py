"""Readings at QoS 1 to a broker that stays: what it has acknowledged must be stored exactly once, whoever else dies."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from brokers import Mosquitto
from chaos.load import DEVICES, TENANT
from pulse.adapters.mqtt.packets import Puback, Version, encode_connect, encode_publish
from pulse.adapters.mqtt.reader import Reader

TICK_S = 0.02
SAME = b'{"metrics":{"reading":"same"}}'
"""Every third reading of a device is the same as the one before, to the byte."""


@dataclass
class Said:
    """What the broker has acknowledged: how often each reading of each device."""

    acknowledged: Counter[tuple[str, str]] = field(default_factory=Counter)


async def say(broker: Mosquitto, count: int, *, per_s: int) -> Said:
    """Publish `count` readings at that rate without a `seq`; returns when all are acknowledged."""
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    writer.write(encode_connect(version=Version.V3_1_1, client_id="devices", keep_alive_s=0, clean_start=True))
    await reader.readexactly(4)
    said, packets = Said(), Reader(Version.V3_1_1)
    pending: dict[int, tuple[str, str]] = {}

    async def listen() -> None:
        while sum(said.acknowledged.values()) < count:
            data = await reader.read(65_536)
            assert data, "the broker hung up"
            for answer in packets.feed(data)[1]:
                assert isinstance(answer, Puback)
                said.acknowledged[pending.pop(answer.packet_id)] += 1

    async with asyncio.TaskGroup() as group:
        group.create_task(listen(), name="pubacks")
        started = asyncio.get_running_loop().time()
        for number in range(count):
            device, reading = f"d{number % DEVICES}", "same" if number % 3 == 0 else f"r-{number}"
            packet_id = number % 65_535 + 1
            pending[packet_id] = device, reading
            payload = SAME if reading == "same" else b'{"metrics":{"reading":"%b"}}' % reading.encode()
            topic = f"tenant/{TENANT}/device/{device}/telemetry"
            writer.write(encode_publish(topic, payload, packet_id=packet_id, version=Version.V3_1_1))
            ahead_s = started + number / per_s - asyncio.get_running_loop().time()
            if ahead_s > TICK_S:
                await writer.drain()
                await asyncio.sleep(ahead_s)
    writer.close()
    return said
