"""Where a device sends to: what a path below `/ingest/` means.

/ingest/v1/tenant/{tenant_id}/device/{device_id}/{telemetry|heartbeat|shadow|commands-ack}
/ingest/v1/tenant/{tenant_id}/device/{device_id}/shadow?name={name}                           a named shadow
/ingest/v1/batch
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec

from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import ID_PATTERN, is_id
from pulse.domain.subjects import MessageType

INGEST = "/ingest/"
TENANT, DEVICE, BATCH_PATH = b"/ingest/v1/tenant/", b"/device/", b"/ingest/v1/batch"
MESSAGE_TYPES = {
    kind.value: kind
    for kind in (MessageType.TELEMETRY, MessageType.HEARTBEAT, MessageType.SHADOW, MessageType.COMMANDS_ACK)
}
"""What a device may send; to ask for its shadow is a GET."""
SINGLE = re.compile(
    rb"/ingest/v1/tenant/(%b)/device/(%b)/(%b)"
    % (ID_PATTERN.encode(), ID_PATTERN.encode(), "|".join(MESSAGE_TYPES).encode())
)
"""The target of a single message as nearly all devices write it: nothing escaped, no query, ids that are ids."""
OTHER = "other"
"""The kind of a request that is none of ours."""
WHERE = (
    "POST /ingest/v1/tenant/{tenant_id}/device/{device_id}/{telemetry|heartbeat|shadow|commands-ack}, "
    "or /ingest/v1/batch"
)


class Target(msgspec.Struct, frozen=True, gc=False):
    """What a path means; the ids are as they came, `message_type` is None for a batch."""

    kind: str
    message_type: MessageType | None = None
    tenant_id: bytes = b""
    device_id: bytes = b""


BATCH = Target("batch")


def find_target(path: bytes) -> Target | None:
    """Take a raw path apart, before `%2F` becomes a slash; None where there is nothing.

    Whatever stands where an id belongs is the id, slashes included, and is refused as one.
    """
    if not path.startswith(TENANT):
        return BATCH if path == BATCH_PATH else None
    ids, _, kind = path[len(TENANT) :].rpartition(b"/")
    tenant_id, found, device_id = ids.partition(DEVICE)
    message_type = MESSAGE_TYPES.get(kind.decode("latin-1"))
    if message_type is None or not found:
        return None
    return Target(message_type.value, message_type, tenant_id, device_id)


def shadow_name(query: bytes) -> str:
    """The shadow that `?name=` names, empty for the unnamed one.

    Raises Refusal where it is no name or comes twice, and for any other parameter: a slip of the pen would change the
    unnamed shadow.
    """
    try:
        parameters = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=2, errors="strict")
    except ValueError as error:
        raise Refusal(Reason.INVALID_REQUEST, "the query cannot be read", field="name") from error
    for parameter, _ in parameters:
        if parameter != "name":
            raise Refusal(Reason.INVALID_REQUEST, "a shadow has no parameter but `name`", field=parameter)
    if len(parameters) > 1:
        raise Refusal(Reason.INVALID_REQUEST, "`name` came twice", field="name")
    return check_shadow_name(parameters[0][1]) if parameters else ""


def check_shadow_name(name: str) -> str:
    """`name`, if a shadow can have it; the unnamed one has an empty name. Raises Refusal."""
    if name and not is_id(name):
        raise Refusal(Reason.INVALID_IDENTITY, "a shadow's name must be 1 to 64 of A-Z a-z 0-9 _ -", field="name")
    return name


def decoded(part: bytes) -> str:
    """A part of a raw path as text; what is not UTF-8 becomes no id."""
    return (unquote_to_bytes(part) if b"%" in part else part).decode("utf-8", "replace")
