"""Each message has one fate, and no message decides another's."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.device_state import DeviceState, Value, state_of
from pulse.domain.errors import Reason, Refusal
from pulse.domain.ledger import PositionSet
from pulse.domain.settlement import Message, condemn, settle
from pulse.domain.telemetry import Bounds, PayloadDecoder

DECODER = PayloadDecoder(
    Bounds(
        metric_count_max=5,
        metric_name_length_max=9,
        metric_string_length_max=9,
        ts_past_s_max=100,
        ts_future_s_max=100,
    )
)


def message(sequence: int, body: bytes, subject: str = "telemetry.t") -> Message:
    return Message(subject, body, b"", "reply", sequence, 0, 1)


def envelope(device_id: str = "d", msg_type: str = "telemetry", ts: int = 1000, payload: object = None) -> bytes:
    whole = {"v": 1, "tenant_id": "t", "device_id": device_id, "msg_type": msg_type, "ts": ts, "source": "http"}
    if payload is None:
        payload = {} if msg_type == "heartbeat" else {"metrics": {"n": 1}}
    return msgspec.json.encode({**whole, "payload": payload})


bodies = st.one_of(
    st.binary(max_size=30),
    st.builds(envelope, st.sampled_from(["d", "e", "bad id"]), st.sampled_from(["telemetry", "heartbeat", "x"])),
    st.builds(envelope, payload=st.sampled_from([{}, {"metrics": {}}, {"metrics": {"n": "ok"}}, 5, []])),
)


@given(st.lists(bodies, max_size=20))
def test_every_position_is_settled_exactly_once(sent: list[bytes]) -> None:
    result = settle([(at, message(at, body)) for at, body in enumerate(sent, start=1)], DECODER)
    assert len(result) == len(sent)
    assert result.positions == PositionSet.of(range(1, len(sent) + 1))


@given(st.lists(bodies, max_size=10), st.sets(st.integers(1, 10)))
def test_what_others_have_settled_is_left_out(sent: list[bytes], settled: set[int]) -> None:
    result = settle([(at, message(at, body)) for at, body in enumerate(sent, start=1)], DECODER)
    left = result.without(PositionSet.of(settled))
    assert left.positions == result.positions - PositionSet.of(settled)
    assert left.dead_positions == result.dead_positions - PositionSet.of(settled)


def test_a_bad_message_becomes_a_dead_letter_and_its_neighbours_rows() -> None:
    bodies = [envelope(), b'{"test":1}', envelope(payload={"metrics": {"n": None}}), envelope(msg_type="heartbeat")]
    result = settle([(at, message(at, body)) for at, body in enumerate(bodies, start=1)], DECODER)
    assert [row.position for row in result.rows] == [1]
    assert [sign.position for sign in result.signs_of_life] == [4]
    assert [(letter.position, letter.reason) for letter in result.dead_letters] == [
        (2, Reason.INVALID_ENVELOPE),
        (3, Reason.INVALID_PAYLOAD),
    ]
    assert result.dead_letters[0].tenant_id is None
    assert (result.dead_letters[1].tenant_id, result.dead_letters[1].device_id) == ("t", "d")
    assert result.dead_letters[1].error.startswith("metrics.n: ")


def test_the_words_of_a_batch_say_what_all_its_messages_say() -> None:
    bodies = [envelope(ts=2000), envelope(ts=5000, msg_type="heartbeat"), envelope(ts=3000), envelope("e", ts=1000)]
    result = settle([(at, message(at, body)) for at, body in enumerate(bodies, start=1)], DECODER)
    assert {device: state_of(words) for device, words in result.words.of_each().items()} == {
        ("t", "d"): DeviceState(5_000_000, {"n": Value(1, 3_000_000, 3)}),
        ("t", "e"): DeviceState(1_000_000, {"n": Value(1, 1_000_000, 4)}),
    }


def test_metrics_are_stored_as_they_were_said() -> None:
    said = {"on": True, "n": 9007199254740993, "x": 0.1, "s": 'é"\\'}
    result = settle([(1, message(1, envelope(payload={"metrics": said})))], DECODER)
    assert msgspec.json.decode(result.rows[0].metrics) == said


def test_a_condemned_message_keeps_its_device_where_it_can_be_read() -> None:
    refusal = Refusal(Reason.REFUSED_BY_DATABASE, "no")
    assert condemn(1, message(1, envelope()), refusal).dead_letters[0].device_id == "d"
    assert condemn(1, message(1, b"?"), refusal).dead_letters[0].device_id is None
