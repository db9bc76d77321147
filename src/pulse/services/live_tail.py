"""What is shown of messages as they come: bounded by what a person can read, and honest about the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

import msgspec
import structlog

from pulse.domain.browse import ReadMessage, Start, StreamMessage, read_message
from pulse.domain.errors import Outage, Refusal
from pulse.domain.query import Cursor, Query, StoredReading
from pulse.domain.telemetry import EPOCH

log = structlog.get_logger()

INTERVAL_S = 1.0
READ_MAX = 200
SHOWN_MAX = 50
"""Messages of one look: what is read, and what of it is shown."""
ROWS_MAX = 50
LOOK_BACK_S = 3600.0


class Messages(Protocol):
    """Messages in the streams; raises Outage."""

    async def last_sequence(self, stream: str) -> int:
        """The sequence of the newest, 0 where there never was one."""

    async def read(self, stream: str, start: Start, *, limit: int) -> list[StreamMessage]:
        """At most `limit`, oldest first."""


class Rows(Protocol):
    """What a device has sent; raises Outage."""

    async def rows(self, tenant_id: str, device_id: str, query: Query) -> list[StoredReading]:
        """At most `query.limit` rows."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One message for a reader."""

    sequence: int
    at_ms: int
    subject: str
    tenant_id: str
    device_id: str
    kind: str
    source: str
    text: str


class Lines(msgspec.Struct, frozen=True, kw_only=True):
    """What one look has found, the newest last; `skipped` came too fast to be read, `away` says why nothing was."""

    lines: list[Line] = []
    skipped: int = 0
    away: str = ""


class StreamTail:
    """Looks at a stream once a second; READ_MAX messages at most, so that a flood costs no more than a trickle."""

    def __init__(self, messages: Messages, *, stream: str, subject: str | None, device_id: str | None) -> None:
        self._messages = messages
        self._stream = stream
        self._subject = subject
        self._device_id = device_id
        self._sequence: int | None = None

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """The last few messages, then what comes, as JSON of Lines; also while nothing does, as a sign of life."""
        while True:
            try:
                found = await self.look()
            except (Outage, Refusal) as error:
                found = Lines(away=error.message)
            yield msgspec.json.encode(found)
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> Lines:
        """What has come since the last look. Raises Outage."""
        last = await self._messages.last_sequence(self._stream)
        if self._sequence is None or last < self._sequence:
            self._sequence = max(0, last - READ_MAX)
        if last == self._sequence:
            return Lines()
        skipped = 0
        if self._subject is None and last - self._sequence > READ_MAX:
            skipped = last - self._sequence - READ_MAX
            self._sequence = last - READ_MAX
        start = Start(sequence=self._sequence + 1, subject=self._subject)
        read = await self._messages.read(self._stream, start, limit=READ_MAX)
        if read and read[-1].pending > READ_MAX:
            # Of one tenant: sequences say nothing of how many there are, the server's count of what is left does.
            skipped = read[-1].pending
            self._sequence = last
        else:
            self._sequence = read[-1].sequence if read and read[-1].pending else last
        shown = [line_of(read_message(each)) for each in read]
        if self._device_id is not None:
            shown = [line for line in shown if line.device_id == self._device_id]
        return Lines(lines=shown[-SHOWN_MAX:], skipped=skipped + max(0, len(shown) - SHOWN_MAX))


class DeviceTail:
    """Looks at what was stored of one device; `services.device_watch` does so once a second."""

    def __init__(
        self,
        rows: Rows,
        *,
        tenant_id: str,
        device_id: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._rows = rows
        self._tenant_id = tenant_id
        self._device_id = device_id
        self._clock = clock
        self._cursor: Cursor | None = None

    async def look(self) -> Lines:
        """Rows with a time behind that of the last one shown. Raises Outage, Refusal NOT_FOUND."""
        now = self._clock()
        since = now - timedelta(seconds=LOOK_BACK_S)
        if self._cursor is not None:
            since = max(since, EPOCH + timedelta(microseconds=self._cursor.ts_us))
        query = Query(
            since=since,
            until=now + timedelta(seconds=LOOK_BACK_S),
            metrics=None,
            limit=ROWS_MAX,
            cursor=None,
            descending=True,
        )
        rows = await self._rows.rows(self._tenant_id, self._device_id, query)
        fresh = [row for row in reversed(rows) if self._cursor is None or _behind(row.cursor, self._cursor)]
        if fresh:
            self._cursor = fresh[-1].cursor
        return Lines(lines=[self._line(row) for row in fresh])

    def _line(self, row: StoredReading) -> Line:
        return Line(
            sequence=row.seq or 0,
            at_ms=int(row.ts.timestamp() * 1000),
            subject="",
            tenant_id=self._tenant_id,
            device_id=self._device_id,
            kind="telemetry",
            source="",
            text=bytes(row.metrics).decode(),
        )


def line_of(read: ReadMessage) -> Line:
    """One message as a line."""
    message, envelope = read.message, read.envelope
    return Line(
        sequence=message.sequence,
        at_ms=int(message.stored_at.timestamp() * 1000),
        subject=message.subject,
        tenant_id="" if envelope is None else envelope.tenant_id,
        device_id="" if envelope is None else envelope.device_id,
        kind="raw" if envelope is None else str(envelope.msg_type),
        source="" if envelope is None else envelope.source,
        text=read.text[:2000],
    )


def _behind(cursor: Cursor, other: Cursor) -> bool:
    return (cursor.ts_us, cursor.position) > (other.ts_us, other.position)
