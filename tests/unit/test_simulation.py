"""The simulated fleet, the books of a run, and the verdict over both."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.adapters.http.device import Answer
from pulse.adapters.postgres.simulation import RunReader
from pulse.cli import simulate_drain
from pulse.cli.simulate_drain import AuditTotals, drain
from pulse.cli.simulate_load import Load, Plan
from pulse.cli.simulate_report import fault_of
from pulse.domain.audit import StreamAudit
from pulse.domain.identity import is_id
from pulse.domain.ledger import PositionSet
from pulse.domain.simulation import DEVICES_MAX, INSTALLED_S, KINDS, Fleet, Message, kind_of
from pulse.domain.tally import LATENCY_GROWTH, Latencies, Outcome, Storage, StoredRows, Tally, compare
from pulse.domain.telemetry import Bounds, PayloadDecoder
from pulse.runtime.settings import Settings

NOON_MS = 1_795_435_200_000
FLEET = Fleet(size=100, seed=1)
DECODER = PayloadDecoder(
    Bounds(
        metric_count_max=Settings().metric_count_max,
        metric_name_length_max=Settings().metric_name_length_max,
        metric_string_length_max=Settings().metric_string_length_max,
        ts_past_s_max=Settings().ts_past_s_max,
        ts_future_s_max=Settings().ts_future_s_max,
    )
)


def metrics(number: int, ts_ms: int = NOON_MS, *, fleet: Fleet = FLEET) -> dict[str, int | float | bool | str]:
    payload = fleet.telemetry(number, seq=7, ts_ms=ts_ms)
    return DECODER.telemetry(payload, received_ms=ts_ms, unique_keys=True).metrics


@given(st.integers(0, DEVICES_MAX - 1), st.integers(INSTALLED_S * 1000, INSTALLED_S * 2000), st.integers(0))
def test_every_payload_is_one_that_the_gateway_accepts(number: int, ts_ms: int, seed: int) -> None:
    fleet = Fleet(size=DEVICES_MAX, seed=seed)
    reading = DECODER.telemetry(fleet.telemetry(number, seq=5, ts_ms=ts_ms), received_ms=ts_ms, unique_keys=True)
    assert (reading.seq, reading.ts_us) == (5, ts_ms * 1000)
    assert DECODER.heartbeat(fleet.heartbeat(seq=6, ts_ms=ts_ms), received_ms=ts_ms) == ts_ms * 1000
    assert is_id(fleet.device_id(number))


def test_ids_are_distinct_and_the_same_whatever_seed_and_size() -> None:
    ids = FLEET.device_ids()
    assert len(set(ids)) == 100
    assert Fleet(size=3, seed=9).device_ids() == ids[:3]


def test_the_fleet_says_numbers_truths_and_words() -> None:
    said = {type(value) for number in range(len(KINDS)) for value in metrics(number).values()}
    assert said >= {int, float, bool, str}


def test_the_same_seed_says_the_same_and_another_something_else() -> None:
    assert metrics(0) == metrics(0, fleet=Fleet(size=1, seed=1))
    assert metrics(0) != metrics(0, fleet=Fleet(size=1, seed=2))
    assert metrics(0) != metrics(2), "two thermostats are not one"


def test_a_temperature_drifts_and_does_not_jump() -> None:
    minutes = [float(metrics(0, NOON_MS + minute * 60_000)["temperature"]) for minute in range(120)]
    steps = [abs(after - before) for before, after in itertools.pairwise(minutes)]
    assert max(steps) < 0.5
    assert max(minutes) - min(minutes) > 0.3


def test_energy_only_grows_and_power_follows_the_day() -> None:
    meter = next(number for number in range(len(KINDS)) if kind_of(number) == "meter")
    hours = [metrics(meter, NOON_MS + hour * 3_600_000) for hour in range(24)]
    energy = [float(hour["energy_kwh"]) for hour in hours]
    assert energy == sorted(energy)
    assert energy[0] < energy[-1]
    assert float(hours[0]["power_w"]) > float(hours[12]["power_w"]), "noon against midnight"


def test_chance_picks_about_the_fraction_that_was_asked_for() -> None:
    picked = sum(FLEET.chosen(message, fraction=0.25, purpose=1) for message in range(10_000))
    assert 2_300 < picked < 2_700
    assert not any(FLEET.chosen(message, fraction=0.0, purpose=1) for message in range(1000))
    assert all(FLEET.chosen(message, fraction=1.0, purpose=1) for message in range(1000))


@given(st.lists(st.floats(1e-4, 100), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_right_to_two_percent(seconds: list[float], fraction: float) -> None:
    latencies = Latencies()
    for each in seconds:
        latencies.record(each)
    exact = sorted(seconds)[math.ceil(len(seconds) * fraction) - 1]
    assert exact / LATENCY_GROWTH <= latencies.quantile_s(fraction) <= exact * LATENCY_GROWTH
    assert latencies.quantile_s(1.0) == latencies.max_s == max(seconds)


def test_no_latency_has_no_quantile() -> None:
    assert Latencies().quantile_s(0.99) == 0.0


def tally(*outcomes: Outcome, devices: int = 2) -> Tally:
    made = Tally(devices=devices, count=len(outcomes))
    made.sent = len(outcomes)
    for message, outcome in enumerate(outcomes):
        made.settle(message, outcome)
    return made


ACCEPTED, REFUSED, HEARTBEAT, UNCONFIRMED = Outcome.ACCEPTED, Outcome.REFUSED, Outcome.HEARTBEAT, Outcome.UNCONFIRMED
"""Messages 0 1 2 3 … are those of devices 0 1 0 1 …, with the numbers 0 0 1 1 …"""


def stored(rows: int, *seqs: int) -> StoredRows:
    return StoredRows(rows, PositionSet.of(seqs))


def test_all_that_was_accepted_is_expected_and_nothing_else() -> None:
    books = tally(ACCEPTED, REFUSED, ACCEPTED, HEARTBEAT, UNCONFIRMED, ACCEPTED)
    assert books.accepted_of(0, seq_base=100) == PositionSet.of([100, 101])
    assert books.accepted_of(1, seq_base=100) == PositionSet.of([102])


def test_stored_once_each_is_what_was_accepted() -> None:
    books = tally(ACCEPTED, ACCEPTED, ACCEPTED)
    found = compare(books, {0: stored(2, 10, 11), 1: stored(1, 10)}, seq_base=10)
    assert found == Storage(accepted=3, stored=3, missing=0, unexpected=0, duplicates=0)


def test_a_second_row_does_not_make_up_for_a_missing_one() -> None:
    """The counts alone would be equal: 2 accepted, 2 rows."""
    found = compare(tally(ACCEPTED, REFUSED, ACCEPTED), {0: stored(2, 10)}, seq_base=10)
    assert found == Storage(accepted=2, stored=1, missing=1, unexpected=0, duplicates=1)


def test_a_row_of_an_unconfirmed_message_does_not_make_up_for_a_missing_one() -> None:
    found = compare(tally(ACCEPTED, REFUSED, UNCONFIRMED), {0: stored(1, 11)}, seq_base=10)
    assert (found.missing, found.unexpected) == (1, 1)


def test_a_copy_that_failed_leaves_the_message_accepted() -> None:
    books = tally(UNCONFIRMED)
    books.settle(0, ACCEPTED)
    books.settle(0, UNCONFIRMED)
    assert books.by_outcome == [0, 0, 1, 0, 0]


GOOD = Storage(accepted=1, stored=1, missing=0, unexpected=0, duplicates=0)


def added(accepted: int = 1, *, expired: int = 0, balanced: bool = True) -> AuditTotals:
    return AuditTotals(accepted=accepted, stored=accepted, dead=0, in_flight=0, expired=expired, balanced=balanced)


def storage(**changes: int) -> Storage:
    return Storage(**({"accepted": 1, "stored": 1, "missing": 0, "unexpected": 0, "duplicates": 0} | changes))


@pytest.mark.parametrize(
    ("books", "found", "audit", "fault"),
    [
        (tally(ACCEPTED), GOOD, added(), ""),
        (tally(ACCEPTED), GOOD, added(1000), ""),
        (tally(ACCEPTED), storage(missing=1), added(), "not stored"),
        (tally(ACCEPTED), storage(duplicates=1), added(), "more than once"),
        (tally(ACCEPTED, REFUSED), storage(unexpected=1), added(2), "refused"),
        (tally(ACCEPTED, UNCONFIRMED), storage(unexpected=1), added(2), ""),
        (tally(ACCEPTED), GOOD, added(expired=1), "expired"),
        (tally(ACCEPTED), GOOD, added(balanced=False), "the audit disagrees"),
        (tally(ACCEPTED, HEARTBEAT), GOOD, added(1), "the sender was told 2"),
        (tally(REFUSED), storage(accepted=0, stored=0), added(0), "nothing was accepted"),
    ],
)
def test_the_verdict(books: Tally, found: Storage, audit: AuditTotals, fault: str) -> None:
    said = fault_of(books, found, audit)
    assert (fault in said) if fault else said == ""


class Gateway:
    """A client whose gateway answers 202 at once, or as told, and remembers what it was sent."""

    def __init__(self, answer: Callable[[Message], Answer] = lambda _: Answer(202)) -> None:
        self.messages: list[Message] = []
        self._answer = answer

    async def send(self, message: Message) -> Answer:
        self.messages.append(message)
        await asyncio.sleep(0)
        return self._answer(message)


class Stored:
    async def is_stored(self, device_id: str, **reading: object) -> bool:
        return True


async def send(gateway: Gateway, *, stop: bool = False, **changes: float) -> Load:
    plan = Plan(
        fleet=Fleet(size=5, seed=1),
        rate=1e6,
        count=200,
        connections=8,
        heartbeats=changes.get("heartbeats", 0.0),
        duplicates=changes.get("duplicates", 0.0),
        seq_base=1000,
    )
    asked = asyncio.Event()
    if stop:
        asked.set()
    load = Load(client=gateway, plan=plan, tokens=[f"token-{n}" for n in range(5)], stop=asked)
    await load.run(cast(RunReader, Stored()))
    return load


async def test_every_device_sends_the_same_number_of_messages_in_sequence_with_its_token() -> None:
    gateway = Gateway()
    load = await send(gateway)
    assert load.tally.by_outcome[ACCEPTED] == load.tally.sent == 200
    for number, device_id in enumerate(Fleet(size=5, seed=1).device_ids()):
        mine = [message for message in gateway.messages if message.device_id == device_id]
        assert sorted(int(message.key) for message in mine) == list(range(1000, 1040))
        assert {message.token for message in mine} == {f"token-{number}"}


async def test_a_message_that_is_sent_twice_has_the_same_bytes_and_key() -> None:
    gateway = Gateway()
    load = await send(gateway, duplicates=0.5)
    copies = [(message.device_id, message.key, message.body) for message in gateway.messages]
    assert len(copies) == 200 + load.tally.sent_twice
    assert len(set(copies)) == 200
    assert 60 < load.tally.sent_twice < 140


async def test_heartbeats_are_expected_to_make_no_row() -> None:
    load = await send(Gateway(), heartbeats=1.0)
    assert load.tally.by_outcome[HEARTBEAT] == 200
    assert not load.tally.accepted_of(0, seq_base=1000)


async def test_what_is_refused_is_not_expected() -> None:
    load = await send(Gateway(lambda message: Answer(422 if int(message.key) % 2 else 202)))
    assert load.tally.by_outcome[REFUSED] == load.tally.by_outcome[ACCEPTED] == 100
    assert load.tally.answers == {"202": 100, "422": 100}


async def test_nothing_is_sent_once_it_is_stopped() -> None:
    gateway = Gateway()
    load = await send(gateway, stop=True)
    assert gateway.messages == []
    assert load.tally.sent == 0


class Auditor:
    """Says one audit after the other, the last one for ever."""

    def __init__(self, *accepted: int) -> None:
        self.left = list(accepted)

    async def audit(self, stream: str) -> list[StreamAudit]:
        accepted = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return [StreamAudit(stream=stream, epoch=1, accepted=accepted, stored=accepted, dead=0, in_flight=0, expired=0)]


async def test_what_a_broker_has_confirmed_is_waited_for_until_it_is_in_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until then the audit is balanced, and knows nothing of it."""
    monkeypatch.setattr(simulate_drain, "POLL_S", 0.0)

    async def never() -> bool:
        return False

    async def ten(totals: AuditTotals) -> bool:
        return totals.accepted >= 10

    assert (await drain(Auditor(0, 0, 4, 10), all_stored=never)).accepted == 0
    assert (await drain(Auditor(0, 0, 4, 10), all_stored=never, all_arrived=ten)).accepted == 10


async def test_what_never_arrives_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_drain, "POLL_S", 0.0)
    monkeypatch.setattr(simulate_drain, "STALL_S_MAX", 0.01)

    async def no(*_: object) -> bool:
        return False

    assert (await drain(Auditor(4), all_stored=no, all_arrived=no)).accepted == 4
