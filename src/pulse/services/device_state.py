"""Device states behind the settled messages: written now and then, and never a word lost.

Who acks, and when: a settled message whose word on its device is not written yet is held: its batch is acked without
it, and `_write` acks it after the transaction that writes the state has committed. A message that a later one leaves
nothing to say is acked with that one's batch, so about one a device is held. A crash costs the redelivery of those that
were held: the ledger knows them, and their words are heard again.

    settled batch ──► hear ─┬─ it has nothing to say that a held one does not say ──► acked with its batch
                            └─ held ──► a second after the last write, or too many held ──► write ──► ack
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from pulse.domain.device_state import Device, DeviceState, Word, Words, needed, outdates, state_of
from pulse.domain.errors import Outage
from pulse.domain.ledger import epoch_of
from pulse.domain.settlement import Message
from pulse.services.waiting import KeptAlive, Source, Waits

INTERVAL_S = 1.0
"""A device that talks all the time has its state written so often: in every batch it would cost as much as its rows."""
HELD_MAX = 5000
"""So many held messages are written at once; each is a pending ack, of which the consumer may have 20,000."""
HELD_BYTES_MAX = 4 * 1024 * 1024
"""So many bytes of held messages are written at once."""


class StateStore(Protocol):
    """The database; raises Outage where it is away."""

    async def write_states(self, states: Mapping[Device, DeviceState]) -> None:
        """Take these into account; by what is known already nothing changes."""


class Answered(NamedTuple):
    """Messages that get the same answer; a Batch."""

    created_ns: int
    messages: Sequence[Message]


class StateKeeper:
    """Hears the words of settled messages, and writes them; iterates over the messages that it holds."""

    def __init__(
        self, *, source: Source, store: StateStore, kept_alive: KeptAlive, waits: Waits, probe: Callable[[str], None]
    ) -> None:
        self._source = source
        self._store = store
        self._kept_alive = kept_alive
        self._waits = waits
        self._probe = probe
        self._last: dict[Device, Word] = {}
        self._others: dict[Device, Sequence[Word]] = {}
        self._makings: dict[int, int] = {}
        self._freed: list[int] = []
        self.held: dict[int, Message] = {}
        """The messages, by position, that are acked from here."""
        self._heard = asyncio.Event()
        self._hurry = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._finishing = False
        kept_alive.take(self, self)

    def __iter__(self) -> Iterator[Message]:
        return iter(self.held.values())

    def hear(self, created_ns: int, words: Words, messages: Mapping[int, Message]) -> None:
        """Take the words of settled `messages`, which are by position; what says anything new is held from now on."""
        last, held, freed = self._last, self.held, self._freed
        for device, word in words.last.items():
            before = last.get(device)
            if before is None or outdates(word, before):
                last[device] = word
                held.setdefault(word.position, messages[word.position])
                if before is not None:
                    freed.append(before.position)
            else:
                freed += self._weigh(device, word, messages)
        for device, word in words.others:
            freed += self._weigh(device, word, messages)
        if words.last:
            self._makings[epoch_of(next(iter(words.last.values())).position)] = created_ns
            self._heard.set()
        self._check_room()

    def take_freed(self, created_ns: int) -> list[Message]:
        """The messages that are held no longer, to be acked; of another making of the stream none may be."""
        freed, self._freed = self._freed, []
        messages = [(position, self.held.pop(position)) for position in freed if position in self.held]
        return [message for position, message in messages if self._makings[epoch_of(position)] == created_ns]

    def _weigh(self, device: Device, word: Word, messages: Mapping[int, Message]) -> list[int]:
        """Take a word beside those of its device that it does not simply outdate; returns what is no longer needed."""
        before = [self._last[device], *self._others.get(device, ())]
        after = needed([*before, word])
        self._last[device], *self._others[device] = after
        still = {each.position for each in after}
        if word.position in still:
            self.held.setdefault(word.position, messages[word.position])
        return [each.position for each in before if each.position not in still]

    async def room(self) -> None:
        """Returns once so little is held that more may be heard."""
        await self._room.wait()

    def finish(self) -> None:
        """No more will be heard: `run` returns when nothing is held."""
        self._finishing = True
        self._heard.set()
        self._hurry.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Write what is heard, until `finish`; outages are waited out until `stop`, then what is held is given back."""
        written_at = -INTERVAL_S
        while True:
            await self._heard.wait()
            try:
                async with asyncio.timeout(max(0.0, written_at + INTERVAL_S - time.monotonic())):
                    await self._hurry.wait()
            except TimeoutError:
                pass
            if not self._finishing:
                self._heard.clear()
                self._hurry.clear()
            words = {device: [word, *self._others.get(device, ())] for device, word in self._last.items()}
            self._last, self._others = {}, {}
            taken = [word.position for said in words.values() for word in said]
            self._probe("ingest.states_taken")
            if words and not await self._write(words, taken, stop):
                await self._give_back(taken)
            written_at = time.monotonic()
            for position in taken:
                self.held.pop(position, None)
            self._check_room()
            if self._finishing and not self._last:
                return

    async def _write(self, words: Mapping[Device, Sequence[Word]], taken: Sequence[int], stop: asyncio.Event) -> bool:
        """Write, then ack; outages waited out. False where `stop` came during an outage."""
        states = {device: state_of(said) for device, said in words.items()}
        attempt = 0
        while True:
            try:
                await self._store.write_states(states)
                self._probe("ingest.states_written")
                for answered in self._by_making(taken):
                    await self._source.ack(answered)
            except Outage as outage:
                attempt += 1
                if stop.is_set():
                    return False
                await self._waits.out(outage, attempt, stop)
                continue
            self._probe("ingest.states_acked")
            self._waits.over()
            return True

    async def _give_back(self, taken: Sequence[int]) -> None:
        for answered in self._by_making(taken):
            await self._kept_alive.give_back(answered)

    def _by_making(self, taken: Sequence[int]) -> list[Answered]:
        """The messages at these positions, apart by the making of their stream; less those that were freed since."""
        makings: dict[int, list[Message]] = {}
        for position in taken:
            if position in self.held:
                makings.setdefault(self._makings[epoch_of(position)], []).append(self.held[position])
        return [Answered(created_ns, messages) for created_ns, messages in makings.items()]

    def _check_room(self) -> None:
        """Hurry where too much is held that is not about to be acked; what made us hurry may be over by now."""
        held = self.held.values()
        if len(held) - len(self._freed) >= HELD_MAX or sum([len(message.body) for message in held]) >= HELD_BYTES_MAX:
            self._room.clear()
            self._hurry.set()
        else:
            self._room.set()
            if not self._finishing:
                self._hurry.clear()
