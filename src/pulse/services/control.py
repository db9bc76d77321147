"""The control API's decisions: whose key it is, what that reaches, and telling the edge of what was committed.

Nothing is acknowledged before its commit. A change stands once PostgreSQL has it; where the edge cannot be told of it
now, the answer says so (`projected: false`) and the maintenance role tells it later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import structlog

from pulse.domain.access import (
    ApiKey,
    ChangeRecord,
    LoggedChange,
    StoredKey,
    check_changes,
    check_reads,
    is_secret,
    opens,
)
from pulse.domain.errors import ConfigurationError, Outage, Reason, Refusal
from pulse.domain.identity import DeviceDetails, NewDevice, TenantDetails
from pulse.domain.limits import TenantLimits
from pulse.domain.query import Bucket, BucketQuery, Latest, Query, StoredReading
from pulse.domain.stream_status import StreamsStatus
from pulse.services.audit import Auditor
from pulse.services.control_commands import Commands
from pulse.services.control_routes import Routes, Trials
from pulse.services.control_shadows import Shadows
from pulse.services.dead_letters import DeadLetters
from pulse.services.dry_run import DryRuns, StoredMessages

log = structlog.get_logger()


class Keys(Protocol):
    """The API keys."""

    async def find(self, secret: str) -> StoredKey | None:
        """The key of that secret, in force or not."""

    async def note_use(self, key_id: int) -> None:
        """Remember that the key is used now."""

    async def add(
        self, *, name: str, tenant_id: str | None, read_only: bool = False, expires_at: datetime | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key; returns it with its secret."""

    async def keys(self, *, after: int = 0, limit: int = 100) -> list[ApiKey]:
        """A page, by id."""

    async def revoke(self, key_id: int) -> ApiKey:
        """End a key."""


class Identities(Protocol):
    """Tenants and devices."""

    async def add_tenant(self, tenant_id: str, *, name: str = "") -> TenantDetails:
        """Make a tenant."""

    async def tenant(self, tenant_id: str) -> TenantDetails:
        """The tenant of that id."""

    async def tenants(self, *, after: str = "", enabled: bool | None = None, limit: int = 100) -> list[TenantDetails]:
        """A page, by id."""

    async def device_count(self, tenant_id: str) -> int:
        """How many devices the tenant has."""

    async def set_tenant_enabled(self, tenant_id: str, enabled: bool) -> None:
        """Let the tenant's devices speak, or none of them."""

    async def set_tenant_limits(self, tenant_id: str, limits: TenantLimits) -> None:
        """Give the tenant these limits, in place of those that it had."""

    async def add_devices(self, tenant_id: str, devices: Sequence[NewDevice]) -> dict[str, str]:
        """Make devices, all or none; device_id to token."""

    async def add_missing_devices(self, tenant_id: str, devices: Sequence[NewDevice]) -> dict[str, str]:
        """Make those that are not there; device_id to token of each made."""

    async def device(self, tenant_id: str, device_id: str) -> DeviceDetails:
        """The device of that id."""

    async def devices(
        self,
        *,
        tenant_id: str | None = None,
        enabled: bool | None = None,
        prefix: str = "",
        after: tuple[str, str] = ("", ""),
        limit: int = 100,
    ) -> list[DeviceDetails]:
        """A page, by id."""

    async def update_device(
        self, tenant_id: str, device_id: str, *, name: str | None, attributes: Mapping[str, object]
    ) -> None:
        """Change the name, and merge attributes."""

    async def set_device_enabled(self, tenant_id: str, device_id: str, enabled: bool) -> None:
        """Let the device speak, or not."""

    async def rotate_token(self, tenant_id: str, device_id: str, *, overlap_s: float) -> str:
        """Give the device a new token."""


class Telemetry(Protocol):
    """What devices have sent."""

    async def rows(self, tenant_id: str, device_id: str, query: Query) -> list[StoredReading]:
        """At most `query.limit` rows."""

    async def buckets(self, tenant_id: str, device_id: str, query: BucketQuery) -> list[Bucket]:
        """The buckets that are not empty."""

    async def latest(self, tenant_id: str, device_id: str) -> Latest:
        """The newest row."""


class Changes(Protocol):
    """The log of changes."""

    async def changes(
        self, *, tenant_id: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[LoggedChange]:
        """A page, the newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """PostgreSQL as one caller may use it: what it does not reach is not there, by PostgreSQL's own doing."""

    identities: Identities
    telemetry: Telemetry
    shadows: Shadows
    commands: Commands
    routes: Routes
    messages: StoredMessages
    dead_letters: DeadLetters
    changes: Changes
    keys: Keys


OpenReach = Callable[[str | None, ChangeRecord | None], Reach]
"""The reach of a tenant (None: all), whose transactions also write the record, where there is one."""


class Edge(Protocol):
    """The registry at the edge."""

    async def project(self, keys: Sequence[str]) -> None:
        """Make the entries under these registry keys what PostgreSQL says. Raises Outage, ConfigurationError."""


class Streams(Protocol):
    """The streams as declared and as they are."""

    async def status(self) -> StreamsStatus:
        """Both, now. Raises Outage."""


class Control:
    """Lets callers in; one a process."""

    def __init__(
        self,
        *,
        open_reach: OpenReach,
        edge: Edge,
        auditor: Auditor,
        streams: Streams,
        dry_runs: DryRuns,
        trials: Trials,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.auditor = auditor
        self.streams = streams
        self.dry_runs = dry_runs
        self.trials = trials
        self.clock = clock
        self._open_reach = open_reach
        self._edge = edge
        self._keys = open_reach(None, None).keys

    def now_ms(self) -> int:
        """The time, in ms since the epoch."""
        return int(self.clock().timestamp() * 1000)

    async def admit(self, secret: str | None) -> Caller:
        """Whose key `secret` is. Raises Refusal UNAUTHENTICATED, the same for every key that does not open; Outage."""
        now = self.clock()
        if secret is None or not is_secret(secret):
            raise _unauthenticated()
        stored = await self._keys.find(secret)
        if stored is None or not opens(stored, secret, now):
            raise _unauthenticated()
        used = stored.key.last_used_at
        if used is None or (now - used).total_seconds() >= 60:
            await self._keys.note_use(stored.key.key_id)
        return Caller(stored.key, self._open_reach)

    async def tell_edge(self, keys: Sequence[str]) -> bool:
        """Whether the edge knows now what was committed under these registry keys; it will in any case."""
        try:
            await self._edge.project(keys)
        except (Outage, ConfigurationError) as error:
            log.warning("a change is saved, but the edge has not been told", keys=len(keys), error=str(error))
            return False
        return True


class Caller:
    """A key that was let in."""

    def __init__(self, key: ApiKey, open_reach: OpenReach) -> None:
        self.key = key
        self._open_reach = open_reach

    def reading(self, tenant_id: str | None) -> Reach:
        """For reading what is `tenant_id`'s, or what is no tenant's (None). Raises Refusal FORBIDDEN."""
        check_reads(self.key, tenant_id)
        return self._open_reach(self.key.tenant_id, None)

    def reading_own(self) -> Reach:
        """For reading whatever the key reaches."""
        return self._open_reach(self.key.tenant_id, None)

    def changing(
        self,
        tenant_id: str | None,
        action: str,
        target: str = "",
        *,
        operators_only: bool = False,
        **details: object,
    ) -> Reach:
        """For one change, which is logged with it. Raises Refusal FORBIDDEN.

        `operators_only`: it is about a tenant, but not the tenant's own to change.
        """
        check_changes(self.key, None if operators_only else tenant_id)
        record = ChangeRecord(
            key_id=self.key.key_id,
            actor=self.key.name,
            action=action,
            tenant_id=tenant_id,
            target=target,
            details=details,
        )
        return self._open_reach(self.key.tenant_id, record)


def _unauthenticated() -> Refusal:
    return Refusal(Reason.UNAUTHENTICATED, "a valid API key is needed: Authorization: Bearer pulsekey_…")
