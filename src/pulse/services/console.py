"""What the console's pages ask and do, for whoever is signed in: the control API's reach, and what only people need.

    page ─► Visitor ─► Caller (services.control)      devices, telemetry, tenants, keys, log of changes
                  └──► Desk                            searching devices, routes and their health, dead letters
                  └──► Messages, Pipeline, Streams     for operators, but for messages of one's own tenant

Every change goes with its record, as in the control API.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pulse.domain.access import ApiKey, ChangeRecord, check_changes, check_reads
from pulse.domain.browse import Start, StreamMessage
from pulse.domain.command_requests import CommandBounds
from pulse.domain.device_search import DeviceSearch
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import DeviceDetails
from pulse.domain.query import QueryBounds
from pulse.domain.route_search import FoundRoute, RouteSearch
from pulse.domain.shadow import ShadowBounds
from pulse.services.control import Caller, Control, OpenReach
from pulse.services.dead_letters import DeadLetters
from pulse.services.pipeline import Pipeline
from pulse.services.sign_in import SignedIn, SignIn


class Search(Protocol):
    """Devices by what people remember of them; raises Outage."""

    async def search(self, wanted: DeviceSearch, *, after: tuple[str, str], limit: int) -> list[DeviceDetails]:
        """A page of those that match, by tenant and id, behind `after`."""


class RouteList(Protocol):
    """Routes with how their destinations are; raises Outage."""

    async def search(self, wanted: RouteSearch, *, after: tuple[str, str], limit: int) -> list[FoundRoute]:
        """A page of those that match, by tenant and id, behind `after`."""

    async def find(self, tenant_id: str, route_id: str) -> FoundRoute:
        """The route of that id. Refusal NOT_FOUND."""


class Messages(Protocol):
    """Messages in the streams; raises Outage."""

    async def last_sequence(self, stream: str) -> int:
        """The sequence of the newest, 0 where there never was one."""

    async def read(self, stream: str, start: Start, *, limit: int) -> list[StreamMessage]:
        """At most `limit`, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """PostgreSQL as one visitor may use it, beyond the control API's `Reach`."""

    search: Search
    routes: RouteList
    dead_letters: DeadLetters


OpenDesk = Callable[[str | None, ChangeRecord | None], Desk]
"""The desk of a tenant (None: all), whose changes write the record, where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """All that the pages need; one a process. `prefixes` are the streams whose messages name their tenant."""

    control: Control
    sign_in: SignIn
    pipeline: Pipeline
    messages: Messages
    open_reach: OpenReach
    open_desk: OpenDesk
    prefixes: dict[str, str]
    query: QueryBounds
    shadow: ShadowBounds
    command: CommandBounds
    import_rows_max: int
    import_bytes_max: int
    gateway_url: str
    mqtt_url: str

    def visitor(self, signed_in: SignedIn) -> Visitor:
        """Whoever is signed in, at work."""
        return Visitor(signed_in, self)


class Visitor:
    """Somebody who is signed in."""

    def __init__(self, signed_in: SignedIn, console: Console) -> None:
        self.signed_in = signed_in
        self.caller = Caller(signed_in.session.key, console.open_reach)
        self._console = console

    @property
    def key(self) -> ApiKey:
        """As whom."""
        return self.signed_in.session.key

    @property
    def is_operator(self) -> bool:
        """Whether every tenant is reached, and the streams themselves."""
        return self.key.tenant_id is None

    @property
    def may_change(self) -> bool:
        """Whether anything may be changed at all."""
        return not self.key.read_only

    def check_operator(self) -> None:
        """Refusal FORBIDDEN for whoever is of one tenant."""
        check_reads(self.key, None)

    def desk(self) -> Desk:
        """For reading whatever the key reaches."""
        return self._console.open_desk(self.key.tenant_id, None)

    def changing_letters(self, tenant_id: str | None, action: str, target: str, **details: object) -> DeadLetters:
        """For one change to dead letters, which is logged with it. Raises Refusal FORBIDDEN."""
        check_changes(self.key, tenant_id)
        record = ChangeRecord(
            key_id=self.key.key_id,
            actor=self.key.name,
            action=action,
            tenant_id=tenant_id,
            target=target,
            details=details,
        )
        return self._console.open_desk(self.key.tenant_id, record).dead_letters

    def subject_of(self, stream: str, tenant_id: str | None) -> str | None:
        """The subject on which this visitor may read `stream`; None is all. Raises Refusal FORBIDDEN, NOT_FOUND."""
        wanted = tenant_id or self.key.tenant_id
        check_reads(self.key, wanted)
        if wanted is None:
            return None
        prefix = self._console.prefixes.get(stream)
        if prefix is None:
            raise Refusal(Reason.NOT_FOUND, f"messages of {stream} are no tenant's")
        return f"{prefix}.{wanted}"
