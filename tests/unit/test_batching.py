"""The lane and the judge against a model of a stream that loses answers and repeats ids; no NATS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse.domain.batching import Ack, AckError, Lane, Limits, Remembered, Request, Verdict, judge, sequences

DUPLICATE = AckError(code=400, err_code=10201, description="atomic publish batch contains duplicate message id")
DISABLED = AckError(code=400, err_code=10174, description="atomic publish is disabled")
BUSY = AckError(code=429, err_code=10210, description="atomic publish too many inflight")


@dataclass(eq=False)
class Note:
    """A message of this test; `number` is its place among all that were added."""

    number: int
    message_id: bytes
    size: int = 1
    settled: bool = False


@dataclass
class Stream:
    """What nats-server does with a request: all or nothing, and no id twice."""

    atomic: bool = True
    stored: list[bytes] = field(default_factory=list)

    def store(self, request: Request[Note]) -> Ack:
        ids = [note.message_id for note in request.messages]
        if len(ids) == 1:
            if ids[0] in self.stored:
                return Ack(stream="S", seq=self.stored.index(ids[0]) + 1, duplicate=True)
            self.stored += ids
            return Ack(stream="S", seq=len(self.stored))
        if not self.atomic:
            return Ack(error=DISABLED)
        if set(ids) & set(self.stored):
            return Ack(error=DUPLICATE)
        self.stored += ids
        return Ack(stream="S", seq=len(self.stored), count=len(ids))


def make_lane(**limits: int) -> Lane[Note]:
    return Lane(Limits(**({"batch_min": 1, "alone_in_flight_max": 1000} | limits)))


def notes(count: int, *, size: int = 1) -> list[Note]:
    return [Note(number, b"%d" % number, size) for number in range(count)]


def take_all(lane: Lane[Note]) -> list[Request[Note]]:
    requests = []
    while (request := lane.take()) is not None:
        requests.append(request)
    return requests


def execute(lane: Lane[Note], request: Request[Note], ack: Ack) -> dict[bytes, int]:
    """Do what the committer does with an answer; returns the sequence that each caller is told."""
    lane.free(request)
    match judge(ack, len(request.messages)):
        case Verdict.STORED:
            told = {}
            for note, seq in zip(request.messages, sequences(ack, len(request.messages)), strict=True):
                lane.settle(note, stored=True)
                told[note.message_id] = seq
            return told
        case Verdict.DIVIDE:
            lane.divide(request)
        case Verdict.ONE_BY_ONE:
            lane.atomic = False
            lane.divide(request, one_by_one=True)
        case Verdict.LATER:
            lane.resend(request)
        case Verdict.FULL | Verdict.TOO_LARGE | Verdict.REFUSED:
            pytest.fail("the model refuses nothing for good")
        case unknown:
            assert_never(unknown)
    return {}


@settings(deadline=None)
@given(
    data=st.data(),
    limits=st.fixed_dictionaries(
        {
            "batch_min": st.integers(1, 3),
            "batch_max": st.integers(3, 12),
            "batch_bytes_max": st.integers(1, 60),
            "batches_in_flight_max": st.integers(1, 3),
            "alone_in_flight_max": st.integers(1, 5),
            "remembered_max": st.integers(0, 10),
        }
    ),
    stored_before=st.sets(st.integers(0, 40)),
    atomic=st.booleans(),
)
def test_every_message_is_answered_once_with_its_own_sequence_within_all_bounds(
    data: st.DataObject, limits: dict[str, int], stored_before: set[int], atomic: bool
) -> None:
    """Whatever is added, answered, refused or lost, in whatever order."""
    lane = make_lane(**limits)
    stream = Stream(atomic=atomic, stored=[b"%d" % number for number in sorted(stored_before)])
    in_flight: list[Request[Note]] = []
    told: dict[bytes, int] = {}
    added = 0

    def send() -> None:
        for request in take_all(lane):
            in_flight.append(request)
            numbers = [note.number for note in request.messages]
            assert numbers == sorted(set(numbers)), "order within a request"
            assert len(numbers) <= limits["batch_max"]
            assert len(numbers) == 1 or sum(note.size for note in request.messages) <= limits["batch_bytes_max"]
        ids = [note.message_id for request in in_flight for note in request.messages]
        assert len(ids) == len(set(ids)), "an id is in one request at a time"
        assert sum(not request.alone for request in in_flight) <= limits["batches_in_flight_max"]
        assert sum(request.alone for request in in_flight) <= limits["alone_in_flight_max"]

    def answer(request: Request[Note], fate: str) -> None:
        in_flight.remove(request)
        ack = Ack(error=BUSY) if fate == "busy" else stream.store(request)
        if fate == "lost":
            lane.free(request)
            lane.resend(request)
            return
        answers = execute(lane, request, ack)
        assert not told.keys() & answers.keys(), "nobody is answered twice"
        told.update(answers)

    for _ in range(data.draw(st.integers(0, 10))):
        for size in data.draw(st.lists(st.integers(1, 20), max_size=15)):
            assert lane.add(Note(added, b"%d" % added, size)) is None
            added += 1
        send()
        if in_flight:
            answer(data.draw(st.sampled_from(in_flight)), data.draw(st.sampled_from(["stored", "lost", "busy"])))
            send()
    while in_flight:
        answer(in_flight[0], "stored")
        send()

    assert told.keys() == {b"%d" % number for number in range(added)}
    assert len(stream.stored) == len(set(stream.stored))
    for message_id, seq in told.items():
        assert stream.stored[seq - 1] == message_id
    assert not lane.unsettled


def test_an_id_that_is_pending_is_handed_back_and_free_again_once_settled() -> None:
    lane = make_lane()
    first, second, third = Note(0, b"same"), Note(1, b"same"), Note(2, b"same")
    assert lane.add(first) is None
    assert lane.add(second) is first
    [request] = take_all(lane)
    assert lane.add(second) is first
    assert request.messages == [first]
    lane.free(request)
    lane.settle(first, stored=False)
    assert lane.add(third) is None
    assert [request.messages for request in take_all(lane)] == [[third]]


def test_what_comes_in_while_a_batch_is_on_its_way_gathers_until_that_is_answered() -> None:
    lane = make_lane(batch_max=100)
    first, second = notes(20)[:10], notes(20)[10:]
    for note in first:
        lane.add(note)
    [request] = take_all(lane)
    for note in second:
        lane.add(note)
    assert take_all(lane) == []
    lane.free(request)
    assert [request.messages for request in take_all(lane)] == [second]


def test_full_batches_do_not_wait_for_each_other_up_to_their_bound() -> None:
    lane = make_lane(batch_max=10, batches_in_flight_max=3)
    for note in notes(55):
        lane.add(note)
    requests = take_all(lane)
    assert [len(request.messages) for request in requests] == [10, 10, 10]
    lane.free(requests[0])
    assert [len(request.messages) for request in take_all(lane)] == [10]


def test_a_batch_is_full_by_its_bytes_too() -> None:
    lane = make_lane(batch_bytes_max=100)
    for note in notes(30, size=10):
        lane.add(note)
    assert [len(request.messages) for request in take_all(lane)] == [10, 10, 10]


def test_a_message_larger_than_a_batch_goes_alone() -> None:
    lane = make_lane(batch_bytes_max=100)
    for number, size in enumerate([10, 500, 10]):
        lane.add(Note(number, b"%d" % number, size))
    assert [len(request.messages) for request in take_all(lane)] == [1, 1]


def test_a_few_messages_go_as_plain_publishes_at_once_and_more_gather() -> None:
    lane = make_lane(batch_min=4)
    for note in notes(3):
        lane.add(note)
    assert [(len(request.messages), request.alone) for request in take_all(lane)] == [(1, True)] * 3
    for note in notes(9)[3:]:
        lane.add(note)
    assert [(len(request.messages), request.alone) for request in take_all(lane)] == [(6, False)]


def test_few_that_wait_let_the_callers_of_a_batch_be_told_first_and_many_leave_before() -> None:
    lane = make_lane(early_min=3)
    first, *others = notes(7)
    lane.add(first)
    (plain,) = take_all(lane)
    for note in others[:3]:
        lane.add(note)
    lane.free(plain)
    (batch,) = take_all(lane)
    assert len(batch.messages) == 3
    for note, early in zip(others[3:], (False, False, True), strict=True):
        lane.add(note)
        assert lane.leaves_early(batch) is early
    assert make_lane(early_min=3).leaves_early(plain)


def test_an_id_that_was_seen_stored_goes_alone_and_does_not_refuse_a_batch() -> None:
    lane = make_lane()
    stream = Stream()
    for note in notes(30):
        lane.add(note)
    [request] = take_all(lane)
    execute(lane, request, stream.store(request))
    for number in range(20, 50):
        lane.add(Note(number, b"%d" % number))
    alone = take_all(lane)
    assert sorted(len(request.messages) for request in alone) == [1] * 10 + [20]
    for request in alone:
        execute(lane, request, stream.store(request))
    assert len(stream.stored) == 50


def test_repetitions_that_wait_for_a_slot_do_not_hold_up_the_others() -> None:
    lane = make_lane(alone_in_flight_max=2)
    stream = Stream()
    for note in notes(30):
        lane.add(note)
    [request] = take_all(lane)
    execute(lane, request, stream.store(request))
    for note in notes(60):
        lane.add(note)
    assert [len(request.messages) for request in take_all(lane)] == [1, 1, 30]


def test_an_id_whose_fate_is_unknown_is_not_taken_for_stored() -> None:
    """After an outage thousands come back; what was not stored is to travel in batches."""
    lane = make_lane()
    for note in notes(30):
        lane.add(note)
    [request] = take_all(lane)
    lane.free(request)
    for note in request.messages:
        lane.settle(note, stored=False)
    for note in notes(30):
        lane.add(note)
    assert [len(request.messages) for request in take_all(lane)] == [30]


@given(ids_max=st.integers(2, 20), ids=st.lists(st.binary(max_size=1), max_size=60))
def test_the_last_ids_are_remembered_within_the_bound(ids_max: int, ids: list[bytes]) -> None:
    remembered = Remembered(ids_max)
    for message_id in ids:
        remembered.add(message_id)
        assert message_id in remembered
    assert all(message_id in remembered for message_id in ids[-(ids_max // 2) :])
    assert sum(bytes([number]) in remembered for number in range(256)) <= ids_max


def test_a_refused_batch_is_divided_into_quarters_and_only_the_refused_quarter_further() -> None:
    """One message that the stream has already, among 1000."""
    lane = make_lane(batches_in_flight_max=1000)
    stream = Stream(stored=[b"567"])
    for note in notes(1000):
        lane.add(note)
    sent: list[int] = []
    told: dict[bytes, int] = {}
    while requests := take_all(lane):
        for request in requests:
            sent.append(len(request.messages))
            told |= execute(lane, request, stream.store(request))
    assert sent == [1000] + [250] * 4 + [63, 63, 63, 61] + [1] * 63
    assert told[b"567"] == 1
    assert len(told) == len(set(told.values())) == 1000


def test_a_batch_that_is_refused_after_an_answer_was_lost_goes_one_by_one() -> None:
    """It was stored as a whole, most likely, and a repeated message costs no sync."""
    lane = make_lane()
    stream = Stream()
    for note in notes(50):
        lane.add(note)
    [request] = take_all(lane)
    stream.store(request)
    lane.free(request)
    lane.resend(request)
    [request] = take_all(lane)
    execute(lane, request, stream.store(request))
    assert [len(request.messages) for request in take_all(lane)] == [1] * 50


def test_what_was_settled_meanwhile_is_not_sent_again() -> None:
    lane = make_lane()
    first, second = notes(2)
    for note in (first, second):
        lane.add(note)
    [request] = take_all(lane)
    lane.settle(first, stored=False)
    lane.free(request)
    lane.resend(request)
    assert [request.messages for request in take_all(lane)] == [[second]]


def test_a_stream_without_batches_is_served_message_by_message() -> None:
    lane = make_lane(alone_in_flight_max=7)
    lane.atomic = False
    for note in notes(20):
        lane.add(note)
    assert [len(request.messages) for request in take_all(lane)] == [1] * 7


@pytest.mark.parametrize(
    ("ack", "count", "verdict"),
    [
        (Ack(stream="S", seq=5), 1, Verdict.STORED),
        (Ack(stream="S", seq=5, duplicate=True), 1, Verdict.STORED),
        (Ack(stream="S", seq=5, count=3), 3, Verdict.STORED),
        (Ack(stream="S", seq=5), 3, Verdict.ONE_BY_ONE),
        (Ack(stream="S", seq=5, count=2), 3, Verdict.ONE_BY_ONE),
        (Ack(error=DISABLED), 3, Verdict.ONE_BY_ONE),
        (Ack(error=DUPLICATE), 3, Verdict.DIVIDE),
        (Ack(error=AckError(code=400, err_code=10176)), 3, Verdict.DIVIDE),
        (Ack(error=AckError(code=400, err_code=10199)), 3, Verdict.DIVIDE),
        (Ack(error=AckError(code=400, err_code=10054)), 3, Verdict.DIVIDE),
        (Ack(error=AckError(code=400, err_code=10054)), 1, Verdict.TOO_LARGE),
        (Ack(error=AckError(code=400, err_code=10109)), 1, Verdict.REFUSED),
        (Ack(error=AckError(code=409, err_code=10158)), 3, Verdict.LATER),
        (Ack(error=AckError(code=429, err_code=10167)), 1, Verdict.LATER),
        (Ack(error=BUSY), 3, Verdict.LATER),
        (Ack(error=AckError(code=503, err_code=10008)), 1, Verdict.LATER),
        (Ack(error=AckError(code=503, err_code=10077)), 1, Verdict.FULL),
        (Ack(error=AckError(code=503, err_code=10023)), 3, Verdict.FULL),
        (Ack(error=AckError(code=500, err_code=10047)), 3, Verdict.FULL),
    ],
)
def test_an_answer_means_one_thing(ack: Ack, count: int, verdict: Verdict) -> None:
    assert judge(ack, count) is verdict


def test_the_sequences_of_a_batch_end_with_the_one_in_its_ack() -> None:
    assert list(sequences(Ack(stream="S", seq=12, count=3), 3)) == [10, 11, 12]
    assert list(sequences(Ack(stream="S", seq=12), 1)) == [12]


@pytest.mark.parametrize("limits", [{"batch_max": 1001}, {"batch_min": 0}, {"batch_min": 9, "batch_max": 8}])
def test_bounds_that_the_server_would_refuse_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="batch_max"):
        Limits(**limits)
