"""What becomes of the messages of SHADOW: each is an update or a get, answered in the order in which they came.

message ─► read_request ─┬─ no envelope ──► dead letter
                         └─ request ──► answer ─┬─ accepted: a new version, and the delta that is left
                                                └─ rejected: a code and a reason; nothing changes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pulse.domain.device_state import Device
from pulse.domain.downward import Downward
from pulse.domain.envelope import unwrap
from pulse.domain.errors import Refusal
from pulse.domain.json_text import read_json
from pulse.domain.settlement import DeadLetter, Message, dead_letter
from pulse.domain.shadow import (
    Change,
    Shadow,
    ShadowBounds,
    ShadowKey,
    Update,
    apply,
    check_room,
    delete,
    read_update,
)
from pulse.domain.shadow_documents import asked, rejected, updated
from pulse.domain.subjects import MessageType

DEVICE = "device"
"""Who makes the changes that devices ask for."""


class Get(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A device asks for its shadow."""

    client_token: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET


class Request(NamedTuple):
    """What one message asks of one shadow: an update, a get, or what cannot be read as either."""

    position: int
    key: ShadowKey
    at_ms: int
    asks: Update | Get | Refusal
    what: str
    """`update` or `get`; the topic of the answer."""

    @property
    def token(self) -> str | UnsetType:
        """What is to come back in the answer."""
        return UNSET if isinstance(self.asks, Refusal) else self.asks.client_token


class Changed(NamedTuple):
    """A shadow after one change, that change, and what the device hears of it."""

    shadow: Shadow
    change: Change
    said: Sequence[Downward]


class Answers(NamedTuple):
    """What a batch of requests comes to: the shadows that changed, how, what devices hear, how many were rejected."""

    shadows: Mapping[ShadowKey, Shadow]
    changes: Sequence[Change]
    said: Sequence[Downward]
    rejected: int


_get_decoder = msgspec.json.Decoder(Get)


def read_request(position: int, message: Message) -> Request | DeadLetter:
    """What `message` asks; a dead letter where it does not even say whose shadow it is about."""
    try:
        envelope = unwrap(message.subject, message.body)
    except Refusal as refusal:
        return dead_letter(position, message, refusal)
    key = ShadowKey(envelope.tenant_id, envelope.device_id, "" if envelope.name is UNSET else envelope.name)
    what = "get" if envelope.msg_type is MessageType.SHADOW_GET else "update"
    asks: Update | Get | Refusal
    try:
        asks = read_json(_get_decoder, envelope.payload) if what == "get" else read_update(envelope.payload)
    except Refusal as refusal:
        asks = refusal
    return Request(position, key, envelope.ts, asks, what)


def answer(
    requests: Sequence[Request],
    shadows: Mapping[ShadowKey, Shadow],
    names: Mapping[Device, int],
    *,
    bounds: ShadowBounds,
    names_max: int,
) -> Answers:
    """Answer `requests`, which are in the order of the stream, given all `shadows` that they are about.

    `names` says how many named shadows each device has, of those devices that would have one more by a request.
    """
    now, count = dict(shadows), dict(names)
    changes: list[Change] = []
    said: list[Downward] = []
    refused = 0
    for request in requests:
        key, asks, shadow = request.key, request.asks, now[request.key]
        try:
            if isinstance(asks, Refusal):
                raise asks
            if isinstance(asks, Get):
                said.append(asked(key, shadow, asks.client_token))
                continue
            if is_made(key, shadow):
                check_room(count[key.device], names_max)
            changed = change(
                key, shadow, asks, at_ms=request.at_ms, who=DEVICE, bounds=bounds, position=request.position
            )
        except Refusal as refusal:
            refused += 1
            said.append(rejected(key, request.what, refusal, request.token, request.at_ms))
            continue
        if is_made(key, shadow) and changed.shadow.exists:
            count[key.device] += 1
        now[key] = changed.shadow
        changes.append(changed.change)
        said.extend(changed.said)
    return Answers({change.key: now[change.key] for change in changes}, changes, said, refused)


def is_made(key: ShadowKey, shadow: Shadow) -> bool:
    """Whether an update of this shadow gives its device one more name."""
    return bool(key.name) and not shadow.exists


def change(
    key: ShadowKey,
    shadow: Shadow,
    update: Update,
    *,
    at_ms: int,
    who: str,
    bounds: ShadowBounds,
    position: int | None = None,
) -> Changed:
    """`shadow` after `update`; raises what `apply` does."""
    after = apply(shadow, update, at_ms=at_ms, bounds=bounds, position=position)
    return Changed(after, Change(key, after.version, at_ms, who, update.patch), updated(key, update, shadow, after))


def removal(key: ShadowKey, shadow: Shadow, *, at_ms: int, who: str, version: int | None = None) -> Changed:
    """`shadow` deleted; raises what `delete` does."""
    gone = delete(shadow, at_ms=at_ms, version=version)
    return Changed(gone, Change(key, gone.version, at_ms, who, None), ())
