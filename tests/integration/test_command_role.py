"""The role `commands` as it is wired, in this process, on a real nats-server and PostgreSQL; and what dies in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest
from prometheus_client.exposition import generate_latest

from command_bench import TENANT, CommandBench, new
from dead_letter_bench import Bench, Crash, bench, crash_at, topology
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.ask import Asker
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.heard import heard_until_ms
from pulse.adapters.nats.streams import consumer_state, stream_state
from pulse.adapters.postgres.pool import open_pool
from pulse.domain.command import Command, State
from pulse.domain.fleet import Filter, NewFleet
from pulse.runtime.health import readiness
from pulse.runtime.lifecycle import run_services
from pulse.runtime.metrics import process_registry
from pulse.runtime.settings import Settings
from pulse.wiring.command import command_services, command_sweep
from pulse.wiring.process import Process
from worker_bench import until

STEPS = ("decoded", "ledger_written", "before_commit")


class Both(CommandBench):
    """Commands in PostgreSQL, and COMMANDS in a nats-server."""

    def __init__(self, system: Bench) -> None:
        super().__init__(system.pool)
        self.system = system
        self.now_ms = time.time_ns() // 1_000_000

    async def publish(self, *bodies: bytes) -> None:
        await self.system.publish(*bodies, subject=f"commands.{TENANT}")

    async def until_taken_in(self) -> None:
        async def taken_in() -> bool:
            state = await consumer_state(self.system.client, "COMMANDS", "command-workers")
            return state.pending == state.ack_pending == 0

        await until(taken_in)

    async def told(self) -> list[str]:
        """The ids in DOWN, in order."""
        context, state = self.system.client.jetstream(), await stream_state(self.system.client, "DOWN")
        messages = [await context.get_msg("DOWN", sequence) for sequence in range(1, state.last_seq + 1)]
        return [msgspec.json.decode(message.data or b"")["commandId"] for message in messages]


@pytest.fixture
async def both(nats: NatsServer, database: str) -> AsyncIterator[Both]:
    async with bench(nats.url, database) as system:
        await system.apply(topology())
        made = Both(system)
        await made.register(["d1", "d2"])
        yield made


@asynccontextmanager
async def role(
    nats: NatsServer, database: str, *, probe: Callable[[str], None] = lambda _: None, sweeping: bool = False
) -> AsyncIterator[Process]:
    """The role's services, and the sweep of maintenance where asked; drained at the end."""
    settings = Settings(
        nats_url=nats.url, database_url=database, retry_delay_s_min=0.02, retry_delay_s_max=0.2,
        command_sweep_interval_s=0.05,
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        process = Process(
            settings=settings,
            nats=await stack.enter_async_context(connection(nats.url, name="test")),
            pool=await stack.enter_async_context(
                open_pool(database, size_max=6, timeout_s=10, application_name="test")
            ),
            metrics=process_registry(role="commands"),
            probe=probe,
            stack=stack,
        )
        own = await command_services(process)
        if sweeping:
            own.append(command_sweep(process))
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(run_services([*process.shared, *own], stop=stop, drain_s_max=4.0))
            yield process
            stop.set()


async def test_a_command_leaves_is_asked_for_and_ends_as_its_device_says(
    nats: NatsServer, database: str, both: Both
) -> None:
    async with role(nats, database) as process:
        command = await both.create()

        async def left() -> bool:
            return await both.told() == [command.command_id]

        await until(left)
        asked = await Asker(both.system.client, timeout_s=30).ask("commands", TENANT, "d1")
        (told,) = msgspec.json.decode(asked)["commands"]
        assert told == {
            "commandId": command.command_id,
            "name": "reboot",
            "payload": {"delay": 3},
            "issuedAt": command.created_ms,
            "expiresAt": command.expires_ms,
        }
        await both.publish(both.answer("d1", command.command_id, "succeeded").body, b"{}")
        await both.until_taken_in()
        assert await both.state(command) == "succeeded"
        assert msgspec.json.decode(await Asker(both.system.client, timeout_s=30).ask("commands", TENANT, "d1")) == {
            "commands": []
        }
        assert readiness(process.checks)[0]
        text = generate_latest(process.metrics).decode()
    assert 'pulse_commands_messages_total{outcome="moved"} 1.0' in text
    assert 'pulse_commands_messages_total{outcome="dead"} 1.0' in text
    assert 'pulse_commands_moves_total{state="succeeded"} 1.0' in text


async def test_a_fleet_is_made_and_said_by_the_role(nats: NatsServer, database: str, both: Both) -> None:
    asked = new()
    fleet, _ = await both.store.create_fleet(
        NewFleet(
            tenant_id=TENANT,
            name="blink",
            payload=asked.payload,
            ttl_ms=asked.ttl_ms,
            timeout_ms=asked.timeout_ms,
            filter=Filter(all=True),
        ),
        who="key",
        at_ms=both.now_ms,
    )
    async with role(nats, database):

        async def said() -> bool:
            return len(await both.told()) == 2

        await until(said)
    assert (await both.store.fleet(TENANT, fleet.fleet_id)).counts == {State.QUEUED: 2}


async def _life(both: Both) -> list[Command]:
    """Two ordered commands, of which the first has been answered for, and something that is no answer."""
    commands = [await both.create(ordered=True) for _ in range(2)]
    answer = both.answer("d1", commands[0].command_id, "succeeded").body
    await both.publish(answer, b"{}", answer)
    return commands


async def _is_as_it_should_be(both: Both, commands: list[Command]) -> None:
    first, second = commands
    assert [state for state, *_ in await both.moves(first)] == ["queued", "succeeded"]
    assert await both.state(second) == "queued"
    assert await both.pool.fetchval("SELECT count(*) FROM dead_letters") == 1

    async def both_said() -> bool:
        return set(await both.told()) == {command.command_id for command in commands}

    await until(both_said)


@pytest.mark.parametrize("step", ["commands.fetched", *[f"commands.{step}" for step in STEPS], "commands.committed",
                                  "commands.acked", "postman.published"])  # fmt: skip
async def test_wherever_the_worker_dies_each_message_has_its_effect_once(
    nats: NatsServer, database: str, both: Both, step: str
) -> None:
    commands = await _life(both)
    with pytest.raises(ExceptionGroup) as raised:
        async with role(nats, database, probe=crash_at(step)):
            await asyncio.sleep(30)
    assert raised.group_contains(Crash)
    async with role(nats, database):
        await both.until_taken_in()
        await _is_as_it_should_be(both, commands)


@pytest.mark.parametrize("step", [*[f"commands.{step}" for step in STEPS], "rescue.settled"])
async def test_an_answer_that_its_worker_never_settled_is_taken_in_once_wherever_the_rescue_dies(
    nats: NatsServer, database: str, both: Both, step: str
) -> None:
    commands = await _life(both)
    await both.system.exhaust(stream="COMMANDS", consumer="command-workers", count=3)
    with pytest.raises(ExceptionGroup):
        await both.system.rescue(probe=crash_at(step))
    await both.system.rescue()
    async with role(nats, database):
        await _is_as_it_should_be(both, commands)


async def test_time_does_not_run_ahead_of_what_the_stream_holds(nats: NatsServer, database: str, both: Both) -> None:
    """An answer that came in time, and waits for a worker that is away, is not too late."""
    assert await heard_until_ms(both.system.client, "COMMANDS", "command-workers") is None
    # The message is stored at a time that the server says; the command's is set by it.
    command, other = await both.create(), await both.create("d2")
    await both.publish(b"{}", both.answer("d1", command.command_id, "succeeded").body)
    heard_ms = await heard_until_ms(both.system.client, "COMMANDS", "command-workers")
    assert heard_ms is not None
    await both.pool.execute("UPDATE commands SET due_ms = $1 WHERE command_id = $2", heard_ms + 1, command.command_id)
    await both.pool.execute("UPDATE commands SET due_ms = $1 WHERE command_id = $2", heard_ms, other.command_id)

    async with connection(nats.url, name="test") as client, AsyncExitStack() as stack:
        settings = Settings(nats_url=nats.url, database_url=database, command_sweep_interval_s=0.02)
        process = Process(
            settings=settings,
            nats=client,
            pool=both.pool,
            metrics=process_registry(role="maintenance"),
            probe=lambda _: None,
            stack=stack,
        )
        stop = asyncio.Event()
        sweeping = asyncio.create_task(command_sweep(process).run(stop))

        async def other_expired() -> bool:
            return await both.state(other) == "expired"

        await until(other_expired)
        assert await both.state(command) == "queued", "nobody knows yet what its device has said"
        async with role(nats, database):
            await both.until_taken_in()
        assert await both.state(command) == "succeeded"
        stop.set()
        await sweeping


async def test_the_oldest_unheard_word_is_found_behind_one_that_is_gone(both: Both) -> None:
    await both.publish(b"{}")
    context = both.system.client.jetstream()
    first = await heard_until_ms(both.system.client, "COMMANDS", "command-workers")
    await both.publish(b"{}")
    assert await heard_until_ms(both.system.client, "COMMANDS", "command-workers") == first
    await context.delete_msg("COMMANDS", 1)
    second = await heard_until_ms(both.system.client, "COMMANDS", "command-workers")
    assert first is not None
    assert second is not None
    assert second >= first
    await context.delete_msg("COMMANDS", 2)
    assert await heard_until_ms(both.system.client, "COMMANDS", "command-workers") is None
