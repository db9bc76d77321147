"""What `pulse tail` makes of a message."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.adapters.nats.follow import Message
from pulse.cli.tail_line import LINE_LENGTH_MAX, escaped, json_of, line_of, read
from pulse.domain.envelope import wrap
from pulse.domain.subjects import MessageType

RECEIVED_MS = 1_795_435_200_123


def message(data: bytes, subject: str = "telemetry.acme") -> Message:
    return Message(subject, data, None, 7, 0, RECEIVED_MS * 1_000_000)


def enveloped(payload: bytes, kind: MessageType = MessageType.TELEMETRY) -> Message:
    return message(
        wrap(
            tenant_id="acme",
            device_id="t-1",
            message_type=kind,
            received_ms=RECEIVED_MS,
            source="http",
            payload=payload,
        )
    )


def line(of: Message, *, colour: bool = False) -> str:
    return line_of(read(of), colour=colour)


def test_metrics_are_compact_and_the_rest_follows() -> None:
    said = line(enveloped(b'{"metrics":{"t":21.5,"door":"half open","ok":true,"mode":"eco"},"seq":17}'))
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d\.123  acme/t-1  telemetry  t=21\.5 door="half open" ok=true mode=eco  seq=17', said
    )


def test_the_devices_own_time_is_shown_only_where_it_is_another() -> None:
    assert "ts=" not in line(enveloped(b'{"metrics":{"t":1},"ts":%d}' % (RECEIVED_MS - 50)))
    assert "ts=1795431600123" in line(enveloped(b'{"metrics":{"t":1},"ts":%d}' % (RECEIVED_MS - 3_600_000)))


def test_a_heartbeat_needs_no_payload() -> None:
    assert line(enveloped(b"{}", MessageType.HEARTBEAT)).endswith("acme/t-1  heartbeat")


def test_what_is_no_envelope_is_shown_raw() -> None:
    assert line(message(b'{"test":1}')).endswith('telemetry.acme  raw  {"test":1}')
    assert line(message(b"")).endswith("raw  (empty)")


EVIL = b'{"metrics":{"a\\u001b[2J":"\\u009b31m\\u202eevil\\r\\n","b":"\x7f"}}'


@pytest.mark.parametrize("of", [enveloped(EVIL), message(b"\x1b]0;evil\x07\r\n\xff\x9b"), message(b"x", "a.\x1b[2J")])
def test_nothing_that_a_device_sends_moves_the_terminal(of: Message) -> None:
    said = line(of)
    assert said.isprintable(), repr(said)
    assert "\\x1b" in said
    coloured = re.sub(r"\x1b\[[0-9;]*m", "", line(of, colour=True))
    assert coloured == said


@given(st.text())
def test_escaping_leaves_what_can_be_seen_and_nothing_else(text: str) -> None:
    assert escaped(text).isprintable()
    if text.isprintable():
        assert escaped(text) == text


def test_a_long_message_is_cut_and_says_so() -> None:
    said = line(enveloped(b'{"metrics":{"t":"%b"}}' % (b"x" * 10_000)))
    assert len(said) < LINE_LENGTH_MAX + 100
    assert said.endswith(" more)")


def test_json_is_one_ascii_line_whatever_the_device_sent() -> None:
    said = json_of(read(enveloped(b'{\n "metrics": {\n  "t": "\xc3\xbc\\u009b"}}')), stream="TELEMETRY")
    assert said.isascii()
    assert said.isprintable()
    assert json.loads(said) == {
        "time": "2026-11-23T12:00:00.123Z",
        "stream": "TELEMETRY",
        "sequence": 7,
        "subject": "telemetry.acme",
        "tenant_id": "acme",
        "device_id": "t-1",
        "msg_type": "telemetry",
        "ts": RECEIVED_MS,
        "source": "http",
        "payload": {"metrics": {"t": "ü\x9b"}},
    }


@pytest.mark.parametrize(
    ("body", "field"), [(b'{"test":1}', {"raw": '{"test":1}'}), (b"\xff\x00", {"raw_base64": "/wA="})]
)
def test_json_of_what_is_no_envelope_has_the_whole_body(body: bytes, field: dict[str, str]) -> None:
    record = json.loads(json_of(read(message(body)), stream="TELEMETRY"))
    assert {name: record[name] for name in record if name.startswith("raw")} == field


def test_a_payload_that_nests_too_deep_is_shown_raw() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    assert "  raw  " in line(enveloped(b'{"metrics":%b}' % deep))


def test_a_shadow_is_named_and_what_is_said_to_a_device_goes_the_other_way() -> None:
    body = wrap(
        tenant_id="acme", device_id="t-1", message_type=MessageType.SHADOW, received_ms=RECEIVED_MS, source="mqtt",
        payload=b'{"state":{"reported":{"a":1}}}', name="config",
    )  # fmt: skip
    reported = message(body, "shadow.acme")
    assert line(reported).endswith('acme/t-1  shadow:config  state={"reported":{"a":1}}')
    assert json.loads(json_of(read(reported), stream="SHADOW"))["name"] == "config"

    delta = message(b'{"state":{"a":2},"version":3}', "down.acme.t-1.shadow.name.config.update.delta")
    assert line(delta).endswith('acme/t-1  ← shadow/name/config/update/delta  state={"a":2}  version=3')
    told = json.loads(json_of(read(delta), stream="DOWN"))
    assert (told["device_id"], told["topic"], told["payload"]["version"]) == (
        "t-1", "shadow/name/config/update/delta", 3,
    )  # fmt: skip
    assert (read(delta).device_id, read(reported).device_id, read(message(b"x")).device_id) == ("t-1", "t-1", None)
    for foreign in (message(b"{", "down.acme.t-1.commands"), message(b"{}", "down.acme")):
        assert read(foreign).device_id is None
        assert "raw" in line(foreign)
