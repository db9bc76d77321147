"""A dry run: what a route would do with messages that are there, and nothing of it done.

Nothing is signed: of the headers that Pulse sets, the signature is left out, and of those of the route the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from pulse.domain.errors import Refusal
from pulse.domain.route import Route, Webhook
from pulse.domain.route_topic import read_topic_template
from pulse.domain.routed import RoutedMessage
from pulse.domain.template import read_template

MESSAGES_MAX = 1000
SAMPLES_MAX = 5
REASONS_MAX = 5
SAMPLE_BODY_BYTES_MAX = 16 * 1024


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What would be sent for one message: `to` a URL or a topic. `refused` says why nothing could be."""

    position: int
    device_id: str
    ts_ms: int
    to: str = ""
    header_names: tuple[str, ...] = ()
    body: str = ""
    body_bytes: int = 0
    refused: str = ""


class Unanswered(msgspec.Struct, frozen=True, kw_only=True):
    """Why the expression said neither yes nor no, of how many messages, one of them at `position`."""

    why: str
    count: int
    position: int


class DryRun(msgspec.Struct, frozen=True, kw_only=True):
    """Of `examined` messages, `matched` would be sent, but for `refused` ones of these.

    Of `unanswered` ones the expression said nothing, which is no match. `complete` is false where time ran out before
    all were examined. `destination_refused` says why nothing may be sent to the destination, and is empty where it may.
    `ordered`: those of one device would go one after the other.
    """

    examined: int
    matched: int
    refused: int
    unanswered: int
    reasons: Sequence[Unanswered]
    samples: Sequence[Sample]
    complete: bool
    destination_refused: str = ""
    ordered: bool = False


class Renderer:
    """Makes of messages what a route would send."""

    def __init__(self, route: Route, *, bytes_max: int) -> None:
        to = route.destination
        self._template = None if route.template is None else read_template(route.template)
        self._topic = None if isinstance(to, Webhook) else read_topic_template(to.topic)
        self._url = to.url if isinstance(to, Webhook) else ""
        headers: Mapping[str, str] = to.headers if isinstance(to, Webhook) else {}
        ours = ("Content-Type", "webhook-id", "webhook-timestamp", "webhook-signature") if self._url else ()
        self._header_names = (*ours, *sorted(headers))
        self._bytes_max = bytes_max

    def sample(self, message: RoutedMessage) -> Sample:
        """What would be sent for `message`; of the body the beginning."""
        sample = Sample(position=message.position, device_id=message.device_id, ts_ms=message.ts_ms)
        try:
            body = message.body if self._template is None else self._template.render(message, bytes_max=self._bytes_max)
            to = self._url if self._topic is None else self._topic.topic(message)
        except Refusal as refusal:
            where = f"{refusal.field}: " if refusal.field else ""
            return msgspec.structs.replace(sample, refused=f"{where}{refusal.message}")
        return msgspec.structs.replace(
            sample,
            to=to,
            header_names=self._header_names,
            body=body[:SAMPLE_BODY_BYTES_MAX].decode("utf-8", "replace"),
            body_bytes=len(body),
        )
