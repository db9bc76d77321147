"""Where a route republishes to: a topic below `tenant/{tenant_id}/route/`, and nowhere else.

    template   alerts/${device.id}/${metrics.level}       published   tenant/acme/route/alerts/t-1/high

The prefix is ours and never the template's, and what fills a place has plain characters or the job is refused. So a
topic is never another tenant's, and never one that a device publishes to and the bridge listens to: what is
republished cannot come back as a message. A device that repeats what it heard could make a circle all the same:
each message knows how many routes it has come through, and HOPS_MAX is the end.
"""

from __future__ import annotations

import re

import msgspec

from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.identity import check_tenant_id
from pulse.domain.routed import Path, RoutedMessage
from pulse.domain.template import cut_text, text_of

TEMPLATE_LENGTH_MAX = 256
LEVELS_MAX = 8
LEVEL_LENGTH_MAX = 64
HOPS_MAX = 3
HOPS = "Pulse-Hops"
"""The header, and the MQTT 5 user property, with the number of routes that a message has come through."""

_LITERAL = re.compile(r"[A-Za-z0-9_-]*")
_LEVEL = re.compile(rf"[A-Za-z0-9_-]{{1,{LEVEL_LENGTH_MAX}}}")


class TopicTemplate(msgspec.Struct, frozen=True):
    """A template that was read: levels, each of literal text and paths in turn."""

    levels: tuple[tuple[str | Path, ...], ...]

    def topic(self, message: RoutedMessage) -> str:
        """The topic for `message`; Refusal INVALID_TOPIC where a value is no level."""
        levels = []
        for number, level in enumerate(self.levels):
            text = "".join(part if isinstance(part, str) else _text(part, message) for part in level)
            if not _LEVEL.fullmatch(text):
                message_ = f"level {number + 1} would be {text[:LEVEL_LENGTH_MAX]!r}; 1 to 64 of A-Z a-z 0-9 _ - may be"
                raise Refusal(Reason.INVALID_TOPIC, message_, field="destination.topic")
            levels.append(text)
        return "/".join([prefix(message.tenant_id), *levels])


def _text(path: Path, message: RoutedMessage) -> str:
    """The value as a part of a level: null is as good as none."""
    value = message.find(path)
    return "" if value is None else text_of(value)


def prefix(tenant_id: str) -> str:
    """What every topic of a tenant's routes begins with, less the slash."""
    return f"tenant/{check_tenant_id(tenant_id)}/route"


def read_topic_template(text: str, *, field: str = "destination.topic") -> TopicTemplate:
    """The template that `text` is; Refusal INVALID_REQUEST that names `field`."""
    if not 1 <= len(text) <= TEMPLATE_LENGTH_MAX:
        message = f"a topic has 1 to {TEMPLATE_LENGTH_MAX} characters"
        raise Refusal(Reason.INVALID_REQUEST, message, field=field)
    levels: list[list[str | Path]] = [[]]
    for part in cut_text(text, field=field):
        if not isinstance(part, str):
            levels[-1].append(part)
            continue
        first, *others = part.split("/")
        levels[-1].append(first)
        levels += [[each] for each in others]
    kept = tuple(tuple(part for part in level if part != "") for level in levels)
    if len(kept) > LEVELS_MAX:
        raise Refusal(Reason.INVALID_REQUEST, f"a topic has at most {LEVELS_MAX} levels", field=field)
    for level in kept:
        if not level or not all(_LITERAL.fullmatch(part) for part in level if isinstance(part, str)):
            message = "a level is of A-Z a-z 0-9 _ - and ${path}, and never empty"
            raise Refusal(Reason.INVALID_REQUEST, message, field=field)
    return TopicTemplate(kept)


def next_hop(hops: int) -> int:
    """The hops of what a route makes of a message that has had `hops`; LimitExceeded at the end."""
    if hops >= HOPS_MAX:
        message = f"the message has come through {hops} routes already"
        raise LimitExceeded(Reason.INVALID_TOPIC, message, limit="route_hops_max", value=HOPS_MAX)
    return hops + 1


def read_hops(text: str) -> int:
    """The hops that a header says; what is no number is as good as the end."""
    if not text:
        return 0
    return min(int(text), HOPS_MAX) if text.isascii() and text.isdecimal() and len(text) <= 4 else HOPS_MAX
