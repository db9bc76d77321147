"""The two processes beside the bridge in `bench/bridge.py`; each is told and tells by lines of one number.

bridge_load.py publish PORT     a fleet of devices on one connection, QoS 1; reads how many have arrived and keeps
                                LEAD ahead of it
bridge_load.py receive URL ID   the bridge's own client and nothing behind it: each message is acknowledged at once;
                                prints how many have come
"""

from __future__ import annotations

import asyncio
import sys
import threading

import uvloop

from pulse.adapters.mqtt.broker import Account, MqttBroker
from pulse.adapters.mqtt.connection import Connection
from pulse.adapters.mqtt.packets import Version, encode_connect, encode_publish
from pulse.adapters.mqtt.reader import Reader
from pulse.domain.mqtt import Arrival
from pulse.domain.topics import FILTERS

TENANTS, DEVICES = 20, 1000
BLOCK, BLOCKS = 200, 25
LEAD = 20_000
"""More than all bridges together have in hand, and little enough for the broker."""
NUMBER = "0123456789"
TELL_S = 0.05


def payload(number: int) -> bytes:
    """A reading of about 200 bytes; NUMBER stands where each message has its own number."""
    return (
        f'{{"metrics":{{"temperature":{number % 60 - 20}.25,"humidity":{number % 100}.5,"battery_v":3.{number % 1000},'
        f'"door":"closed","motion":{"true" if number % 3 else "false"},"rssi":-{30 + number % 60},"uptime_s":1{NUMBER},'
        f'"firmware":"1.14.2-rc3+build77","cell":"eu-central"}}}}'
    ).encode()


def blocks() -> list[tuple[bytes, int]]:
    """Publishes as they stand on the wire, with `%010d` for the number of each; packet ids from 1."""
    made = []
    for block in range(BLOCKS):
        packets = []
        for place in range(BLOCK):
            number = block * BLOCK + place
            device = number % DEVICES
            topic = f"tenant/tenant-{device % TENANTS}/device/device-{device:05}/telemetry"
            packets.append(encode_publish(topic, payload(number), packet_id=number + 1, version=Version.V3_1_1))
        made.append((b"".join(packets).replace(b"%", b"%%").replace(NUMBER.encode(), b"%010d"), BLOCK))
    return made


async def publish(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(encode_connect(version=Version.V3_1_1, client_id="load", keep_alive_s=0, clean_start=True))
    await reader.readexactly(4)
    arrived = 0

    def listen() -> None:
        nonlocal arrived
        for line in sys.stdin:
            arrived = int(line)

    threading.Thread(target=listen, daemon=True).start()
    parser = Reader(Version.V3_1_1)
    acknowledged = sent = 0
    made = blocks()
    while True:
        for block, count in made:
            while sent - arrived > LEAD or sent - acknowledged > BLOCK * (BLOCKS - 1):
                if sent == acknowledged:
                    await asyncio.sleep(0.002)
                    continue
                _, controls = parser.feed(await reader.read(65536))
                acknowledged += len(controls)
            writer.write(block % tuple(range(sent, sent + count)))
            sent += count
            await writer.drain()


class Receiver:
    """Acknowledges at once."""

    def __init__(self) -> None:
        self.count = 0
        self._connection: Connection

    def opened(self, connection: Connection, *, session_present: bool) -> None:
        self._connection = connection

    def received(self, arrivals: list[Arrival]) -> None:
        self.count += len(arrivals)
        for arrival in arrivals:
            self._connection.acknowledge(arrival.packet_id)


async def receive(url: str, client_id: str) -> None:
    account = Account(
        mqtt_url=url,
        mqtt_username="",
        mqtt_password="",
        mqtt_client_id=client_id,
        mqtt_version="5",
        mqtt_share_group="pulse",
        mqtt_receive_max=2000,
        mqtt_session_expiry_s=60,
        mqtt_keep_alive_s=30,
        mqtt_ca_file="",
        mqtt_cert_file="",
        mqtt_key_file="",
    )
    receiver = Receiver()
    await MqttBroker(account, filters=FILTERS).connect(receiver)
    while True:
        print(receiver.count, flush=True)
        await asyncio.sleep(TELL_S)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["publish", port]:
            uvloop.run(publish(int(port)))
        case ["receive", url, client_id]:
            uvloop.run(receive(url, client_id))
        case _:
            sys.exit(__doc__)
