"""The envelope: the one JSON shape of a body on `telemetry.`, `shadow.`, `commands.` and `routes.`.

    {"v":1,"tenant_id":"acme","device_id":"t-1","msg_type":"telemetry","ts":1790000000000,"source":"http","payload":{…}}

The device's own bytes are spliced in as they came: what is stored can be traced to what was sent.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pulse.domain.errors import Reason, Refusal
from pulse.domain.subjects import MessageType, tenant_of

Source = Literal["http", "mqtt"]
Identity = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]


class Envelope(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One device message as a worker reads it; `ts` is when the edge received it, in ms since the epoch."""

    v: Literal[1]
    tenant_id: Identity
    device_id: Identity
    msg_type: MessageType
    ts: Annotated[int, Meta(ge=0, le=253_402_300_799_999)]
    source: Source
    payload: msgspec.Raw


_decoder = msgspec.json.Decoder(Envelope)


def wrap(
    *, tenant_id: str, device_id: str, message_type: MessageType, received_ms: int, source: Source, payload: bytes
) -> bytes:
    """The envelope around `payload`, which must be valid JSON; the ids must have passed the grammar of ids."""
    head = (
        f'{{"v":1,"tenant_id":"{tenant_id}","device_id":"{device_id}","msg_type":"{message_type}",'
        f'"ts":{received_ms},"source":"{source}","payload":'
    )
    return b"%b%b}" % (head.encode("ascii"), payload)


def unwrap(subject: str, body: bytes) -> Envelope:
    """Read `body`; Refusal INVALID_ENVELOPE where it is none, or speaks for another tenant than its subject."""
    try:
        envelope = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(Reason.INVALID_ENVELOPE, str(error)) from error
    if envelope.tenant_id != tenant_of(subject):
        raise Refusal(
            Reason.INVALID_ENVELOPE,
            f"tenant {envelope.tenant_id!r} does not belong on subject {subject!r}",
            field="tenant_id",
        )
    return envelope
