"""Commands in a real PostgreSQL, on a clock that stands until it is told to go on.

bench.create("d1", …)                   as the control API does
bench.say("d1", command_id, "failed")   a device's word, settled as the worker settles it
bench.sent(command_id)                  ours, that it has left
bench.sweep()                           what time does, until there is nothing left for it
bench.post()                            empties the outbox: what devices are told, in order
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec

from pulse.adapters.postgres.command_settling import CommandSettling
from pulse.adapters.postgres.command_sweep import CommandSweep
from pulse.adapters.postgres.commands import CommandStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool
from pulse.domain.command import Command, NewCommand
from pulse.domain.command_words import Said, Settled, read_said
from pulse.domain.envelope import wrap
from pulse.domain.ledger import position
from pulse.domain.settlement import DeadLetter, Message
from pulse.domain.subjects import MessageType, subject_for

TENANT = "acme"
START_MS = 1_790_000_000_000
TTL_MS = 60_000
TIMEOUT_MS = 20_000
PAUSE_MS = 30_000


class Told(NamedTuple):
    """What a device is told."""

    device_id: str
    command_id: str


class CommandBench:
    """See above."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.store = CommandStore(pool)
        self.settling = CommandSettling(pool, stream="COMMANDS")
        self.sweeping = CommandSweep(pool)
        self.now_ms = START_MS
        self._sequence = 0

    async def register(self, devices: Sequence[str], *, tenant_id: str = TENANT, attributes: str = "{}") -> None:
        """Make a tenant and its devices, where they are not there."""
        await self.pool.execute("INSERT INTO tenants (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING", tenant_id)
        await self.pool.execute(
            "INSERT INTO devices (tenant_id, device_id, attributes) SELECT $1, unnest($2::text[]), $3::jsonb"
            " ON CONFLICT DO NOTHING",
            tenant_id,
            list(devices),
            attributes,
        )

    async def create(self, device_id: str = "d1", name: str = "reboot", **asked: object) -> Command:
        """Make a command now."""
        return (await self.store.create(new(device_id, name, **asked), who="key", at_ms=self.now_ms))[0]

    def message(
        self,
        device_id: str,
        payload: bytes,
        *,
        kind: MessageType = MessageType.COMMANDS_ACK,
        tenant_id: str = TENANT,
    ) -> Message:
        """The next message of COMMANDS."""
        self._sequence += 1
        body = wrap(
            tenant_id=tenant_id,
            device_id=device_id,
            message_type=kind,
            received_ms=self.now_ms,
            source="mqtt",
            payload=payload,
        )
        return Message(subject_for(kind, tenant_id), body, b"", "", self._sequence, self.now_ms * 1_000_000, 1)

    def answer(
        self, device_id: str, command_id: str, state: str, *, tenant_id: str = TENANT, **more: object
    ) -> Message:
        """A device's answer."""
        payload = msgspec.json.encode({"commandId": command_id, "state": state, **more})
        return self.message(device_id, payload, tenant_id=tenant_id)

    async def settle(self, *messages: Message) -> Settled:
        """Settle these as one batch."""
        read = [read_said(position(1, message.sequence), message) for message in messages]
        said = [each for each in read if isinstance(each, Said)]
        dead = [each for each in read if isinstance(each, DeadLetter)]
        return await self.settling.settle(said, dead, at_ms=self.now_ms)

    async def say(self, device_id: str, command_id: str, state: str, **more: Any) -> Settled:
        """A device answers."""
        return await self.settle(self.answer(device_id, command_id, state, **more))

    async def sent(self, command: Command) -> Settled:
        """The command has left for its device."""
        payload = msgspec.json.encode({"commandId": command.command_id})
        return await self.settle(self.message(command.device_id, payload, kind=MessageType.COMMANDS_SENT))

    async def seen(self, device_id: str) -> None:
        """The device is heard of now."""
        await self.pool.execute(
            "INSERT INTO device_state (tenant_id, device_id, last_seen) VALUES ($1, $2, to_timestamp($3 / 1000.0))"
            " ON CONFLICT (tenant_id, device_id) DO UPDATE SET last_seen = excluded.last_seen",
            TENANT,
            device_id,
            self.now_ms,
        )

    async def sweep(self) -> int:
        """Let time do what it does, to the end; returns how many commands are sent again."""
        while await self.sweeping.end(due_ms=self.now_ms, at_ms=self.now_ms):
            pass
        count, is_last = 0, False
        while not is_last:
            again, is_last = await self.sweeping.say_again(pause_ms=PAUSE_MS, at_ms=self.now_ms)
            count += again
        return count

    async def post(self) -> list[Told]:
        """Empty the outbox."""
        rows = await self.pool.fetch("DELETE FROM outbox RETURNING id, device_id, body")
        return [
            Told(row["device_id"], msgspec.json.decode(row["body"])["commandId"])
            for row in sorted(rows, key=lambda row: row["id"])
        ]

    async def state(self, command: Command) -> str:
        """Where it stands."""
        return (await self.store.command(command.tenant_id, command.command_id)).state.value

    async def moves(self, command: Command) -> list[tuple[str, int, str]]:
        """How it came there; times from the start."""
        moves = await self.store.moves(command.tenant_id, command.command_id)
        return [(move.state.value, move.at_ms - START_MS, move.who) for move in moves]


def new(device_id: str = "d1", name: str = "reboot", **asked: object) -> NewCommand:
    """A request."""
    given: dict[str, object] = {"payload": b'{"delay":3}', "ttl_ms": TTL_MS, "timeout_ms": TIMEOUT_MS, **asked}
    return msgspec.convert({"tenant_id": TENANT, "device_id": device_id, "name": name, **given}, NewCommand)


@asynccontextmanager
async def open_bench(database: str, *, devices: Sequence[str] = ("d1", "d2")) -> AsyncIterator[CommandBench]:
    """A bench on an empty database, with these devices."""
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=8, timeout_s=10, application_name="test") as pool:
        bench = CommandBench(pool)
        await bench.register(devices)
        yield bench
