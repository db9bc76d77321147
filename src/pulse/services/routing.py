"""Routing: what is stored is matched with the routes of its tenant, and each match becomes a job in ROUTES.

Who acks, and when: nobody here. A worker routes what it has committed before it acks it: `route` returns when JetStream
has every job on disk, or a dead letter in its place (route_jobs.py), and raises Outage where it has not; then the
worker waits and asks again. A job's id is `position:route`, so a redelivered message publishes its jobs again, which
within the stream's duplicate window stores nothing twice.

    committed batch ──► tenants with routes? ─ none ──► done
                              └──► filters of devices ──► expressions ──► jobs ──► ROUTES
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from pulse.domain.dead_letter import parse_headers
from pulse.domain.envelope import unwrap
from pulse.domain.errors import Outage, Refusal
from pulse.domain.ledger import PositionSet
from pulse.domain.route import Route, make_job, message_id
from pulse.domain.route_index import wanting
from pulse.domain.route_topic import HOPS, read_hops
from pulse.domain.routed import NOTHING, Json, RoutedMessage
from pulse.domain.settlement import Message
from pulse.domain.subjects import MessageType, tenant_of
from pulse.services.batches import Positioned, Settler
from pulse.services.route_jobs import Job, Jobs, JobSender
from pulse.services.route_table import TURN_S_MAX, Matches, RouteKey, RouteTable
from pulse.services.waiting import Batch

READY_S_MAX = 5.0

Attributes = Mapping[str, Mapping[str, Json]]
"""Of devices of one tenant, by id; those without any may be missing."""


class Stored(Protocol):
    """A message that was stored."""

    @property
    def position(self) -> int:
        """Of the message."""

    @property
    def tenant_id(self) -> str:
        """Whose it is."""

    @property
    def device_id(self) -> str:
        """Who said it."""


class _Envelope(NamedTuple):
    """A message, as its envelope says."""

    position: int
    tenant_id: str
    device_id: str
    message_type: MessageType


DeadAmong = Callable[[PositionSet], Awaitable[PositionSet]]
"""Those of settled positions that are dead letters. Raises Outage."""


class DeviceAttributes(Protocol):
    """What is known of devices; raises Outage where it is away."""

    async def of(self, tenant_id: str, device_ids: Iterable[str]) -> Attributes:
        """The attributes of these devices."""


class Router:
    """Routes what one worker stores; any number of batches at once."""

    def __init__(
        self,
        *,
        table: RouteTable,
        sender: JobSender,
        attributes: DeviceAttributes,
        ready_s_max: float = READY_S_MAX,
    ) -> None:
        self._table = table
        self._sender = sender
        self._attributes = attributes
        self._ready_s_max = ready_s_max

    async def route(
        self, stored: Mapping[MessageType, Sequence[Stored]], messages: Mapping[int, Message], dead: PositionSet
    ) -> None:
        """Have a job for each message of `stored` and route that wants it, except those at positions that are `dead`.

        `messages` are by position. Raises Outage; then some jobs may be there already.
        """
        await self.until_known()
        if not self._table.index:
            return
        jobs = Jobs(self._sender)
        try:
            for message_type, of_type in stored.items():
                await self._route_type(message_type, of_type, messages, dead, jobs)
            await jobs.close()
        except Outage:
            await jobs.abandon()
            self._sender.interrupted()
            raise

    def take_matches(self) -> dict[RouteKey, Matches]:
        """What became of each route since this was last asked."""
        counts, unanswered = self._sender.take_counts(), self._table.take_unanswered()
        matches: dict[RouteKey, Matches] = {}
        for key in counts.keys() | unanswered.keys():
            jobs, no_room = counts.get(key, (0, 0))
            matches[key] = Matches(jobs, no_room, unanswered.get(key, 0))
        return matches

    async def until_known(self) -> None:
        """Returns once all routes are known as they are now. Raises Outage where that takes too long."""
        if not self._table.ready.is_set():
            try:
                async with asyncio.timeout(self._ready_s_max):
                    await self._table.ready.wait()
            except TimeoutError as error:
                raise Outage("nats", "the routes have not been read yet") from error
        await self._table.refresh()

    def concerning(self, position: int, message: Message) -> _Envelope | None:
        """Who says what in `message`, if some route may want it."""
        if not self._table.index.has(tenant_of(message.subject)):
            return None
        try:
            said = unwrap(message.subject, message.body)
        except Refusal:
            return None
        if not self._table.index.concerns(said.tenant_id, said.msg_type):
            return None
        return _Envelope(position, said.tenant_id, said.device_id, said.msg_type)

    async def _route_type(
        self,
        message_type: MessageType,
        stored: Sequence[Stored],
        messages: Mapping[int, Message],
        dead: PositionSet,
        jobs: Jobs,
    ) -> None:
        attributes: dict[str, Attributes] = {}
        for tenant_id in {each.tenant_id for each in stored}:
            if self._table.index.concerns(tenant_id, message_type):
                attributes[tenant_id] = await self._attributes_of(tenant_id, stored)
        if not attributes:
            return
        turn = time.monotonic()
        for each in stored:
            known = attributes.get(each.tenant_id)
            if known is None or (dead and each.position in dead):
                continue
            message = messages[each.position]
            wanted = self._wanting(message_type, each, message, known.get(each.device_id, NOTHING))
            if wanted:
                await self._send(each, message, wanted, jobs)
            if time.monotonic() - turn > TURN_S_MAX:
                await asyncio.sleep(0)
                turn = time.monotonic()

    async def _attributes_of(self, tenant_id: str, stored: Sequence[Stored]) -> Attributes:
        if not self._table.needs_attributes(tenant_id):
            return {}
        return await self._attributes.of(tenant_id, {each.device_id for each in stored if each.tenant_id == tenant_id})

    def _wanting(
        self, message_type: MessageType, stored: Stored, message: Message, attributes: Mapping[str, Json]
    ) -> Sequence[Route]:
        near = self._table.index.near(stored.tenant_id, message_type, stored.device_id, attributes)
        if all(candidate.predicate is None for candidate in near):
            return [candidate.route for candidate in near]
        try:
            said = _read(message.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            said = _Said(ts=0, source="", payload={})  # nothing that an expression could ask for
        routed = RoutedMessage(
            tenant_id=stored.tenant_id,
            device_id=stored.device_id,
            message_type=message_type,
            source=said.source,
            ts_ms=said.ts,
            payload=said.payload,
            attributes=attributes,
            body=message.body,
            position=stored.position,
        )
        return wanting(near, routed, self._table.scope)

    async def _send(self, stored: Stored, message: Message, wanted: Sequence[Route], jobs: Jobs) -> None:
        hops = hops_of(message)
        for route in wanted:
            job_id = message_id(stored.position, route.route_id)
            if not self._sender.is_answered(job_id):
                body = make_job(message.body, route_id=route.route_id, position=stored.position, hops=hops)
                at = stored.position if route.ordered else None
                await jobs.add(Job(stored.tenant_id, route.route_id, stored.device_id, job_id, body, at))


class RoutedSettler:
    """A `settler` whose messages are routed once they are settled, but for those that are dead letters.

    For streams of which the settler itself does not say what it made of each message: `dead_among` knows, and is asked
    where some route wants such messages. A device's word counts, whatever its shadow or command makes of it.
    """

    def __init__(self, settler: Settler, *, router: Router, dead_among: DeadAmong) -> None:
        self._settler = settler
        self._router = router
        self._dead_among = dead_among

    async def settle(self, batch: Batch, positioned: Positioned) -> None:
        """Settle, then route. Raises what the settler raises."""
        await self._settler.settle(batch, positioned)
        await self._router.until_known()
        stored: dict[MessageType, list[_Envelope]] = {}
        for position, message in positioned:
            said = self._router.concerning(position, message)
            if said is not None:
                stored.setdefault(said.message_type, []).append(said)
        if stored:
            dead = await self._dead_among(PositionSet.of(each.position for kind in stored.values() for each in kind))
            await self._router.route(stored, dict(positioned), dead)

    async def condemn(self, batch: Batch, position: int, message: Message, refusal: Refusal) -> None:
        """Settle this one as a dead letter, which is not routed."""
        await self._settler.condemn(batch, position, message, refusal)


def hops_of(message: Message) -> int:
    """Through how many routes it has come already."""
    if _HOPS not in message.headers:
        return 0
    return read_hops(parse_headers(message.headers).get(HOPS, "0"))


class _Said(msgspec.Struct, gc=False):
    """What an expression may ask of an envelope, beside what is known."""

    ts: int
    source: str
    payload: dict[str, Any]


_HOPS = HOPS.encode()
_read = msgspec.json.Decoder(_Said).decode
