"""The registry in JetStream: a key-value bucket with one entry for each tenant and device.

Writers and the reconciler use it, the edge follows it through `registry_feed`. An entry is the last message of a
subject, its revision the stream sequence. The layout is that of NATS key-value stores (ADR-8): `nats kv` reads it too.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from itertools import islice

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg

from pulse.adapters.nats.errors import HINTS, SYSTEM, ErrorCode, JetStreamRefusal, mapped
from pulse.adapters.nats.follow import Interrupted, Message, follow
from pulse.domain.errors import ConfigurationError, Outage
from pulse.domain.registry import Record, decode_record, encode_record

logger = structlog.get_logger()

BUCKET = "registry"
STREAM = f"KV_{BUCKET}"
PREFIX = f"$KV.{BUCKET}."
KEYS_AT_ONCE = 1000
"""Keys of one read (JetStream answers 1024 at most) and writes that are under way together."""
ROUNDS_MAX = 10
"""How often one key may be written by others between our read and our write."""
WRONG_LAST_SEQUENCE = frozenset({10071, 10164})
OPERATION = "KV-Operation"
DELETIONS = frozenset({"DEL", "PURGE"})
NO_RESPONDERS = "503"
END_OF_READ = frozenset({"204", "404"})
"""End of batch, and none of the keys is there."""
EXPECTED_REVISION = "Nats-Expected-Last-Subject-Sequence"

Loader = Callable[[Sequence[str]], Awaitable[Mapping[str, Record]]]


class _Entry(msgspec.Struct, frozen=True):
    revision: int
    value: bytes | None
    """None where the entry was deleted."""


_NO_ENTRY = _Entry(revision=0, value=None)


class _Write(msgspec.Struct, frozen=True):
    """What is to stand under a key (None: nothing), if its revision is still that."""

    key: str
    value: bytes | None
    revision: int

    def headers(self) -> dict[str, str]:
        expected = {EXPECTED_REVISION: str(self.revision)}
        return expected if self.value is not None else expected | {OPERATION: "DEL"}


class _Error(msgspec.Struct, frozen=True):
    code: int
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct, frozen=True):
    error: _Error | None = None


_answers = msgspec.json.Decoder(_Answer)


class RegistryBucket:
    """Reads and writes the bucket; satisfies `services.reconcile.Projection`.

    Every method raises Outage, and ConfigurationError where the bucket does not exist.
    """

    def __init__(self, client: Client, *, timeout_s: float = 5.0) -> None:
        self._client = client
        self._timeout_s = timeout_s

    async def read(self, keys: Sequence[str]) -> Mapping[str, Record | None]:
        """What stands under each of `keys`; a value that is not one of ours is None, a key without one is absent."""
        entries = await self._entries(keys)
        return {key: decode_record(key, entry.value) for key, entry in entries.items() if entry.value is not None}

    async def key_pages(self) -> AsyncGenerator[list[str], None]:
        """The keys of all entries that are there now, in pages; one that is rewritten meanwhile may come twice."""
        try:
            async with follow(self._client, stream=STREAM, headers_only=True, timeout_s=self._timeout_s) as following:
                left = following.pending > 0
                while left:
                    messages = await following.read()
                    left = bool(messages) and messages[-1].pending > 0
                    yield [key_of(message) for message in messages if not is_deletion(message.headers)]
        except Interrupted as error:
            raise Outage(SYSTEM, f"cannot list the registry: {error}") from error

    async def project(
        self, keys: Sequence[str], load: Loader, *, on_progress: Callable[[int], None] | None = None
    ) -> frozenset[str]:
        """Make the entries under `keys` what `load` says, and return the keys whose entry was changed.

        For each key the revision is read before `load`, and the write holds only if it is still the last one: so of
        two writers the one that loaded later wins, and nobody's entry falls behind what was committed before.
        `on_progress` is told how many more keys are done.
        """
        changed: set[str] = set()
        remaining = iter(dict.fromkeys(keys))
        while chunk := list(islice(remaining, KEYS_AT_ONCE)):
            left = chunk
            for _ in range(ROUNDS_MAX):
                left = await self._project_once(left, load, changed)
                if not left:
                    break
            else:
                raise Outage(SYSTEM, f"{len(left)} registry entries are being rewritten all the time: {left[0]}, …")
            if on_progress is not None:
                on_progress(len(chunk))
        return frozenset(changed)

    async def _project_once(self, keys: Sequence[str], load: Loader, changed: set[str]) -> list[str]:
        """One round; adds to `changed`, returns the keys that someone else wrote in between."""
        entries = await self._entries(keys)
        records = await load(keys)
        writes = []
        for key in keys:
            entry, record = entries.get(key, _NO_ENTRY), records.get(key)
            value = None if record is None else encode_record(record)
            if value != entry.value:
                writes.append(_Write(key, value, entry.revision))
        lost = await self._write(writes)
        changed.update(write.key for write in writes)
        changed.difference_update(lost)
        return lost

    async def _write(self, writes: Sequence[_Write]) -> list[str]:
        """Write all; returns the keys whose revision was no longer that of the write, and which are not written.

        They go as one atomic batch, which costs the server one fsync; one by one where it refuses the batch.
        """
        doing = "cannot write the registry"
        with mapped(doing):
            if len(writes) > 1:
                try:
                    await self._write_batch(writes, doing)
                except JetStreamRefusal as refusal:
                    logger.debug("registry writes go one by one", reason=str(refusal), writes=len(writes))
                else:
                    return []
            outcomes = await asyncio.gather(
                *(self._write_one(write, doing) for write in writes), return_exceptions=True
            )
            lost = []
            for write, outcome in zip(writes, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    raise outcome
                if not outcome:
                    lost.append(write.key)
            return lost

    async def _write_one(self, write: _Write, doing: str) -> bool:
        """Whether it was written."""
        try:
            await self._put(write, write.headers(), doing)
        except JetStreamRefusal as refusal:
            if refusal.err_code not in WRONG_LAST_SEQUENCE:
                raise
            return False
        return True

    async def _write_batch(self, writes: Sequence[_Write], doing: str) -> None:
        """ADR-50: only the last message is answered, and stores all of them or none."""
        batch = secrets.token_hex(8)
        for number, write in enumerate(writes[:-1], start=1):
            headers = write.headers() | {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            await self._client.publish(PREFIX + write.key, write.value or b"", headers=headers)
        last = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(len(writes)), "Nats-Batch-Commit": "1"}
        await self._put(writes[-1], writes[-1].headers() | last, doing)

    async def _put(self, write: _Write, headers: dict[str, str], doing: str) -> None:
        reply = await self._client.request(
            PREFIX + write.key, write.value or b"", timeout=self._timeout_s, headers=headers
        )
        error = _answers.decode(reply.data).error
        if error is not None:
            raise JetStreamRefusal(code=error.code, err_code=error.err_code, description=error.description, doing=doing)

    async def _entries(self, keys: Sequence[str]) -> dict[str, _Entry]:
        """The last message under each of `keys`, deletions included; by a batched direct get (ADR-31)."""
        entries: dict[str, _Entry] = {}
        remaining = iter(keys)
        while chunk := [PREFIX + key for key in islice(remaining, KEYS_AT_ONCE)]:
            await self._read_chunk(chunk, entries)
        return entries

    async def _read_chunk(self, subjects: list[str], entries: dict[str, _Entry]) -> None:
        doing = "cannot read the registry"
        inbox = self._client.new_inbox()
        replies: asyncio.Queue[Msg] = asyncio.Queue(KEYS_AT_ONCE + 1)
        with mapped(doing):
            subscription = await self._client.subscribe(inbox, cb=replies.put)
            try:
                request = msgspec.json.encode({"multi_last": subjects})
                await self._client.publish(f"$JS.API.DIRECT.GET.{STREAM}", request, reply=inbox)
                while True:
                    async with asyncio.timeout(self._timeout_s):
                        reply = await replies.get()
                    headers = reply.headers or {}
                    status = headers.get("Status")
                    if status is not None:
                        break
                    value = None if is_deletion(headers) else reply.data
                    key = headers["Nats-Subject"].removeprefix(PREFIX)
                    entries[key] = _Entry(int(headers["Nats-Sequence"]), value)
            finally:
                if not self._client.is_closed:
                    await subscription.unsubscribe()
        if status == NO_RESPONDERS:
            raise ConfigurationError(f"{doing}: it does not exist", hint=HINTS[ErrorCode.STREAM_NOT_FOUND])
        if status not in END_OF_READ:
            raise Outage(SYSTEM, f"{doing}: status {status}")


def key_of(message: Message) -> str:
    """The registry key that `message` is an entry of."""
    return message.subject.removeprefix(PREFIX)


def is_deletion(headers: Mapping[str, str] | None) -> bool:
    """Whether an entry with these headers says that there is none."""
    return headers is not None and headers.get(OPERATION) in DELETIONS
