"""One attempt at one job: what is sent, and by whom.

body      the template of the route, filled in, or the envelope of the message as it came
webhook   POST, signed with each secret that is valid now (Standard Webhooks), under the id of the job
mqtt      a publish at QoS 1 below the tenant's own topics, which counts once the broker has confirmed it
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from pulse.domain.delivery import Attempted
from pulse.domain.envelope import wrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.route import Job, Webhook
from pulse.domain.route_topic import next_hop
from pulse.domain.routed import NOTHING, Json, RoutedMessage
from pulse.domain.webhook import signed_headers
from pulse.domain.webhook_url import WebhookUrl
from pulse.services.route_book import Sendable

REFUSED = 0x80
"""Reason codes of a PUBACK from here on are refusals (MQTT 5, 3.4.2.1)."""


class WebhookClient(Protocol):
    """HTTP."""

    async def attempt(self, url: WebhookUrl, *, body: bytes, headers: Mapping[str, str], timeout_s: float) -> Attempted:
        """One POST, and what came of it."""


class Republisher(Protocol):
    """A connection to the MQTT broker, whenever there is one."""

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[int]:
        """Publish at QoS 1; the future gets the PUBACK's reason code, or an Outage. Raises Outage, Refusal."""


class Attributes(Protocol):
    """What devices are known by; raises Outage."""

    async def of(self, tenant_id: str, device_ids: Sequence[str]) -> Mapping[str, Mapping[str, Json]]:
        """The attributes of these devices, by their ids."""


class Sending:
    """Makes attempts."""

    def __init__(
        self,
        *,
        webhooks: WebhookClient,
        republisher: Republisher | None,
        attributes: Attributes,
        body_bytes_max: int,
    ) -> None:
        self._webhooks = webhooks
        self._republisher = republisher
        self._attributes = attributes
        self._body_bytes_max = body_bytes_max

    async def attempt(self, job: Job, sendable: Sendable) -> Attempted:
        """One attempt; Refusal where this job can never be sent so, Outage where nothing was tried."""
        message = await self._message(job, sendable)
        body = _envelope(job) if sendable.template is None else self._rendered(sendable, message)
        if sendable.topic is not None:
            next_hop(job.hops)
            return await self._republish(sendable.topic.topic(message), body)
        destination = sendable.route.destination
        assert isinstance(destination, Webhook)
        assert sendable.url is not None
        assert sendable.secrets is not None
        now_s = int(time.time())
        signed = signed_headers(sendable.secrets.valid(now_s), message_id=job.message_id, timestamp_s=now_s, body=body)
        return await self._webhooks.attempt(
            sendable.url, body=body, headers={**destination.headers, **signed}, timeout_s=destination.timeout_s
        )

    def _rendered(self, sendable: Sendable, message: RoutedMessage) -> bytes:
        assert sendable.template is not None
        return sendable.template.render(message, bytes_max=self._body_bytes_max)

    async def _message(self, job: Job, sendable: Sendable) -> RoutedMessage:
        attributes: Mapping[str, Json] = NOTHING
        text = (sendable.route.template or "") + getattr(sendable.route.destination, "topic", "")
        if "attributes" in text or "${device}" in text:
            found = await self._attributes.of(job.tenant_id, [job.device_id])
            attributes = found.get(job.device_id, NOTHING)
        return RoutedMessage(
            tenant_id=job.tenant_id,
            device_id=job.device_id,
            message_type=job.msg_type,
            source=job.source,
            ts_ms=job.ts,
            payload=_payload(job) if text else {},
            attributes=attributes,
            position=job.position,
            hops=job.hops,
        )

    async def _republish(self, topic: str, body: bytes) -> Attempted:
        if self._republisher is None:
            raise Refusal(Reason.INVALID_REQUEST, "no MQTT broker is configured", field="destination")
        started_s = time.monotonic()
        code = await self._republisher.publish(topic, body)
        elapsed_s = time.monotonic() - started_s
        if code >= REFUSED:
            raise Refusal(Reason.REFUSED_BY_DESTINATION, f"the broker refuses it with reason code 0x{code:02x}")
        return Attempted(status=200, elapsed_s=elapsed_s)


def _payload(job: Job) -> Mapping[str, Json]:
    try:
        return msgspec.json.decode(job.payload, type=dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(Reason.INVALID_ENVELOPE, f"the payload is no JSON object: {error}", field="payload") from error


def _envelope(job: Job) -> bytes:
    """The message as it stood in its stream."""
    return wrap(
        tenant_id=job.tenant_id,
        device_id=job.device_id,
        message_type=job.msg_type,
        received_ms=job.ts,
        source=job.source,
        payload=bytes(job.payload),
        name=job.name,
    )
