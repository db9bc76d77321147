"""The envelope: the one JSON shape of a body on `telemetry.`, `shadow.`, `commands.` and `routes.`.

    {"v":1,"tenant_id":"acme","device_id":"t-1","msg_type":"telemetry","ts":1790000000000,"source":"http","payload":{…}}

The device's own bytes are spliced in as they came: what is stored can be traced to what was sent. What is said of a
named shadow has its `name` as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import ID_PATTERN
from pulse.domain.subjects import SUBJECT_PREFIX, MessageType, subject_for, tenant_of

Source = Literal["http", "mqtt"]
Identity = Annotated[str, Meta(pattern=rf"^{ID_PATTERN}\Z")]
ReceivedMs = Annotated[int, Meta(ge=0, le=7_258_118_400_000)]
"""Until the year 2200: a reading an hour ahead of it still has a date."""
IDENTITY = re.compile(ID_PATTERN)


class Envelope(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One device message as a worker reads it; `ts` is when the edge received it, in ms since the epoch."""

    v: Literal[1]
    tenant_id: str
    device_id: str
    msg_type: MessageType
    ts: ReceivedMs
    source: Source
    payload: msgspec.Raw
    name: Identity | UnsetType = UNSET
    """Of a shadow; the message types of telemetry have none."""


_decoder = msgspec.json.Decoder(Envelope)


def wrap(
    *,
    tenant_id: str,
    device_id: str,
    message_type: MessageType,
    received_ms: int,
    source: Source,
    payload: bytes,
    name: str = "",
) -> bytes:
    """The envelope around `payload`, which must be valid JSON; ids and name must have passed the grammar of ids."""
    named = f',"name":"{name}"' if name else ""
    head = (
        f'{{"v":1,"tenant_id":"{tenant_id}","device_id":"{device_id}","msg_type":"{message_type}",'
        f'"ts":{received_ms},"source":"{source}"{named},"payload":'
    )
    return head.encode() + payload + b"}"


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
    if subject != subject_for(envelope.msg_type, envelope.tenant_id):
        raise Refusal(Reason.INVALID_ENVELOPE, f"{envelope.msg_type} does not belong on {subject!r}", field="msg_type")
    if envelope.name is not UNSET and SUBJECT_PREFIX[envelope.msg_type] != "shadow":
        raise Refusal(Reason.INVALID_ENVELOPE, "only shadows have names", field="name")
    for field, identity in (("tenant_id", envelope.tenant_id), ("device_id", envelope.device_id)):
        if not IDENTITY.fullmatch(identity):
            raise Refusal(Reason.INVALID_ENVELOPE, f"{identity!r} is not 1 to 64 of A-Z a-z 0-9 _ -", field=field)
    return envelope


def whole_decoder(payloads: Mapping[MessageType, Any]) -> msgspec.json.Decoder[Any]:
    """Reads an envelope and its payload, which is of the type that belongs to its `msg_type`, in one pass.

    What it returns has the fields of Envelope, less `msg_type`, which is the key of its class in `payloads`. It takes
    what `unwrap` and a decoder of the payload would take one after the other, and also ids that are none: whoever uses
    it checks those (IDENTITY), once for many messages of one device.
    """
    shapes = [
        msgspec.defstruct(
            f"Whole{message_type.name.title()}",
            [
                ("v", Literal[1]),
                ("tenant_id", str),
                ("device_id", str),
                ("ts", ReceivedMs),
                ("source", Source),
                ("payload", payload),
            ],
            tag_field="msg_type",
            tag=message_type.value,
            forbid_unknown_fields=True,
            gc=False,
        )
        for message_type, payload in payloads.items()
    ]
    return msgspec.json.Decoder(Union[tuple(shapes)])  # noqa: UP007 - there is no other spelling for a list of types
