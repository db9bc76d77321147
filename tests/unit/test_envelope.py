"""The envelope reads back what was wrapped, and refuses everything else."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.envelope import unwrap, wrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.subjects import MessageType, subject_for

ids = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
payloads = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(ids, ids, payloads, st.sampled_from(MessageType), st.integers(0, 2**42))
def test_what_is_wrapped_reads_back_with_the_devices_own_bytes(
    tenant_id: str, device_id: str, payload: object, message_type: MessageType, received_ms: int
) -> None:
    sent = b" " + msgspec.json.encode(payload) + b"\n"
    body = wrap(
        tenant_id=tenant_id,
        device_id=device_id,
        message_type=message_type,
        received_ms=received_ms,
        source="http",
        payload=sent,
    )
    envelope = unwrap(subject_for(message_type, tenant_id), body)
    assert (envelope.tenant_id, envelope.device_id) == (tenant_id, device_id)
    assert (envelope.msg_type, envelope.ts, envelope.source) == (message_type, received_ms, "http")
    assert bytes(envelope.payload) == sent.strip()
    assert sent in body


def envelope(**changed: object) -> bytes:
    whole = {"v": 1, "tenant_id": "t", "device_id": "d", "msg_type": "telemetry", "ts": 1, "source": "http"}
    return msgspec.json.encode({**whole, "payload": {}, **changed})


@pytest.mark.parametrize(
    "body",
    [
        b'{"test":1}',
        b"",
        b"5",
        b"[]",
        b"\xff\xfe",
        b'{"v":1',
        b"[" * 100_000,
        envelope(v=2),
        envelope(tenant_id="a.b"),
        envelope(tenant_id="other"),
        envelope(device_id=""),
        envelope(device_id="d" * 65),
        envelope(device_id="d\n"),
        envelope(msg_type="unknown"),
        envelope(ts=-1),
        envelope(ts=1.5),
        envelope(source="carrier pigeon"),
        envelope(more=1),
    ],
)
def test_anything_else_is_refused_as_no_envelope(body: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        unwrap("telemetry.t", body)
    assert refused.value.reason is Reason.INVALID_ENVELOPE


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_refusal(body: bytes) -> None:
    with pytest.raises(Refusal):
        unwrap("telemetry.t", body)
