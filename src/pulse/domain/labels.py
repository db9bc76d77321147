"""What people may write beside ids: the name of a thing, and the attributes of a device."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pulse.domain.errors import Reason, Refusal

NAME_LENGTH_MAX = 200
ATTRIBUTES_MAX = 64
ATTRIBUTE_NAME_LENGTH_MAX = 128
ATTRIBUTE_LENGTH_MAX = 1024
INTEGER_MIN, INTEGER_MAX = -(2**63), 2**63 - 1


def check_text(value: str, *, field: str, length_max: int, length_min: int = 0) -> str:
    """`value`, if PostgreSQL can keep it and a terminal can show it; else Refusal INVALID_REQUEST that names `field`.

    Refused: control characters (so U+0000 too), lone surrogates, and lengths outside the bounds, in characters.
    """
    if not length_min <= len(value) <= length_max:
        raise Refusal(Reason.INVALID_REQUEST, f"must have {length_min} to {length_max} characters", field=field)
    for character in value:
        if character < " " or "\x7f" <= character <= "\x9f" or "\ud800" <= character <= "\udfff":
            raise Refusal(Reason.INVALID_REQUEST, f"U+{ord(character):04X} is not allowed here", field=field)
    return value


def check_name(value: str, *, field: str = "name") -> str:
    """`value`, if it can be the name of something; else Refusal INVALID_REQUEST."""
    return check_text(value, field=field, length_max=NAME_LENGTH_MAX)


def check_attributes(attributes: Mapping[str, object]) -> dict[str, object]:
    """`attributes`, if they can be a device's: names with a text, a boolean, or a number that JSON and int64 can hold.

    Raises Refusal INVALID_REQUEST with the path of the one at fault.
    """
    if len(attributes) > ATTRIBUTES_MAX:
        message = f"a device may have {ATTRIBUTES_MAX} attributes"
        raise Refusal(Reason.INVALID_REQUEST, message, field="attributes")
    for name, value in attributes.items():
        check_text(name, field="attributes", length_min=1, length_max=ATTRIBUTE_NAME_LENGTH_MAX)
        _check_attribute(value, field=f"attributes.{name}")
    return dict(attributes)


def merged_attributes(attributes: Mapping[str, object], patch: Mapping[str, object]) -> dict[str, object]:
    """`attributes` after `patch`, in which null removes; checked. Source: RFC 7396, for an object without depth."""
    merged = {name: value for name, value in {**attributes, **patch}.items() if value is not None}
    check_attributes({name: value for name, value in patch.items() if value is not None})
    if len(merged) > max(ATTRIBUTES_MAX, len(attributes)):
        message = f"a device may have {ATTRIBUTES_MAX} attributes"
        raise Refusal(Reason.INVALID_REQUEST, message, field="attributes")
    return merged


def _check_attribute(value: object, *, field: str) -> None:
    if isinstance(value, str):
        check_text(value, field=field, length_max=ATTRIBUTE_LENGTH_MAX)
    elif isinstance(value, bool):
        return
    elif isinstance(value, int):
        if not INTEGER_MIN <= value <= INTEGER_MAX:
            raise Refusal(Reason.INVALID_REQUEST, "an integer must fit in 64 bits", field=field)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise Refusal(Reason.INVALID_REQUEST, "must be a finite number", field=field)
    else:
        raise Refusal(Reason.INVALID_REQUEST, "must be a text, a number or a boolean", field=field)
