"""What a message of COMMANDS says, and what that makes of a command."""

from __future__ import annotations

import msgspec
import pytest

from pulse.domain.command import (
    DEVICE,
    PULSE,
    Command,
    Event,
    State,
    Word,
    downward,
    ended_by_time,
    made_id,
    moved,
    storable_json,
    told_all,
)
from pulse.domain.command_words import Said, condemn, read_said
from pulse.domain.envelope import wrap
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.settlement import DeadLetter, Message
from pulse.domain.subjects import MessageType, subject_for

COMMAND = Command(
    tenant_id="acme",
    command_id="c1",
    device_id="d1",
    name="reboot",
    payload=b'{"delay":3}',
    state=State.QUEUED,
    ordered=False,
    held=False,
    created_ms=1000,
    expires_ms=5000,
    timeout_ms=300,
    due_ms=5000,
    sent_ms=None,
    sends=0,
    result=None,
    error=None,
    created_by="key",
    fleet_id=None,
)


def message(payload: bytes, kind: MessageType = MessageType.COMMANDS_ACK, subject: str = "") -> Message:
    body = wrap(tenant_id="acme", device_id="d1", message_type=kind, received_ms=2000, source="mqtt", payload=payload)
    return Message(subject or subject_for(kind, "acme"), body, b"", "", 1, 0, 1)


def test_an_answer_is_a_word_of_the_device_as_of_when_the_edge_received_it() -> None:
    said = read_said(7, message(b'{"commandId":"c1","state":"failed","error":"jammed","result":{"a": 1}}'))
    assert isinstance(said, Said)
    assert (said.position, said.tenant_id, said.device_id, said.command_id) == (7, "acme", "d1", "c1")
    assert said.word == Word(Event.FAIL, 2000, DEVICE, b'{"a":1}', "jammed")


def test_that_a_command_has_left_is_our_own_word() -> None:
    said = read_said(7, message(b'{"commandId":"c1"}', MessageType.COMMANDS_SENT))
    assert isinstance(said, Said)
    assert said.word == Word(Event.SEND, 2000, PULSE)


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (message(b"{}"), Reason.INVALID_PAYLOAD),
        (message(b'{"commandId":"c1","state":"sent"}'), Reason.INVALID_PAYLOAD),
        (message(b'{"commandId":"c1","state":"failed"}', MessageType.COMMANDS_SENT), Reason.INVALID_PAYLOAD),
        (message(b'{"commandId":"c1","state":"failed"}', subject="commands.other"), Reason.INVALID_ENVELOPE),
        (message(b"{}", MessageType.SHADOW), Reason.INVALID_ENVELOPE),
        (Message("commands.acme", b'{"test":1}', b"", "", 1, 0, 1), Reason.INVALID_ENVELOPE),
    ],
)
def test_what_says_nothing_of_a_command_is_a_dead_letter(read: Message, reason: Reason) -> None:
    letter = read_said(7, read)
    assert isinstance(letter, DeadLetter)
    assert (letter.position, letter.reason, letter.message) == (7, reason, read)
    assert condemn(7, read, Refusal(Reason.REFUSED_BY_DATABASE, "no")) == letter


def test_what_the_database_refuses_is_a_dead_letter_of_its_device() -> None:
    letter = condemn(7, message(b'{"commandId":"c1","state":"failed"}'), Refusal(Reason.REFUSED_BY_DATABASE, "no"))
    assert (letter.reason, letter.device_id) == (Reason.REFUSED_BY_DATABASE, "d1")


def test_the_time_to_answer_begins_with_the_acknowledgement() -> None:
    heard = moved(COMMAND, Word(Event.ACKNOWLEDGE, 4000, DEVICE))
    assert heard is not None
    assert (heard.state, heard.due_ms) == (State.ACKNOWLEDGED, 4300)
    assert (ended_by_time(COMMAND), ended_by_time(heard)) == (Event.EXPIRE, Event.TIME_OUT)
    assert moved(heard, Word(Event.ACKNOWLEDGE, 4100, DEVICE)) is None


def test_what_a_device_said_on_its_way_is_kept_when_it_never_ends() -> None:
    heard = moved(COMMAND, Word(Event.ACKNOWLEDGE, 4000, DEVICE, b"50", "slow"))
    assert heard is not None
    late = moved(heard, Word(Event.TIME_OUT, 4300, PULSE))
    assert late is not None
    assert (late.state, late.due_ms, late.result, late.error) == (State.TIMED_OUT, None, b"50", "slow")


def test_sends_are_counted_and_the_last_one_is_remembered_in_whatever_order_they_are_told() -> None:
    command = COMMAND
    for at_ms in (2000, 4000, 3000):
        sent = moved(command, Word(Event.SEND, at_ms, PULSE))
        assert sent is not None
        command = sent
    assert (command.state, command.sent_ms, command.sends, command.due_ms) == (State.SENT, 4000, 3, 5000)


def test_a_device_hears_its_command_with_its_times() -> None:
    said = downward(COMMAND)
    assert said.full_topic == "tenant/acme/device/d1/commands"
    assert msgspec.json.decode(said.body) == {
        "commandId": "c1", "name": "reboot", "payload": {"delay": 3}, "issuedAt": 1000, "expiresAt": 5000,
    }  # fmt: skip


def test_who_asks_hears_as_many_as_fit_and_one_at_least() -> None:
    one = len(told_all([COMMAND], bytes_max=0))
    told = {bytes_max: msgspec.json.decode(told_all([COMMAND] * 5, bytes_max=bytes_max)) for bytes_max in (3 * one, 1)}
    assert [len(each["commands"]) for each in told.values()] == [3, 1]
    assert told_all([], bytes_max=0) == b'{"commands":[]}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", Reason.INVALID_JSON),
        (b'{"a":"\\u0000"}', Reason.INVALID_PAYLOAD),
        (b'{"\\u0000":1}', Reason.INVALID_PAYLOAD),
        (b"1" + b"0" * 40, Reason.INVALID_PAYLOAD),
        (b"[" * 33 + b"]" * 33, Reason.TOO_LARGE),
        (b"[" * 5000 + b"]" * 5000, Reason.INVALID_JSON),
    ],
)
def test_a_payload_that_cannot_be_stored_is_refused_by_its_name(text: bytes, reason: Reason) -> None:
    with pytest.raises(Refusal) as raised:
        storable_json(text, field="payload")
    assert raised.value.reason is reason
    assert raised.value.field.startswith("payload")


def test_a_payload_is_measured_as_it_is_sent() -> None:
    assert storable_json(b'{ "a" : [ 1 , 2 ] }', field="payload", bytes_max=11) == b'{"a":[1,2]}'
    with pytest.raises(LimitExceeded) as raised:
        storable_json(b'{"a":[1,2]}', field="payload", bytes_max=10)
    assert (raised.value.limit, raised.value.value) == ("command_payload_bytes_max", 10)


def test_ids_sort_by_the_time_they_were_made() -> None:
    ids = [made_id(at_ms, bytes([255 - at_ms % 7] * 10)) for at_ms in (0, 1, 1_790_000_000_000, 1_790_000_000_001)]
    assert ids == sorted(ids)
    assert {len(each) for each in ids} == {32}
