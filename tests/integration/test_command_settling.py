"""What devices say moves their commands once, whatever comes late, again, or to two workers at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import msgspec
import pytest

from command_bench import START_MS, TENANT, TIMEOUT_MS, CommandBench, open_bench
from pulse.adapters.postgres.command_settling import CommandSettling
from pulse.adapters.postgres.ledger import LedgerReader
from pulse.domain.command import State
from pulse.domain.errors import Outage, Reason
from pulse.domain.ledger import PositionSet, position
from pulse.domain.settlement import Message
from pulse.domain.subjects import MessageType


@pytest.fixture
async def bench(database: str) -> AsyncIterator[CommandBench]:
    async with open_bench(database) as bench:
        yield bench


async def test_a_command_goes_its_way_and_each_step_says_who_and_when(bench: CommandBench) -> None:
    command = await bench.create()
    bench.now_ms += 10
    await bench.sent(command)
    bench.now_ms += 10
    await bench.say("d1", command.command_id, "acknowledged")
    heard = await bench.store.command(TENANT, command.command_id)
    assert (heard.sent_ms, heard.sends, heard.due_ms) == (START_MS + 10, 1, START_MS + 20 + TIMEOUT_MS)
    bench.now_ms += 10
    settled = await bench.say("d1", command.command_id, "failed", error="jammed", result={"angle": 3})
    assert (settled.moved, settled.late) == ({State.FAILED: 1}, 0)
    ended = await bench.store.command(TENANT, command.command_id)
    assert (ended.state, ended.result, ended.error, ended.due_ms) == ("failed", b'{"angle":3}', "jammed", None)
    assert await bench.moves(command) == [
        ("queued", 0, "key"),
        ("sent", 10, "pulse"),
        ("acknowledged", 20, "device"),
        ("failed", 30, "device"),
    ]


async def test_what_comes_late_or_once_more_moves_nothing_and_is_counted(bench: CommandBench) -> None:
    command = await bench.create()
    await bench.say("d1", command.command_id, "acknowledged")
    bench.now_ms += 1000
    assert (await bench.say("d1", command.command_id, "acknowledged")).late == 1
    heard = await bench.store.command(TENANT, command.command_id)
    assert heard.due_ms == START_MS + TIMEOUT_MS, "to say it again gains no time"
    assert (await bench.sent(command)).late == 1
    await bench.say("d1", command.command_id, "succeeded", result=1)
    for state in ("failed", "acknowledged", "rejected", "succeeded"):
        settled = await bench.say("d1", command.command_id, state, result=2)
        assert (settled.late, settled.moved) == (1, {})
    ended = await bench.store.command(TENANT, command.command_id)
    assert (ended.state, ended.result) == ("succeeded", b"1")


async def test_one_batch_may_hold_a_whole_life_in_any_order_of_delivery(bench: CommandBench) -> None:
    commands = [await bench.create() for _ in range(20)]
    said = [
        bench.answer("d1", command.command_id, state)
        for state in ("acknowledged", "succeeded", "failed")
        for command in commands
    ]
    random.Random(7).shuffle(said)
    settled = await bench.settle(*said)
    assert settled.moved == {State.ACKNOWLEDGED: 20, State.SUCCEEDED: 20}
    assert settled.late == 20
    assert {await bench.state(command) for command in commands} == {"succeeded"}


async def test_a_command_sent_again_counts_and_is_one_step(bench: CommandBench) -> None:
    command = await bench.create()
    for _ in range(3):
        bench.now_ms += 5
        await bench.sent(command)
    sent = await bench.store.command(TENANT, command.command_id)
    assert (sent.sends, sent.sent_ms) == (3, START_MS + 15)
    assert [state for state, *_ in await bench.moves(command)] == ["queued", "sent"]


@pytest.mark.parametrize(("device_id", "tenant_id"), [("d2", TENANT), ("d1", "other")])
async def test_an_answer_of_another_device_is_a_dead_letter(
    bench: CommandBench, device_id: str, tenant_id: str
) -> None:
    command = await bench.create()
    stranger = bench.answer(device_id, command.command_id, "succeeded", tenant_id=tenant_id)
    own = bench.answer("d1", command.command_id, "acknowledged")
    settled = await bench.settle(stranger, own)
    assert [letter.reason for letter in settled.dead] == [Reason.UNKNOWN_COMMAND]
    assert await bench.state(command) == "acknowledged", "its neighbour in the batch is taken in"
    row = await bench.pool.fetchrow("SELECT * FROM dead_letters")
    assert row is not None
    assert (row["stream"], row["reason"], row["tenant_id"], row["device_id"], bytes(row["body"])) == (
        "COMMANDS", "unknown_command", tenant_id, device_id, stranger.body
    )  # fmt: skip
    ledger = await LedgerReader(bench.pool).settled(1)
    assert (ledger.positions, ledger.dead) == (
        PositionSet.of([position(1, 1), position(1, 2)]),
        PositionSet.of([position(1, 1)]),
    )


async def told(bench: CommandBench) -> list[tuple[str, dict[str, object]]]:
    """What is on its way to devices: the topic, and what it says."""
    rows = await bench.pool.fetch("DELETE FROM outbox RETURNING id, kind, device_id, topic, body")
    assert {row["kind"] for row in rows} <= {"commands"}
    ordered = sorted(rows, key=lambda row: row["id"])
    return [(f"{row['device_id']}/{row['topic']}", msgspec.json.decode(row["body"])) for row in ordered]


async def test_who_answers_for_another_device_hears_what_it_would_of_a_command_of_nobody(bench: CommandBench) -> None:
    command = await bench.create("d1")
    await told(bench)
    settled = await bench.settle(
        bench.answer("d2", command.command_id, "succeeded"),
        bench.answer("d2", "nobodys", "succeeded"),
        bench.message("d2", b'{"commandId":"nobodys"}', kind=MessageType.COMMANDS_SENT),
    )
    assert (settled.rejected, settled.not_kept, len(settled.dead)) == (2, 0, 3)
    said = await told(bench)
    assert [topic for topic, _ in said] == ["d2/commands/ack/rejected"] * 2, "what we said ourselves is not answered"
    assert [(each["code"], each["commandId"]) for _, each in said] == [(404, command.command_id), (404, "nobodys")]
    first, second = (str(each["message"]).replace(str(each["commandId"]), "…") for _, each in said)
    assert first == second


async def test_who_answers_after_the_end_is_told_which_it_was_and_who_repeats_itself_is_not(
    bench: CommandBench,
) -> None:
    ended, cancelled = await bench.create(), await bench.create()
    await bench.say("d1", ended.command_id, "succeeded")
    await bench.store.cancel(TENANT, cancelled.command_id, who="key", at_ms=bench.now_ms)
    await told(bench)
    for state in ("acknowledged", "succeeded", "succeeded"):
        assert (await bench.say("d1", ended.command_id, state)).rejected == 0
    assert await told(bench) == []
    assert (await bench.say("d1", ended.command_id, "failed")).rejected == 1
    late = [bench.answer("d1", cancelled.command_id, state) for state in ("acknowledged", "succeeded")]
    settled = await bench.settle(*late)
    assert (settled.rejected, settled.late, settled.dead) == (2, 2, [])
    assert (await bench.settle(*late)).rejected == 0, "what was settled before is not told again"
    said = [(each["code"], each["message"]) for _, each in await told(bench)]
    assert said == [(409, "the command has ended: succeeded")] + [(409, "the command has ended: cancelled")] * 2


async def test_dead_letters_of_unknown_commands_have_a_bound_and_their_devices_hear_of_all(bench: CommandBench) -> None:
    asked: list[str] = []

    def keeps(tenant_id: str) -> bool:
        asked.append(tenant_id)
        return len(asked) <= 2

    bench.settling = CommandSettling(bench.pool, stream="COMMANDS", keeps=keeps)
    settled = await bench.settle(*[bench.answer("d1", f"c{number}", "failed") for number in range(5)])
    assert (settled.rejected, settled.not_kept, len(settled.dead), asked) == (5, 3, 2, [TENANT] * 5)
    assert len(await told(bench)) == 5
    assert await bench.pool.fetchval("SELECT count(*) FROM dead_letters") == 2
    ledger = await LedgerReader(bench.pool).settled(1)
    assert (len(ledger.positions), len(ledger.dead)) == (5, 2)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"commandId":"none","state":"succeeded"}', Reason.UNKNOWN_COMMAND),
        (b'{"commandId":"c","state":"finished"}', Reason.INVALID_PAYLOAD),
        (b'{"state":"succeeded"}', Reason.INVALID_PAYLOAD),
        (b'{"commandId":"c","state":"succeeded","result":"\\u0000"}', Reason.INVALID_PAYLOAD),
        (b'{"commandId":"c","state":"succeeded","error":"\\u0000"}', Reason.INVALID_PAYLOAD),
        (b'{"commandId":"\\u0000","state":"succeeded"}', Reason.INVALID_PAYLOAD),
        (b'{"commandId":"c","state":"succeeded","result":%b1%b}' % (b"[" * 40, b"]" * 40), Reason.TOO_LARGE),
        (b"[]", Reason.INVALID_PAYLOAD),
    ],
)
async def test_what_cannot_be_read_is_a_dead_letter(bench: CommandBench, payload: bytes, reason: Reason) -> None:
    settled = await bench.settle(bench.message("d1", payload))
    assert [letter.reason for letter in settled.dead] == [reason]
    assert await bench.pool.fetchval("SELECT device_id FROM dead_letters") == "d1"


async def test_a_device_cannot_say_what_is_ours_to_say(bench: CommandBench) -> None:
    """A `commands-sent` for a command of another device moves nothing."""
    command = await bench.create()
    payload = b'{"commandId":"%b"}' % command.command_id.encode()
    settled = await bench.settle(bench.message("d2", payload, kind=MessageType.COMMANDS_SENT))
    assert [letter.reason for letter in settled.dead] == [Reason.UNKNOWN_COMMAND]
    assert await bench.state(command) == "queued"


async def test_a_batch_delivered_again_is_settled_once(bench: CommandBench) -> None:
    first, second = await bench.create(ordered=True), await bench.create(ordered=True)
    await bench.post()
    done, strange = bench.answer("d1", first.command_id, "succeeded"), bench.message("d1", b"[]")
    await bench.settle(done, strange)
    after = bench.answer("d1", second.command_id, "acknowledged")
    settled = await bench.settle(done, strange, after)
    assert settled.already == PositionSet.of([position(1, 1), position(1, 2)])
    assert (settled.moved, settled.late, settled.dead) == ({State.ACKNOWLEDGED: 1}, 0, [])
    assert len(await bench.post()) == 1
    assert await bench.pool.fetchval("SELECT count(*) FROM dead_letters") == 1


async def test_two_workers_with_the_same_messages_settle_each_once(bench: CommandBench) -> None:
    commands = [await bench.create("d1" if number % 2 else "d2") for number in range(50)]
    said = [
        bench.answer(command.device_id, command.command_id, state)
        for command in commands
        for state in ("acknowledged", "succeeded")
    ]
    chance = random.Random(11)
    batches = [chance.sample(said, 40) for _ in range(20)] + [said]
    settled = await asyncio.gather(*[_until_settled(bench, batch) for batch in batches])
    moves = {state: sum(each[state] for each in settled) for state in ("acknowledged", "succeeded")}
    assert {await bench.state(command) for command in commands} == {"succeeded"}
    recorded = await bench.pool.fetchval("SELECT count(*) FROM command_moves WHERE state = 'succeeded'")
    assert moves["succeeded"] == recorded == 50, "each end was made by one of them"


async def _until_settled(bench: CommandBench, batch: list[Message]) -> dict[str, int]:
    while True:
        try:
            settled = await bench.settle(*batch)
        except Outage:
            continue  # PostgreSQL has called two that wait for one another a deadlock
        return {"acknowledged": 0, "succeeded": 0, **{state.value: n for state, n in settled.moved.items()}}


@pytest.mark.parametrize("seed", range(10))
async def test_of_a_cancel_and_an_answer_at_once_one_wins_and_the_record_says_which(
    bench: CommandBench, seed: int
) -> None:
    command = await bench.create()
    racers = [
        bench.store.cancel(TENANT, command.command_id, who="key", at_ms=START_MS),
        bench.say("d1", command.command_id, "succeeded"),
    ]
    if seed % 2:
        racers.reverse()
    outcomes = await asyncio.gather(*racers, return_exceptions=True)
    ends = [state for state, *_ in await bench.moves(command) if state in ("cancelled", "succeeded")]
    assert ends == [await bench.state(command)], "one end, and one record of it"
    refused = sum(isinstance(outcome, Exception) for outcome in outcomes)
    assert refused == (ends == ["succeeded"]), "who cancels too late is told so"


@pytest.mark.parametrize("seed", range(10))
async def test_of_an_expiry_and_an_answer_at_once_one_wins(bench: CommandBench, seed: int) -> None:
    command = await bench.create(ttl_ms=1)
    following = await bench.create(ordered=True)
    bench.now_ms += 1
    racers = [bench.sweep(), bench.say("d1", command.command_id, "succeeded")]
    if seed % 2:
        racers.reverse()
    await asyncio.gather(*racers)
    ends = [state for state, *_ in await bench.moves(command) if state != "queued"]
    assert ends == [await bench.state(command)]
    assert ends[0] in ("expired", "succeeded")
    assert await bench.state(following) == "queued"
