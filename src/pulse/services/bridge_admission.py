"""The bridge's decision on one message of a broker: for its stream, an answer, for the dead letters, or for nobody.

The broker has asked the device for its token; whether device and tenant are known and enabled is asked here once more.

    accepted                                            its stream
    an update or get of a shadow, or an answer to a     the answer, …/rejected, on its way to the device
        command, that cannot be one
    topic, ids, JSON, payload, time, size,              a dead letter, whole, with the topic in a header
        an unknown device
    over a rate, more dead letters than allowed,        counted and logged, no more: to keep what is too much
        larger than NATS carries                            would be what the limit is there against
    RETAIN set                                          counted: a copy of what was said before
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol
from urllib.parse import quote

import msgspec

from pulse.domain import command_rejections
from pulse.domain.dead_letter import Condemned
from pulse.domain.device_words import client_token
from pulse.domain.downward import Downward, downward_subject
from pulse.domain.envelope import wrap
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.limits import RateLimits
from pulse.domain.mqtt import Arrival, delivery_name, is_delivery_id
from pulse.domain.shadow import ShadowKey
from pulse.domain.shadow_documents import rejected
from pulse.domain.topics import UPWARD, Topic, Upward, identity_in, parse_topic
from pulse.services.gateway import Gateway

DEAD_LETTERS = "DEAD_LETTERS"
DOWN = "DOWN"
SHADOW, COMMANDS = "SHADOW", "COMMANDS"
ANSWERED = frozenset({SHADOW, COMMANDS})
"""Streams of what a known device is answered where it cannot be; as fast as the device may speak."""
TOPIC_HEADER = "Pulse-Mqtt-Topic"
RETAINED = "retained"
"""Counted like a Reason: nobody is at fault."""
TOPIC_BYTES_KEPT = 1024
TOPICS_REMEMBERED = 16_384
NOBODY = "_"
"""Stands for a tenant that a topic does not name, in the subject of its dead letter."""


class Devices(Protocol):
    """The registry."""

    @property
    def ready(self) -> bool:
        """Whether all of them have been read once."""

    def may_speak(self, tenant_id: str, device_id: str) -> bool:
        """Whether device and tenant are known and enabled."""


class Publication(NamedTuple):
    """What goes to JetStream for a message.

    `refusal` is None, or why it is a dead letter, or an answer that says so. `names_delivery` says that the message id
    stands for how the message came, as it has none of its own.
    """

    stream: str
    subject: str
    body: bytes
    message_id: str
    refusal: Refusal | None = None
    names_delivery: bool = False

    @property
    def refused_as(self) -> str:
        """What becomes of a message that was not accepted."""
        return "rejected" if self.stream == DOWN else "dead_letter"


class Dropped(NamedTuple):
    """What goes nowhere: `reason` is a Reason or RETAINED."""

    reason: str
    error: str


class Admission:
    """Decides; `session` names the broker's session in message ids, `body_bytes_max` bounds a payload.

    `letters` bounds the dead letters of each tenant; those whose topic names no tenant share one bound.
    """

    def __init__(
        self,
        *,
        gateway: Gateway,
        devices: Devices,
        letters: RateLimits,
        session: str,
        body_bytes_max: int,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._gateway = gateway
        self._devices = devices
        self._letters = letters
        self._session = session
        self._body_bytes_max = body_bytes_max
        self._clock_ns = clock_ns
        self._monotonic_ns = monotonic_ns
        self._process_id = secrets.token_hex(8)
        self._numbers = itertools.count()

    def decide(self, arrival: Arrival, *, limited: bool) -> Publication | Dropped:
        """What becomes of `arrival`; its device's rate counts where it is `limited`."""
        if arrival.retained:
            return Dropped(RETAINED, "the broker kept it from before the subscription")
        try:
            return self._accept(arrival, limited=limited)
        except Refusal as refusal:
            return self.condemn(arrival, refusal)

    def condemn(self, arrival: Arrival, refusal: Refusal) -> Publication | Dropped:
        """What becomes of a message that cannot be accepted: an answer, a dead letter, or nothing."""
        if refusal.reason is Reason.RATE_LIMITED:
            return Dropped(refusal.reason, str(refusal))
        topic = arrival.topic.decode("utf-8", "replace")
        known = _known(topic)
        if known is not None and UPWARD[known.kind].stream in ANSWERED and refusal.reason is not Reason.NOT_FOUND:
            said = _rejected(arrival, known, refusal, self._clock_ns() // 1_000_000)
            return Publication(DOWN, downward_subject(said), said.body, self._own_id("r", arrival), refusal=refusal)
        tenant_id, device_id = identity_in(topic)
        if not arrival.is_whole:
            return Dropped(refusal.reason, str(refusal))
        try:
            self._letters.admit(tenant_id or NOBODY, "", self._monotonic_ns())
        except LimitExceeded:
            return Dropped(refusal.reason, f"{refusal}; more dead letters than mqtt_dead_letters_per_s allows")
        letter = self._letter(arrival, known, tenant_id, device_id, refusal)
        return Publication(
            DEAD_LETTERS, letter.carrier, msgspec.json.encode(letter), self._own_id("d", arrival), refusal=refusal
        )

    def _accept(self, arrival: Arrival, *, limited: bool) -> Publication:
        topic, upward = _read_topic(arrival.topic)
        if not self._devices.may_speak(topic.tenant_id, topic.device_id):
            raise Refusal(Reason.NOT_FOUND, "device or tenant is not known, or not enabled")
        if limited:
            self._gateway.admit(topic.tenant_id, topic.device_id)
        if arrival.size > self._body_bytes_max:
            raise LimitExceeded(
                Reason.TOO_LARGE,
                f"{arrival.size} bytes are more than {self._body_bytes_max}",
                limit="body_bytes_max",
                value=self._body_bytes_max,
            )
        prepared = self._gateway.prepare(
            tenant_id=topic.tenant_id,
            device_id=topic.device_id,
            message_type=upward.message_type,
            payload=arrival.payload,
            source="mqtt",
            delivery=delivery_name(self._session, arrival.packet_id) if arrival.packet_id else None,
            name=topic.shadow_name,
            reported_only=upward.reported_only,
        )
        names_delivery = is_delivery_id(prepared.message_id)
        return Publication(upward.stream, *prepared, names_delivery=names_delivery)

    def _letter(
        self, arrival: Arrival, known: Topic | None, tenant_id: str | None, device_id: str | None, refusal: Refusal
    ) -> Condemned:
        """A payload whose sender and kind are known is put into its envelope, so that a replay can succeed."""
        now_ns = self._clock_ns()
        body = arrival.payload
        upward = UPWARD["telemetry" if known is None else known.kind]
        if known is not None:
            body = wrap(
                tenant_id=known.tenant_id,
                device_id=known.device_id,
                message_type=upward.message_type,
                received_ms=now_ns // 1_000_000,
                source="mqtt",
                payload=body,
                name=known.shadow_name,
            )
        return Condemned(
            stream=upward.stream,
            subject=f"{upward.subject_prefix}.{tenant_id or NOBODY}",
            reason=refusal.reason,
            error=f"{refusal.field}: {refusal}" if refusal.field else str(refusal),
            body=body,
            headers=_headers(arrival.topic),
            tenant_id=tenant_id,
            device_id=device_id,
            published_ns=now_ns,
        )

    def _own_id(self, prefix: str, arrival: Arrival) -> str:
        """The message id of what is said of `arrival` in place of it; the same when it comes again."""
        if not arrival.packet_id:
            return f"{prefix}/{self._process_id}-{next(self._numbers):x}"
        digest = hashlib.blake2b(arrival.payload, key=hashlib.sha256(arrival.topic).digest(), digest_size=8).hexdigest()
        return f"{prefix}/{delivery_name(self._session, arrival.packet_id)}/{digest}"


@functools.lru_cache(TOPICS_REMEMBERED)
def _read_topic(topic: bytes) -> tuple[Topic, Upward]:
    try:
        read = parse_topic(topic.decode())
    except UnicodeDecodeError as error:
        raise Refusal(Reason.INVALID_TOPIC, "the topic is not UTF-8", field="topic") from error
    return read, UPWARD[read.kind]


def _known(topic: str) -> Topic | None:
    try:
        return parse_topic(topic)
    except Refusal:
        return None


def _rejected(arrival: Arrival, topic: Topic, refusal: Refusal, at_ms: int) -> Downward:
    """The word to a known device that its update, get or answer cannot be."""
    if UPWARD[topic.kind].stream == COMMANDS:
        named = command_rejections.named_command(arrival.payload)
        return command_rejections.rejected(topic.tenant_id, topic.device_id, named, refusal, at_ms=at_ms)
    key = ShadowKey(topic.tenant_id, topic.device_id, topic.shadow_name)
    what = "get" if topic.kind.endswith("/get") else "update"
    return rejected(key, what, refusal, client_token(arrival.payload), at_ms)


def _headers(topic: bytes) -> bytes:
    return f"NATS/1.0\r\n{TOPIC_HEADER}: {quote(topic[:TOPIC_BYTES_KEPT], safe='/+#$')}\r\n\r\n".encode()
