"""What `bench/drain.py` puts beside the ingest worker; each runs in a process of its own until it is stopped.

    drain_parts.py raw      pulls and acknowledges over a bare socket, and does nothing with what it gets
    drain_parts.py sunday   nats-py and asyncpg, as somebody would write a worker on a Sunday: fetch, COPY into a
                            staging table, INSERT … ON CONFLICT on a unique index, ack

NATS_URL and DATABASE_URL say where; both use the durable consumer of the real worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from datetime import UTC, datetime
from urllib.parse import urlsplit

import asyncpg
import nats
import nats.errors
import uvloop

STREAM, CONSUMER = "TELEMETRY", "ingest-workers"
PULL = 5000
SUNDAY_BATCH = 1000
REPLY = re.compile(rb"MSG telemetry\.\S+ 1 (\$JS\.ACK\.\S+) [\d ]+\r\n")
TAIL = 1024
"""Longer than any control line: what may be cut in two by the end of a read."""

SUNDAY_TABLE = """
    CREATE TABLE IF NOT EXISTS sunday (
        ts timestamptz NOT NULL, tenant_id text NOT NULL, device_id text NOT NULL, seq bigint,
        metrics jsonb NOT NULL, position bigint PRIMARY KEY
    );
    CREATE INDEX IF NOT EXISTS sunday_device_ts ON sunday (tenant_id, device_id, ts DESC);
"""
SUNDAY_STAGING = "CREATE TEMP TABLE staging (LIKE sunday) ON COMMIT DELETE ROWS"


async def raw() -> None:
    """Two pulls always under way, every message acknowledged, all acks of one read in one write."""
    url = urlsplit(os.environ["NATS_URL"])
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1 << 20)
    await reader.readline()
    connect = json.dumps({"verbose": False, "headers": True, "user": url.username, "pass": url.password})
    request = json.dumps({"batch": PULL, "expires": 600_000_000_000})
    pull = f"PUB $JS.API.CONSUMER.MSG.NEXT.{STREAM}.{CONSUMER} bench {len(request)}\r\n{request}\r\n".encode()
    writer.write(f"CONNECT {connect}\r\nSUB bench 1\r\n".encode() + 2 * pull)
    buffer, taken = b"", 0
    while data := await reader.read(1 << 18):
        if b"PING\r\n" in data:
            writer.write(b"PONG\r\n")
        buffer += data
        replies, end = [], 0
        for found in REPLY.finditer(buffer):
            replies.append(found[1])
            end = found.end()
        buffer = buffer[max(end, len(buffer) - TAIL) :]
        if replies:
            writer.write(b"PUB " + b" 4\r\n+ACK\r\nPUB ".join(replies) + b" 4\r\n+ACK\r\n")
            taken += len(replies)
        if taken >= PULL:
            taken -= PULL
            writer.write(pull)


async def sunday() -> None:
    """No care for anything: an outage ends it, a bad message stops it, nothing is kept alive."""
    client = await nats.connect(os.environ["NATS_URL"])
    subscription = await client.jetstream().pull_subscribe_bind(consumer=CONSUMER, stream=STREAM)
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    await connection.execute(SUNDAY_TABLE)
    await connection.execute(SUNDAY_STAGING)
    while True:
        try:
            messages = await subscription.fetch(SUNDAY_BATCH, timeout=5)
        except (nats.errors.TimeoutError, TimeoutError):
            continue
        records = []
        for message in messages:
            body = json.loads(message.data)
            payload = body["payload"]
            records.append(
                (
                    datetime.fromtimestamp(body["ts"] / 1000, UTC),
                    body["tenant_id"],
                    body["device_id"],
                    payload.get("seq"),
                    json.dumps(payload["metrics"]),
                    message.metadata.sequence.stream,
                )
            )
        async with connection.transaction():
            await connection.copy_records_to_table("staging", records=records)
            await connection.execute("INSERT INTO sunday SELECT * FROM staging ON CONFLICT DO NOTHING")
        for message in messages:
            await message.ack()


if __name__ == "__main__":
    uvloop.run({"raw": raw, "sunday": sunday}[sys.argv[1]]())
