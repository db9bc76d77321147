"""What is known of a device by what it has said: when it was last heard of, and the latest value of each metric.

A state is a join: the later of two instants, and of each metric the value that comes last by (ts, position). So it does
not matter in which order words are taken into account, in which company, or how often: states that know of the same
words are the same. Nothing moves back, and a crash costs nothing as long as whatever is not yet written is heard again.

    word      what one message says: when the edge received it, and metrics as of a time and a position
    state     what any number of words say together

No device fills the database by inventing names: of more than METRICS_MAX only those that were said last are kept. That
is a join as well, for a name that falls out has so many behind it that are newer, and they only ever become newer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import msgspec

from pulse.domain.ledger import PositionSet
from pulse.domain.telemetry import Metric, Metrics

METRICS_MAX = 1024

Device = tuple[str, str]
"""Tenant and device."""

_decoder = msgspec.json.Decoder(Metrics)


class Word(Protocol):
    """What one message says of its device; times in µs since the epoch."""

    @property
    def position(self) -> int:
        """Of the message."""

    @property
    def seen_us(self) -> int:
        """When the edge received it."""

    @property
    def ts_us(self) -> int:
        """As of when it says what it says."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its metrics, each once; a heartbeat has none."""

    @property
    def metrics(self) -> bytes:
        """The metrics, a JSON object."""


class Words(NamedTuple):
    """The words of a batch: of each device the last one, and those that it leaves something to say."""

    last: dict[Device, Word]
    others: list[tuple[Device, Word]]

    def without(self, dead: PositionSet) -> Words:
        """Less those at these positions."""
        words = Words({}, [])
        for device, said in self.of_each().items():
            for word in said:
                if word.position not in dead and words.last.setdefault(device, word) is not word:
                    words.others.append((device, word))
        return words

    def of_each(self) -> dict[Device, list[Word]]:
        """All of them, by device."""
        words = {device: [word] for device, word in self.last.items()}
        for device, word in self.others:
            words[device].append(word)
        return words


class Value(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The value of a metric, as of when, and the position of the message that said it."""

    value: Metric
    ts_us: int
    position: int


class DeviceState(msgspec.Struct, frozen=True):
    """When a device was last heard of, in µs since the epoch, and the latest value of each metric."""

    seen_us: int
    latest: Mapping[str, Value]


def outdates(word: Word, other: Word) -> bool:
    """Whether `word` leaves nothing for `other` to say, as the next message of a device mostly does; quick."""
    return (
        word.seen_us >= other.seen_us
        and word.ts_us >= other.ts_us
        and word.position > other.position
        and word.names == other.names
    )


def needed(words: Iterable[Word]) -> list[Word]:
    """Those of one device's `words` that make the same state as all of them; of one position only the first."""
    by_position: dict[int, Word] = {}
    for word in words:
        by_position.setdefault(word.position, word)
    seen_last = max(by_position.values(), key=_seen)
    names: set[str] = set()
    kept = []
    for word in sorted(by_position.values(), key=_said, reverse=True):
        if word is seen_last or not names.issuperset(word.names):
            kept.append(word)
            names.update(word.names)
    return kept


def state_of(words: Iterable[Word]) -> DeviceState:
    """What `words` of one device, at least one, say together."""
    seen_us = 0
    latest: dict[str, Value] = {}
    for word in sorted(words, key=_said):
        seen_us = max(seen_us, word.seen_us)
        for name, value in _decoder.decode(word.metrics).items():
            latest[name] = Value(value, word.ts_us, word.position)
    if len(latest) > METRICS_MAX:
        latest = dict(sorted(latest.items(), key=_said_last, reverse=True)[:METRICS_MAX])
    return DeviceState(seen_us, latest)


def _seen(word: Word) -> tuple[int, int]:
    return word.seen_us, word.position


def _said(word: Word) -> tuple[int, int]:
    return word.ts_us, word.position


def _said_last(item: tuple[str, Value]) -> tuple[int, int, str]:
    name, value = item
    return value.ts_us, value.position, name
