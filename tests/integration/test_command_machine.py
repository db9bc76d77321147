"""The real store against the table: a machine does at random what can happen, and compares every command."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from command_bench import PAUSE_MS, TENANT, TIMEOUT_MS, TTL_MS, CommandBench, open_bench
from pulse.domain.command import OPEN, Command, Event, State, after
from pulse.domain.errors import Reason, Refusal
from pulse.domain.settlement import Message

T = TypeVar("T")
DEVICES = ("d1", "d2")
ANSWERS = {
    "acknowledged": Event.ACKNOWLEDGE,
    "succeeded": Event.SUCCEED,
    "failed": Event.FAIL,
    "rejected": Event.REJECT,
}


class Book:
    """What is known of one command by the table alone."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.state = State.QUEUED
        self.due_ms = command.expires_ms
        self.states = [State.QUEUED]
        self.told = 0

    def happen(self, event: Event, at_ms: int) -> None:
        state = after(self.state, event)
        if state is None or state is self.state:
            return
        if state is State.ACKNOWLEDGED:
            self.due_ms = at_ms + TIMEOUT_MS
        self.state = state
        self.states.append(state)

    @property
    def is_open(self) -> bool:
        return self.state in OPEN

    @property
    def lane(self) -> tuple[str, str]:
        return self.command.device_id, self.command.name


class Machine(RuleBasedStateMachine):
    """Commands of two devices; nothing is killed here, but messages come late, again, and in company."""

    bench: CommandBench
    loop: asyncio.AbstractEventLoop

    def run(self, doing: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(doing)

    @initialize()
    def empty(self) -> None:
        self.books: list[Book] = []
        self.past: list[Message] = []
        self.run(
            self.bench.pool.execute("TRUNCATE commands, command_moves, outbox, ledger, dead_letters, device_state")
        )
        self.bench.sweeping._behind = ("", "", 0)

    @rule(device=st.sampled_from(DEVICES), ordered=st.booleans())
    def create(self, device: str, ordered: bool) -> None:
        self.books.append(Book(self.run(self.bench.create(device, ordered=ordered))))

    @rule(data=st.data(), states=st.lists(st.sampled_from(sorted(ANSWERS)), min_size=1, max_size=3))
    def answer(self, data: st.DataObject, states: list[str]) -> None:
        if not self.books:
            return
        messages = []
        for state in states:
            book = data.draw(st.sampled_from(self.books))
            messages.append(self.bench.answer(book.command.device_id, book.command.command_id, state))
            book.happen(ANSWERS[state], self.bench.now_ms)
        self.past += messages
        self.run(self.bench.settle(*reversed(messages)))

    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        if not self.past:
            return
        again = data.draw(st.lists(st.sampled_from(self.past), min_size=1, max_size=3, unique_by=id))
        settled = self.run(self.bench.settle(*again))
        assert len(settled.already) == len(again)

    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        if self.books:
            book = data.draw(st.sampled_from(self.books))
            self.run(self.bench.sent(book.command))
            book.happen(Event.SEND, self.bench.now_ms)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.books:
            return
        book = data.draw(st.sampled_from(self.books))
        cancelling = self.bench.store.cancel(TENANT, book.command.command_id, who="key", at_ms=self.bench.now_ms)
        if book.is_open:
            self.run(cancelling)
        else:
            with pytest.raises(Refusal) as raised:
                self.run(cancelling)
            assert raised.value.reason is Reason.CONFLICT
        book.happen(Event.CANCEL, self.bench.now_ms)

    @rule(ms=st.sampled_from([1, TIMEOUT_MS, PAUSE_MS + 1, TTL_MS]))
    def let_time_pass(self, ms: int) -> None:
        self.bench.now_ms += ms
        self.run(self.bench.sweep())
        for book in self.books:
            if book.is_open and book.due_ms <= self.bench.now_ms:
                book.happen(Event.EXPIRE, self.bench.now_ms)
                book.happen(Event.TIME_OUT, self.bench.now_ms)

    @rule(device=st.sampled_from(DEVICES))
    def be_heard_of(self, device: str) -> None:
        self.run(self.bench.seen(device))

    @invariant()
    def the_store_says_what_the_table_says(self) -> None:
        stored = {each.command_id: each for each in self.run(self.bench.store.commands(TENANT, limit=1000))}
        assert len(stored) == len(self.books)
        for book in self.books:
            command = stored[book.command.command_id]
            assert command.state is book.state
            assert command.due_ms == (book.due_ms if book.is_open else None)
            moves = self.run(self.bench.store.moves(TENANT, command.command_id))
            assert [move.state for move in moves] == book.states

    @invariant()
    def who_has_its_turn_has_been_told_and_nobody_else(self) -> None:
        for each in self.run(self.bench.post()):
            book = next(book for book in self.books if book.command.command_id == each.command_id)
            book.told += 1
            assert book.command.device_id == each.device_id
        for lane in {book.lane for book in self.books}:
            line = [book for book in self.books if book.lane == lane and book.command.ordered]
            waiting = [book for book in line if book.is_open]
            assert all(book.told for book in waiting[:1]), "the oldest that is open has been told"
            assert not any(book.told for book in waiting[1:]), "and no other"
        assert all(book.told for book in self.books if not book.command.ordered)


def test_the_store_does_what_the_table_says_whatever_happens(database: str) -> None:
    loop = asyncio.new_event_loop()
    opened = open_bench(database)
    try:
        Machine.bench, Machine.loop = loop.run_until_complete(opened.__aenter__()), loop
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck), deadline=None
            ),
        )
    finally:
        loop.run_until_complete(opened.__aexit__(None, None, None))
        loop.close()
