"""What a device says beside telemetry, checked wholly at the edge: updates of its shadow, and answers to commands.

What passes here and is refused later was refused for what it met: a version, the rest of a section, a command that is
over. What is checked is only what no state of the shadow could mend.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pulse.domain.command import read_answer
from pulse.domain.errors import Reason, Refusal
from pulse.domain.json_text import check_storable, read_json, refuse_repeated_keys
from pulse.domain.shadow import Shadow, ShadowBounds, apply, read_update
from pulse.domain.shadow_requests import Get

RESULT_DEPTH_MAX = 32
"""Objects and arrays within one another, of the result of a command."""

_gets = msgspec.json.Decoder(Get)


class _Tagged(msgspec.Struct, frozen=True, rename="camel"):
    client_token: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET


_tagged = msgspec.json.Decoder(_Tagged)


def check_update(payload: bytes, *, bounds: ShadowBounds, reported_only: bool = False) -> None:
    """Raise Refusal, with the path of what is at fault, for what cannot be an update of any shadow.

    A merge patch leaves all that it sets, so a section that it alone makes too large is too large whatever it met.
    """
    update = read_update(payload)
    named = 1 + (update.version is not UNSET) + (update.client_token is not UNSET)
    for name, patch in update.patch.items():
        if reported_only and name != "reported":
            raise Refusal(Reason.INVALID_PAYLOAD, "only `reported` belongs here", field=f"state.{name}")
        path, depth_max = f"state.{name}", bounds.shadow_depth_max
        named += 1 + check_storable(patch, path, depth_max=depth_max, limit="shadow_depth_max")
    refuse_repeated_keys(payload, named)
    apply(Shadow(), msgspec.structs.replace(update, version=UNSET), at_ms=0, bounds=bounds)


def check_get(payload: bytes) -> None:
    """Raise Refusal for what does not ask for a shadow."""
    get = read_json(_gets, payload)
    refuse_repeated_keys(payload, int(get.client_token is not UNSET))


def check_answer(payload: bytes) -> None:
    """Raise Refusal, with the path of what is at fault, for what is no answer to a command."""
    answer = read_answer(payload)
    named = 2 + (answer.result is not UNSET) + (answer.error is not UNSET)
    if answer.result is not UNSET:
        result = msgspec.json.decode(answer.result)
        named += check_storable(result, "result", depth_max=RESULT_DEPTH_MAX, limit="RESULT_DEPTH_MAX")
    refuse_repeated_keys(payload, named)


def client_token(payload: bytes) -> str | UnsetType:
    """What is to come back in the answer, if `payload` can be read so far."""
    try:
        return _tagged.decode(payload).client_token
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return UNSET
