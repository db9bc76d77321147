"""The gateway's decision: who may say what, and what becomes of it.

Nothing here acks: `accept` returns JetStream's own receipt, and its caller answers 202 (HTTP) or PUBACK (MQTT) only
with that in hand. Accepting needs JetStream alone: the registry is in memory, PostgreSQL may be away.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
import time
from collections.abc import Callable
from typing import Protocol

from pulse.domain.envelope import Source, wrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.receipt import Receipt
from pulse.domain.subjects import MessageType, subject_for
from pulse.domain.telemetry import PayloadDecoder

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,128}\Z")


class Publisher(Protocol):
    """JetStream."""

    async def publish(self, subject: str, body: bytes, *, message_id: str) -> Receipt:
        """Returns once the message is on disk; raises Outage where that cannot be had in time."""


class Registry(Protocol):
    """The devices and their tokens."""

    def authenticate(self, tenant_id: str, device_id: str, token: str, now_ms: int) -> bool:
        """Whether this device may speak with this token now."""


class GatewayMetrics(Protocol):
    """What is counted."""

    def answered(self, kind: str, status: int, seconds: float) -> None:
        """A request of this kind got this HTTP status after so long."""

    def pending(self, count: int) -> None:
        """So many requests are being answered."""


class Gateway:
    """Accepts messages of devices; used by every edge, whatever its protocol."""

    def __init__(
        self,
        *,
        publisher: Publisher,
        registry: Registry,
        decoder: PayloadDecoder,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._publisher = publisher
        self._registry = registry
        self._decoder = decoder
        self._clock_ns = clock_ns
        self._made_ids = (f"{secrets.token_hex(8)}-{number:x}" for number in itertools.count())

    def authenticate(self, tenant_id: str, device_id: str, token: str | None) -> None:
        """Raise Refusal UNAUTHENTICATED, which never tells whether device, tenant or token is at fault."""
        now_ms = self._clock_ns() // 1_000_000
        if token is None or not self._registry.authenticate(tenant_id, device_id, token, now_ms):
            raise Refusal(Reason.UNAUTHENTICATED, "unknown device or wrong token")

    async def accept(
        self,
        *,
        tenant_id: str,
        device_id: str,
        message_type: MessageType,
        payload: bytes,
        source: Source,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Check `payload` (JSON bytes) of an authenticated device and hand it to JetStream.

        Raises Refusal with the field at fault, Outage where JetStream is away.
        """
        received_ms = self._clock_ns() // 1_000_000
        seq: int | None = None
        if message_type is MessageType.TELEMETRY:
            seq = self._decoder.telemetry(payload, received_ms=received_ms, unique_keys=True).seq
        else:
            payload = payload or b"{}"
            self._decoder.heartbeat(payload, received_ms=received_ms)
        body = wrap(
            tenant_id=tenant_id,
            device_id=device_id,
            message_type=message_type,
            received_ms=received_ms,
            source=source,
            payload=payload,
        )
        message_id = self._message_id(tenant_id, device_id, seq, payload, idempotency_key)
        return await self._publisher.publish(subject_for(message_type, tenant_id), body, message_id=message_id)

    def _message_id(
        self, tenant_id: str, device_id: str, seq: int | None, payload: bytes, idempotency_key: str | None
    ) -> str:
        """The id under which a retry is recognised.

        A `seq` alone would not do: a device that counts from 0 after a restart would have its new readings taken for
        old ones. A retry repeats the bytes as well as the number.
        """
        if idempotency_key is not None:
            if not IDEMPOTENCY_KEY.match(idempotency_key):
                raise Refusal(
                    Reason.INVALID_PAYLOAD, "1 to 128 visible ASCII characters are allowed", field="Idempotency-Key"
                )
            return f"k/{tenant_id}/{device_id}/{idempotency_key}"
        if seq is not None:
            digest = hashlib.blake2b(payload, digest_size=8).hexdigest()
            return f"s/{tenant_id}/{device_id}/{seq}/{digest}"
        return next(self._made_ids)
