"""Small parts of the role `delivery`: adapters as its services want them, and what it tells beside its work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.streams import consumer_state
from pulse.adapters.postgres.deliveries import DeliveryStore, Found
from pulse.adapters.postgres.device_attributes import DeviceAttributeStore
from pulse.adapters.postgres.ordered_jobs import OrderedLines
from pulse.adapters.webhook.client import WebhookClient, WebhookRequest
from pulse.domain.delivery import Attempted, Record
from pulse.domain.errors import Outage
from pulse.domain.ledger import SEQUENCE_MAX, position
from pulse.domain.line import Patience
from pulse.domain.routed import Json
from pulse.domain.webhook_url import WebhookUrl
from pulse.runtime.health import Dependency
from pulse.runtime.metrics import DeliveryMetrics
from pulse.services.delivery_record import Told
from pulse.services.route_book import RouteKey
from pulse.wiring.process import Process
from pulse.wiring.streams import LATER, ROUTES, WORKERS, state_of
from pulse.wiring.waiting import told

BACKLOG_S = 5.0
"""How often it is told how many jobs there are."""


class Webhooks:
    """The client as `services.sending` wants it."""

    def __init__(self, client: WebhookClient) -> None:
        self._client = client

    async def attempt(self, url: WebhookUrl, *, body: bytes, headers: Mapping[str, str], timeout_s: float) -> Attempted:
        """One POST, and what came of it."""
        return await self._client.attempt(WebhookRequest(url, body, headers, timeout_s))


class Attributes:
    """The attributes of devices as `services.sending` wants them."""

    def __init__(self, store: DeviceAttributeStore) -> None:
        self._store = store

    async def of(self, tenant_id: str, device_ids: Sequence[str]) -> Mapping[str, Mapping[str, Json]]:
        """The attributes of these devices, by their ids."""
        found = await self._store.attributes(tenant_id, device_ids)
        return {device_id: attributes for device_id, (attributes, _) in found.items()}


class WatchedStore:
    """The store of the role, which tells `check`."""

    def __init__(self, store: DeliveryStore, check: Dependency) -> None:
        self._store = store
        self._check = check

    async def check(self) -> None:
        with told(self._check):
            await self._store.check()

    async def load(self, known: Mapping[RouteKey, int | None]) -> Mapping[RouteKey, Found | None]:
        with told(self._check):
            found = await self._store.load({(key.tenant_id, key.route_id): revision for key, revision in known.items()})
        return {RouteKey(*key): each for key, each in found.items()}

    async def record(self, each: Mapping[RouteKey, Told]) -> Mapping[RouteKey, Record]:
        with told(self._check):
            found = await self._store.record({(key.tenant_id, key.route_id): one for key, one in each.items()})
        return {RouteKey(*key): record for key, record in found.items()}

    async def disable(self, key: RouteKey, reason: str) -> bool:
        with told(self._check):
            return await self._store.disable(key, reason)


class RoutedSoFar:
    """How far the streams of devices are routed, as `services.ordered_delivery` wants it."""

    def __init__(self, client: PulseClient, lines: OrderedLines, *, patience_s: float) -> None:
        self._client = client
        self._lines = lines
        self._patience_s = patience_s
        self._patience: dict[int, Patience] = {}

    async def upto(self) -> Mapping[int, int]:
        """Of each epoch with lines that are due, the last position that may be sent."""
        epochs = await self._lines.due_epochs()
        return {epoch: await self._upto(epoch, made) for epoch, made in epochs.items()}

    async def _upto(self, epoch: int, made: tuple[str, int] | None) -> int:
        """Of a making that is over nothing more is routed, so nothing is waited for."""
        if made is not None and made[0] in WORKERS:
            stream, created_ns = made
            state = await consumer_state(self._client, stream, WORKERS[stream])
            if (await state_of(self._client, stream)).created_ns == created_ns:
                patience = self._patience.setdefault(epoch, Patience(self._patience_s))
                unacked = state.ack_pending
                # What is given up leaves no ack: the floor stays below it until the next one.
                floor = state.ack_floor_stream_seq if unacked else state.delivered_stream_seq
                return patience.upto(epoch, floor, unacked=unacked, now_s=time.monotonic())
        self._patience.pop(epoch, None)
        return position(epoch, SEQUENCE_MAX)


class Backlog:
    """Tells how many jobs stand in the two streams."""

    name = "delivery backlog"

    def __init__(self, process: Process, metrics: DeliveryMetrics) -> None:
        self._nats = process.nats
        self._metrics = metrics

    async def run(self, stop: asyncio.Event) -> None:
        """Look at it now and then until `stop`."""
        while not stop.is_set():
            with suppress(Outage):  # then the last count stands, and /readyz says that NATS is away
                for stream in (ROUTES, LATER):
                    self._metrics.backlog(stream, (await state_of(self._nats, stream)).messages)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), BACKLOG_S)
