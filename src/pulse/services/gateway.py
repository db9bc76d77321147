"""The gateway's decision: who may say what, how often, and what becomes of it.

Nothing here acks: `submit` hands out JetStream's own receipt, and its caller answers 202 (HTTP) or PUBACK (MQTT) only
with that in hand. Accepting needs JetStream alone: the registry is in memory, PostgreSQL may be away.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from pulse.domain.device_words import check_answer, check_get, check_update
from pulse.domain.envelope import Source, wrap
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.limits import RateLimits
from pulse.domain.receipt import Receipt, Waiting
from pulse.domain.shadow import ShadowBounds
from pulse.domain.subjects import MessageType, subject_for
from pulse.domain.telemetry import PayloadDecoder

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,128}")


class Publisher(Protocol):
    """JetStream."""

    def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        """The future has a result once the message is on disk; raises, or has, Outage where that cannot be in time."""

    def send(self, subject: str, body: bytes, *, message_id: str, waiting: Waiting) -> None:
        """`submit`, but that it is `waiting` that gets the receipt or the Outage."""


class Registry(Protocol):
    """The devices and their tokens."""

    @property
    def ready(self) -> bool:
        """Whether all of them have been read once."""

    def authenticate(self, tenant_id: str, device_id: str, token: str, now_ms: int) -> bool:
        """Whether this device may speak with this token now."""


class GatewayMetrics(Protocol):
    """What is counted."""

    def answered(self, kind: str, status: int, seconds: float) -> None:
        """A request of this kind got this HTTP status after so long."""

    def watch(self, pending: Callable[[], int]) -> None:
        """`pending` says how many requests are being answered."""

    def received(self, count_bytes: int) -> None:
        """A body of so many bytes, as they were sent, has been read."""

    def rows(self, count: int) -> None:
        """A batch had so many rows."""

    def refused(self, reason: str) -> None:
        """A message was not accepted, for a Reason or because a system is `unavailable` or `overloaded`."""


class Prepared(NamedTuple):
    """A message that was checked, as JetStream gets it."""

    subject: str
    body: bytes
    message_id: str


class Gateway:
    """Accepts messages of devices; used by every edge, whatever its protocol.

    An edge checks the ids, then asks in this order: `authenticate`, `admit`, with the payload read `prepare`, and
    `submit` or `send`; or it hands over itself what was prepared, where it may have to do that more than once.
    """

    def __init__(
        self,
        *,
        publisher: Publisher,
        registry: Registry,
        decoder: PayloadDecoder,
        shadow_bounds: ShadowBounds,
        limits: RateLimits,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._publisher = publisher
        self._registry = registry
        self._decoder = decoder
        self._shadow_bounds = shadow_bounds
        self._limits = limits
        self._clock_ns = clock_ns
        self._monotonic_ns = monotonic_ns
        self._process_id = secrets.token_hex(8)
        self._numbers = itertools.count()

    def authenticate(self, tenant_id: str, device_id: str, token: str | None) -> None:
        """Raise Refusal UNAUTHENTICATED, which never tells whether device, tenant or token is at fault.

        Raises Outage as long as the devices are not known: a device must not take a start of ours for its own fault.
        """
        if not self._registry.ready:
            raise Outage("nats", "the devices have not been read yet")
        now_ms = self._clock_ns() // 1_000_000
        if token is None or not self._registry.authenticate(tenant_id, device_id, token, now_ms):
            raise Refusal(Reason.UNAUTHENTICATED, "unknown device or wrong token")

    def admit(self, tenant_id: str, device_id: str) -> None:
        """Count one message of an authenticated device, or raise LimitExceeded where it sends too often."""
        self._limits.admit(tenant_id, device_id, self._monotonic_ns())

    def prepare(
        self,
        *,
        tenant_id: str,
        device_id: str,
        message_type: MessageType,
        payload: bytes,
        source: Source,
        retry_id: str | None = None,
        delivery: str | None = None,
        name: str = "",
        reported_only: bool = False,
    ) -> Prepared:
        """Check `payload` (JSON bytes) of an authenticated device; what JetStream is to get. Raises Refusal with the
        field at fault.

        `name` is that of a named shadow; with `reported_only` an update may name nothing else. `retry_id` is what a
        retry of this message has in common with it, among the device's own messages. `delivery` stands for how the
        message came; one that has no id of its own gets it from that and its bytes.
        """
        received_ms = self._clock_ns() // 1_000_000
        seq: int | None = None
        if message_type is MessageType.TELEMETRY:
            seq = self._decoder.telemetry(payload, received_ms=received_ms, unique_keys=True).seq
        else:
            payload = self._check(message_type, payload, received_ms=received_ms, reported_only=reported_only)
        body = wrap(
            tenant_id=tenant_id,
            device_id=device_id,
            message_type=message_type,
            received_ms=received_ms,
            source=source,
            payload=payload,
            name=name,
        )
        if retry_id is not None:
            message_id = f"{retry_id}/{tenant_id}/{device_id}"
        elif seq is not None:
            # A seq alone would not do: a device that counts from 0 after a restart would have its new readings taken
            # for old ones. A retry repeats the bytes as well as the number.
            message_id = f"s/{seq}/{_digest(payload)}/{tenant_id}/{device_id}"
        elif delivery is not None:
            message_id = f"{delivery}/{_digest(payload)}/{tenant_id}/{device_id}"
        else:
            message_id = f"{self._process_id}-{next(self._numbers):x}"
        return Prepared(subject_for(message_type, tenant_id), body, message_id)

    def _check(self, message_type: MessageType, payload: bytes, *, received_ms: int, reported_only: bool) -> bytes:
        """The payload of anything but telemetry, made up where it may be left out."""
        if message_type is MessageType.HEARTBEAT:
            payload = payload or b"{}"
            self._decoder.heartbeat(payload, received_ms=received_ms, unique_keys=True)
        elif message_type is MessageType.SHADOW:
            check_update(payload, bounds=self._shadow_bounds, reported_only=reported_only)
        elif message_type is MessageType.SHADOW_GET:
            payload = payload or b"{}"
            check_get(payload)
        elif message_type is MessageType.COMMANDS_ACK:
            check_answer(payload)
        else:
            raise Refusal(Reason.UNSUPPORTED_TYPE, f"no device says {message_type}", field="msg_type")
        return payload

    def submit(self, prepared: Prepared) -> asyncio.Future[Receipt]:
        """Hand a message to JetStream; where that is away an Outage is raised, or becomes the future's."""
        return self._publisher.submit(prepared.subject, prepared.body, message_id=prepared.message_id)

    def send(self, prepared: Prepared, waiting: Waiting) -> None:
        """`submit`, but that it is `waiting` that gets the receipt or the Outage, at once when it is there."""
        subject, body, message_id = prepared
        self._publisher.send(subject, body, message_id=message_id, waiting=waiting)


def _digest(payload: bytes) -> str:
    return hashlib.blake2b(payload, digest_size=8).hexdigest()


def retry_id_of_key(key: str, *, field: str) -> str:
    """The `retry_id` of an idempotency key; Refusal that names `field` where it is none."""
    return f"k/{_checked(key, field)}"


def retry_id_of_row(key: str, row: int, *, field: str) -> str:
    """The `retry_id` of the row at index `row` of a batch whose idempotency key is `key`."""
    return f"b/{_checked(key, field)}/{row}"


def _checked(key: str, field: str) -> str:
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise Refusal(Reason.INVALID_PAYLOAD, f"{field} may have 1 to 128 visible ASCII characters", field=field)
    return key
