"""Reading messages in one pass decides exactly what reading them step by step decides."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain import settlement
from pulse.domain.device_state import Device, DeviceState, Words, state_of
from pulse.domain.ledger import PositionSet, position, positions
from pulse.domain.settlement import Fate, Message, Row, Settlement, SignOfLife, settle
from pulse.domain.telemetry import Bounds, PayloadDecoder

NOW_MS = 1_790_000_000_000
DECODER = PayloadDecoder(
    Bounds(
        metric_count_max=3,
        metric_name_length_max=9,
        metric_string_length_max=9,
        ts_past_s_max=100,
        ts_future_s_max=100,
    )
)


def step_by_step(messages: list[tuple[int, Message]], monkeypatch: pytest.MonkeyPatch) -> Settlement:
    def nothing_is_usual(given: Iterable[tuple[int, Message]], *_: object) -> list[tuple[int, Message]]:
        return list(given)

    with monkeypatch.context() as patched:
        patched.setattr(settlement, "_read_usual", nothing_is_usual)
        return settle(messages, DECODER)


def states(settled: Settlement) -> dict[Device, DeviceState]:
    return {device: state_of(words) for device, words in settled.words.of_each().items()}


def by_position(fates: Iterable[Fate]) -> list[Fate]:
    return sorted(fates, key=lambda fate: fate.position)


NAMES = ["a", "temp", "a\0", "", "far too long a name", "é", "a\\", '"', "\ud800"]
NUMBERS = [0, -1.5, 1e308, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, float("nan"), float("inf")]
TEXTS = ["on", "\0", "\\u0000", "far too long a text", "\ud800", "\n\t\x01", "', ('", "\\N"]
VALUES = [*NUMBERS, *TEXTS, True, None, [1], {"deeper": 1}]
TIMES: list[object] = [
    "2026-09-21T14:13:20Z",
    "2026-09-21T14:13:20",
    "yesterday",
    "1970-01-01T00:00:00Z",
    None,
    True,
    0,
    NOW_MS,
]
TIMES += [NOW_MS - 100_001, NOW_MS + 100_001, NOW_MS / 1000 - 99.5, NOW_MS / 1000 + 0.000001]

metrics = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), max_size=4)
telemetry = st.fixed_dictionaries(
    {"metrics": st.one_of(st.just({"a": 1.5}), metrics)},
    optional={
        "ts": st.sampled_from(TIMES),
        "seq": st.sampled_from([0, 7, 7, 7, -1, 2**63 - 1, 2**63, 1.5, "1", None]),
        "site_id": st.sampled_from(["roof", "roof", "", "\0", "s" * 65, 5, None, "\\u0000", "é"]),
    },
)
heartbeat = st.fixed_dictionaries({}, optional={"ts": st.sampled_from(TIMES), "seq": st.sampled_from([0, -1])})
USUAL: dict[str, object] = {
    "v": 1,
    "tenant_id": "t",
    "device_id": "d",
    "msg_type": "telemetry",
    "ts": NOW_MS,
    "source": "http",
}
UNUSUAL: dict[str, list[object]] = {
    "v": [2, "1", None],
    "tenant_id": ["d", "bad id", "", "t" * 65, "a.b", "t\n", "é"],
    "device_id": ["e", "e", "bad id", "", "d" * 65, "a.b", "d\n", "é", 5],
    "msg_type": ["heartbeat", "heartbeat", "heartbeat", "other", None],
    "ts": [NOW_MS + 5, NOW_MS - 5, 0, -1, 1.5, 253_402_300_800_000],
    "source": ["mqtt", "pigeon"],
}


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Envelopes with one or two things the matter with them, or none: in a value, in their keys, in their spelling."""
    fields = {**USUAL}
    for key in draw(st.lists(st.sampled_from([*UNUSUAL]), max_size=2)):
        fields[key] = draw(st.sampled_from(UNUSUAL[key]))
    fields["payload"] = draw(heartbeat if fields["msg_type"] == "heartbeat" else telemetry)
    pairs = [*fields.items()]
    match draw(st.integers(0, 9)):
        case 0:
            pairs = draw(st.permutations(pairs))
        case 1:
            pairs.append(draw(st.sampled_from([*pairs, ("msg_type", "heartbeat"), ("tenant_id", "d"), ("more", 1)])))
        case 2:
            pairs.insert(0, draw(st.sampled_from([*pairs, ("msg_type", "heartbeat"), ("payload", 5)])))
        case 3:
            pairs.pop(draw(st.integers(0, len(pairs) - 1)))
    as_ascii = draw(st.booleans())
    text = ",".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=as_ascii)}" for key, value in pairs)
    body = f"{{{text}}}".encode("utf-8", "surrogatepass")
    match draw(st.integers(0, 19)):
        case 0:
            return b" " + body + b"\n"
        case 1:
            return draw(st.sampled_from([body[:-1], body + body, b"[" + body + b"]", b"", b"\xff", b"[" * 100_000]))
    return body


messages = st.builds(
    Message,
    st.sampled_from([*["telemetry.t"] * 7, "telemetry.d", "telemetry.a.b", "telemetry."]),
    bodies(),
    st.just(b""),
    st.just("reply"),
    st.just(1),
    st.just(0),
    st.just(1),
)


@given(st.lists(messages, max_size=12))
def test_in_bulk_and_step_by_step_every_message_has_the_same_fate(sent: list[Message]) -> None:
    positioned = list(enumerate(sent, start=1))
    with pytest.MonkeyPatch.context() as monkeypatch:
        expected = step_by_step(positioned, monkeypatch)
    result = settle(positioned, DECODER)
    for got, wanted in zip(result.parts, expected.parts, strict=True):
        assert by_position(got) == by_position(wanted)
    assert states(result) == states(expected)
    assert result.positions == PositionSet.of(range(1, len(sent) + 1))


def test_what_is_usual_is_read_in_one_pass() -> None:
    """Guards the one above: with nothing read in bulk it would compare a thing with itself."""
    usual = [
        b'{"v":1,"tenant_id":"t","device_id":"d","msg_type":"telemetry","ts":5,"source":"http","payload":%b}' % payload
        for payload in (b'{"metrics":{"a":1}}', b'{"metrics":{"a":"\\u00e9"},"seq":1,"site_id":"roof","ts":0.005}')
    ]
    usual.append(b'{"v":1,"tenant_id":"t","device_id":"d","msg_type":"heartbeat","ts":9,"source":"mqtt","payload":{}}')
    sent = [Message("telemetry.t", body, b"", "reply", at, 0, 1) for at, body in enumerate(usual)]
    rows: list[Row] = []
    signs: list[SignOfLife] = []
    words = Words({}, [])
    assert settlement._read_usual(list(enumerate(sent, start=1)), DECODER, rows, signs, words) == []
    assert (len(rows), len(signs)) == (2, 1)
    assert sorted(word.position for word in words.of_each()["t", "d"]) == [2, 3]


def test_metrics_that_spell_out_an_escape_are_no_escape() -> None:
    body = rb'{"v":1,"tenant_id":"t","device_id":"d","msg_type":"telemetry","ts":5,"source":"http","payload":%b}'
    sent = Message("telemetry.t", body % rb'{"metrics":{"a":"\\u0000"}}', b"", "reply", 1, 0, 1)
    (row,) = settle([(1, sent)], DECODER).rows
    assert row.metrics == rb'{"a":"\\u0000"}'


@given(st.integers(1, 100), st.lists(st.integers(1, 2**46 - 1), min_size=1))
def test_the_positions_of_many_sequences_are_those_of_each(epoch: int, sequences: list[int]) -> None:
    assert positions(epoch, sequences) == [position(epoch, sequence) for sequence in sequences]


@pytest.mark.parametrize("sequences", [[0, 1], [1, 2**46]])
def test_one_sequence_out_of_bounds_among_many_is_a_bug(sequences: list[int]) -> None:
    with pytest.raises(AssertionError):
        positions(1, sequences)


@given(st.lists(st.integers(0, 40)))
def test_a_set_made_of_a_run_is_that_of_its_members(members: list[int]) -> None:
    made = PositionSet.of(members)
    assert [at for at in range(42) if at in made] == sorted(set(members))
    assert made == PositionSet([(at, at + 1) for at in members])
